"""Local and remote files, compressed or not: paths, `s3://`, `gs://` and other URLs of fsspec, .gz, .zst.

Text is read in place. Prepared shards are memory-mapped, so their folders are first fetched into the cache.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from data.files import digest, folder_lock, make_folder, read_json, sha256
from polargrad_dist.errors import ConfigError, DataError

PACKED = (".gz", ".zst")
BLOCK = 1 << 22


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL of another file system than the local one."""
    return "://" in str(path)


@dataclass(frozen=True)
class Remote:
    """A file on another file system, with the part of `pathlib.Path` that reading text needs."""

    url: str
    size: int
    mark: str
    """Identifies the file's content: it changes whenever the content does."""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix


File = Path | Remote


def kind(path: File) -> str:
    """The suffix of a file's format, without that of its compression: ``.jsonl`` of ``a.jsonl.gz``."""
    return PurePosixPath(path.name.removesuffix(path.suffix)).suffix if path.suffix in PACKED else path.suffix


def size_of(path: File) -> int:
    """Bytes of a file as stored, compressed or not. Raises OSError."""
    return path.size if isinstance(path, Remote) else path.stat().st_size


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises ``ConfigError`` if fsspec cannot open it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        # A missing package, an unknown scheme
        raise ConfigError(f"{url} cannot be opened: {error}") from error


def find_remote(pattern: str, key: str, suffixes: tuple[str, ...]) -> list[Remote]:
    """The files of a URL; those of a folder or glob are sorted by name. Raises ``DataError`` if there are none."""
    system, path = file_system(pattern)
    try:
        if any(sign in path for sign in "*?["):
            found = system.glob(path, detail=True)
        elif system.isdir(path):
            found = system.find(path, detail=True)
        else:
            found = {path: system.info(path)}
    except FileNotFoundError:
        found = {}
    except Exception as error:
        # Any error of the file system's client
        raise DataError(f"{key}: {pattern} cannot be listed ({type(error).__name__}: {error})") from error
    files = [
        Remote(system.unstrip_protocol(name), int(info["size"]), str(system.ukey(name)))
        for name, info in sorted(found.items())
        if info["type"] == "file"
    ]
    files = [file for file in files if kind(file) in suffixes or file.suffix in suffixes]
    if not files:
        raise DataError(f"{key}: {pattern} matches no file, expected one that ends in {', '.join(suffixes)}")
    return files


@contextmanager
def opened(path: File, raw: list[BinaryIO] | None = None) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file, for reading forward; ``raw`` receives the file as stored, whose ``tell()`` is the
    position.

    Raises ``DataError`` if it cannot be read or decompressed.
    """
    import fsspec

    if isinstance(path, Remote):
        system, name = file_system(path.url)
    else:
        system, name = fsspec.filesystem("file"), str(path)
    try:
        with system.open(name, "rb") as file:
            if raw is not None:
                raw[:] = [file]
            if path.suffix not in PACKED:
                yield file
            else:
                with _unpacking(file, path.suffix) as unpacked:
                    yield unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _unpacking(file: Any, suffix: str) -> BinaryIO:
    """The bytes of a compressed file, of one or several frames; a truncated file raises OSError or EOFError at its end."""
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))


def unpacked_size(path: File) -> int:
    """Bytes of a file's text; a compressed file is read through once to count them."""
    if path.suffix not in PACKED:
        return size_of(path)
    return _unpacked(
        path, path.mark if isinstance(path, Remote) else str(path.stat().st_mtime_ns), size_of(path)
    )


@cache
def _unpacked(path: File, mark: str, size: int) -> int:
    total = 0
    with opened(path) as file:
        while block := file.read(BLOCK):
            total += len(block)
    return total


def fetch_prepared(url: str, store: Path, manifest: str) -> Path:
    """Fetches a remote folder of prepared shards into the cache: each file once, shards checked by their sha256.

    Raises ``DataError`` if a file cannot be fetched, or differs from the manifest.
    """
    system, path = file_system(url)
    folder = store / "fetched" / digest(url)[:16]
    make_folder(folder)
    with folder_lock(folder):
        _fetch(system, f"{path}/{manifest}", folder / manifest, None)
        for name, checksum in _named_by(folder / manifest, url).items():
            target = folder / name
            if target.exists() and sha256(target) == checksum:
                continue
            _fetch(system, f"{path}/{name}", target, checksum)
    return folder


def _named_by(manifest: Path, url: str) -> dict[str, str]:
    """The files that a manifest names, shards and tokenizer, with their sha256."""
    raw = read_json(manifest)
    try:
        shards = [shard for split in ("train", "validation") for shard in raw[split]["shards"]]
        named = {str(shard["name"]): str(shard["sha256"]) for shard in shards}
        if (file := raw["tokenizer"].get("file")) is not None:
            named[str(file)] = str(raw["tokenizer"]["hash"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{url}: its manifest is damaged ({error!r}): upload the folder again") from error
    if strange := [name for name in named if Path(name).name != name or name in ("", ".", "..")]:
        raise DataError(
            f"{url}: the manifest names {strange[0]!r}, expected a plain file name: upload the folder again"
        )
    return named


def _fetch(system: Any, source: str, target: Path, checksum: str | None) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with system.open(source, "rb") as file, open(temporary, "wb") as out:
            shutil.copyfileobj(file, out, BLOCK)
            out.flush()
            os.fsync(out.fileno())
        if checksum is not None and (found := sha256(temporary)) != checksum:
            raise DataError(
                f"{source} has sha256 {found[:16]}…, expected {checksum[:16]}… by its manifest: upload the folder again"
            )
        os.replace(temporary, target)
    except FileNotFoundError as error:
        raise DataError(f"{source} does not exist, expected a folder that data.prepare wrote") from error
    except OSError as error:
        raise DataError(f"{source} cannot be fetched to {target}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
