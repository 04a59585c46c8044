"""Which files the configured paths name: files, folders and globs, local or URLs; no file is for training and validation."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from data.config import DataConfig, SourceConfig
from data.remote import PACKED, File, Remote, find_remote, is_remote, kind, size_of
from polargrad_dist.errors import ConfigError, DataError
from polargrad_dist.words import counted

TEXT, LINES, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), (".parquet",)
SomeFile = TypeVar("SomeFile", bound=File)


def missing_paths(config: DataConfig) -> list[tuple[str, str]]:
    """(key, path) of configured files, folders and globs that match nothing on this machine.

    Raises ``ConfigError`` if a source of files or shards has no paths.
    """
    named = _validation_keys(config)
    sources: dict[str, SourceConfig | DataConfig] = {
        f"data.sources[{i}].": part for i, part in enumerate(config.sources)
    }
    sources = sources or {"data.": config}
    for prefix, source in sources.items():
        if source.source not in ("files", "shards"):
            continue
        if not source.paths:
            raise ConfigError(
                f"{prefix}paths is empty with {prefix}source {source.source!r}, expected files, folders or globs"
            )
        named[f"{prefix}paths"] = source.paths
    return [
        (key, pattern)
        for key, paths in named.items()
        for pattern in paths
        for path in [Path(pattern).expanduser()]
        if not (is_remote(pattern) or path.exists() or glob.glob(str(path), recursive=True))
    ]


def _validation_keys(config: DataConfig) -> dict[str, list[str]]:
    """The paths of each key that names validation data."""
    sets = {f"data.validation_sets.{name}": paths for name, paths in config.validation_sets.items()}
    return {"data.validation_paths": config.validation_paths, **sets}


def without_validation(
    found: list[SomeFile], config: DataConfig, suffixes: tuple[str, ...], report: Callable[[str], None]
) -> list[SomeFile]:
    """The training files among those of ``data.paths``: all but those that ``data.validation_paths`` or
    ``data.validation_sets`` name too. Raises DataError if none is left."""
    remote = any(isinstance(file, Remote) for file in found)
    for key, paths in _validation_keys(config).items():
        held: set[str] = set()
        for pattern in paths:
            if not is_remote(pattern):
                held.update(map(_place, _local_files(Path(pattern).expanduser(), suffixes)))
            elif remote:
                # A set may be a prepared folder, which has no such files
                with suppress(DataError):
                    held.update(map(_place, find_remote(pattern, key, suffixes)))
        kept = [file for file in found if _place(file) not in held] if held else found
        if not kept:
            raise DataError(
                f"data.paths has no file left to train on, since {key} names all {counted(len(found), 'file')} for "
                f"validation, expected at least one: add files to data.paths, or name fewer in {key}"
            )
        if left_out := len(found) - len(kept):
            report(f"{counted(left_out, 'file')} of data.paths left out of training, as named in {key}")
        found = kept
    return found


def _place(file: File) -> str:
    """Identifies a file, whatever links lead to it."""
    return file.url if isinstance(file, Remote) else os.path.realpath(file)


def find_local(paths: list[str], key: str, suffixes: tuple[str, ...]) -> list[Path]:
    """As `find_files`, but only local files, since they are memory-mapped."""
    for path in paths:
        if is_remote(path):
            raise ConfigError(
                f"{key} is {path}, expected a local path or a folder that data.prepare wrote: fetch these shards first"
            )
    return [path for path in find_files(paths, key, suffixes) if isinstance(path, Path)]


def find_files(paths: list[str], key: str, suffixes: tuple[str, ...]) -> list[File]:
    """Files, folders (searched recursively) and globs, local or URLs, expanded in the given order.

    Text may be compressed (.gz, .zst). Raises DataError or ConfigError.
    """
    if not paths:
        raise ConfigError(f"{key} is empty, expected files, folders or globs of {', '.join(suffixes)}")
    found: list[File] = []
    for pattern in paths:
        if is_remote(pattern):
            found += find_remote(pattern, key, suffixes)
            continue
        path = Path(pattern).expanduser()
        if path.is_file() and not _known(path, suffixes):
            raise ConfigError(f"{key}: {path} ends in {path.suffix!r}, expected one of {', '.join(suffixes)}")
        matches = _local_files(path, suffixes)
        if not matches:
            raise DataError(
                f"{key}: {pattern} matches no file, expected one that ends in {', '.join(suffixes)}"
            )
        found += matches
    for file in found:
        try:
            empty = size_of(file) == 0
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}): remove it from {key}") from error
        if empty:
            raise DataError(f"{file} is empty, expected text: remove it from {key} or fill it")
    return found


def _local_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file, or those of the folder or glob, in order; none if nothing matches."""
    if path.is_dir():
        return sorted(file for file in _below(path) if _known(file, suffixes) and file.is_file())
    names = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    return [file for file in map(Path, names) if _known(file, suffixes) and not file.is_dir()]


def _below(folder: Path) -> Iterator[Path]:
    """What lies in a folder and its subfolders, linked ones too; each real folder once, so that cycles of links end."""
    seen: set[str] = set()
    # Links come last: a folder that is reached both ways keeps its own path.
    waiting = [str(folder)]
    for start in waiting:
        for place, folders, names in os.walk(start):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            waiting += filter(os.path.islink, (os.path.join(place, name) for name in folders))
            yield from (Path(place, name) for name in names)


def _known(path: Path, suffixes: tuple[str, ...]) -> bool:
    return (kind(path) if path.suffix in PACKED and kind(path) in TEXT + LINES else path.suffix) in suffixes
