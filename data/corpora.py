"""Finds the token shards of a run, of one corpus or several; prepares or fetches them first where necessary.

Runs in one process, which sends the result to the others. Shards have absolute paths here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from data.checks import OWN, called
from data.config import DataConfig, SourceConfig
from data.mixture import MixedText, shares
from data.paths import find_local, missing_paths, without_validation
from data.prepare import Report, prepare
from data.remote import fetch_prepared, is_remote
from data.shards import MANIFEST, Manifest, Shard, foreign_shard
from data.sources import open_source
from data.tokenizers import Tokenizer, TokenizerInfo, open_ready, open_tokenizer
from polargrad_dist.errors import ConfigError, DataError

# The names of published shards contain their split: fineweb_train_000001.bin, fineweb_val_000000.bin.
_VALIDATION = re.compile(r"(^|[_.-])val(idation)?([_.-]|$)")


@dataclass(frozen=True)
class Corpus:
    """Shards for training and for validation; a manifest unless they are foreign.

    name: name of its validation set; empty for a single corpus. weight: share of a mixture; 0 for validation only.
    """

    folder: Path
    manifest: Manifest | None
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    name: str = ""
    weight: float = 0.0


def find_corpora(config: DataConfig, report: Report) -> list[Corpus]:
    """The run's corpora, training corpora first. Raises ``ConfigError`` or ``DataError``."""
    tokenizer = None
    # The first corpus may take hours: what a later one lacks is found before
    for key, pattern in missing_paths(config):
        raise DataError(f"{key}: {pattern} matches no file, expected one on this machine")
    if config.sources:
        corpora, tokenizer = _mixture(config, report)
    else:
        corpora = [replace(_corpus(config, report, None), weight=1.0)]
    for name, paths in config.validation_sets.items():
        tokenizer = tokenizer or _tokenizer_of(corpora[0], config)
        corpora.append(validation_corpus(name, paths, config, tokenizer, report))
        if sum(shard.tokens for shard in corpora[-1].validation) < 2:
            raise DataError(
                f"data.validation_sets.{name} holds fewer than two tokens, so nothing to predict: add text, or leave it out"
            )
    return corpora


def _mixture(config: DataConfig, report: Report) -> tuple[list[Corpus], Tokenizer | None]:
    counts = shares([part.weight for part in config.sources])
    settings = [_alone(config, part) for part in config.sources]
    ready = {i: _corpus(one, report, None) for i, one in enumerate(settings) if one.source == "shards"}
    prepared = [corpus for corpus in ready.values() if corpus.manifest is not None]
    tokenizer: Tokenizer | None = None
    if prepared:
        tokenizer = _tokenizer_of(prepared[0], config)
    elif len(ready) < len(settings) or config.tokenizer.name != "bpe":
        texts = [(one, n) for one, n in zip(settings, counts, strict=True) if one.source != "shards"]
        sources = [open_source(one) for one, _ in texts]
        text = MixedText(sources, [n for _, n in texts], config.tokenizer.train_bytes)
        tokenizer = open_tokenizer(config.tokenizer, text, Path(config.cache) / "tokenizers")
    found: list[Corpus] = []
    for i, (one, part) in enumerate(zip(settings, config.sources, strict=True)):
        corpus = ready[i] if i in ready else _corpus(one, report, tokenizer)
        if corpus.manifest is not None and tokenizer is not None:
            _same_tokenizer(corpus, tokenizer.info)
        found.append(replace(corpus, name=called(part), weight=part.weight))
    # One with a manifest first: it describes the tokenizer.
    return sorted(found, key=lambda corpus: corpus.manifest is None), tokenizer


def _alone(config: DataConfig, part: SourceConfig) -> DataConfig:
    """The configuration of one source of a mixture; it keeps the validation sets, whose files it must not train on."""
    own = {key: getattr(part, key) for key in OWN}
    return replace(config, sources=[], **own)


def _corpus(config: DataConfig, report: Report, tokenizer: Tokenizer | None) -> Corpus:
    if config.source != "shards":
        return _of_folder(prepare(config, report=report, tokenizer=tokenizer))
    places = [_fetched(path, config, report) for path in config.paths]
    folders = [Path(path).expanduser() for path in places]
    if any((folder / MANIFEST).exists() for folder in folders):
        return _of_folders(folders, config)
    found = find_local(places, "data.paths", (".bin",))
    train = without_validation(found, config, (".bin",), report)
    if config.validation_paths:
        held_out = find_local(config.validation_paths, "data.validation_paths", (".bin",))
    else:
        train = [path for path in train if not _VALIDATION.search(path.name)]
        held_out = [path for path in found if _VALIDATION.search(path.name)]
    if not train:
        raise DataError(
            f"data.paths names only shards for validation, such as {held_out[0]}, expected training shards: add some"
        )
    return Corpus(Path(), None, tuple(map(_foreign, train)), tuple(map(_foreign, held_out)))


def _fetched(path: str, config: DataConfig, report: Report) -> str:
    """The local path of a folder; remote prepared folders are fetched into the cache."""
    if not is_remote(path) or path.endswith(".bin"):
        return path
    report(f"fetching {path}")
    return str(fetch_prepared(path.rstrip("/"), Path(config.cache), MANIFEST))


def _of_folder(folder: Path) -> Corpus:
    manifest = Manifest.load(folder)
    TokenizerInfo(**manifest.tokenizer).check(folder)

    def named(shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
        return tuple(replace(shard, name=str((folder / shard.name).absolute())) for shard in shards)

    return Corpus(folder, manifest, named(manifest.train), named(manifest.validation))


def _of_folders(folders: list[Path], config: DataConfig) -> Corpus:
    """Folders that ``data.prepare`` wrote, concatenated."""
    if strange := [str(folder) for folder in folders if not (folder / MANIFEST).exists()]:
        raise ConfigError(
            f"data.paths names prepared folders and, with {strange[0]}, shards without a manifest, expected one kind: "
            "name the others in another source"
        )
    if config.validation_paths:
        raise ConfigError(
            "data.validation_paths is set, but prepared folders have their own validation shards, expected []: leave it out"
        )
    found = [_of_folder(folder) for folder in folders]
    for corpus in found[1:]:
        _same_tokenizer(corpus, found[0])
    whole = [
        tuple(s for corpus in found for s in getattr(corpus, split)) for split in ("train", "validation")
    ]
    return replace(found[0], train=whole[0], validation=whole[1])


def _same_tokenizer(corpus: Corpus, other: Corpus | TokenizerInfo) -> None:
    theirs = (
        other.hash
        if isinstance(other, TokenizerInfo)
        else other.manifest and other.manifest.tokenizer.get("hash")
    )
    if corpus.manifest is not None and corpus.manifest.tokenizer.get("hash") != theirs:
        than = "the run's" if isinstance(other, TokenizerInfo) else str(other.folder)
        raise DataError(
            f"{corpus.folder} was prepared with another tokenizer than {than}, expected the same: prepare both with one"
        )


def _tokenizer_of(corpus: Corpus, config: DataConfig) -> Tokenizer:
    """The tokenizer of shards. Raises ``ConfigError`` for foreign shards if the configuration names none."""
    if corpus.manifest is not None:
        return TokenizerInfo(**corpus.manifest.tokenizer).load(corpus.folder)
    if config.tokenizer.name == "bpe":
        raise ConfigError(
            "data.validation_sets or data.sources has text, but the shards have no tokenizer, expected the one that made "
            "them: set data.tokenizer.name to it"
        )
    return open_ready(config.tokenizer.name, config.tokenizer.end_of_text)


def validation_corpus(
    name: str, paths: list[str], config: DataConfig, tokenizer: Tokenizer, report: Report
) -> Corpus:
    """A named validation set: a prepared folder's validation shards, or else its training shards; or text."""
    if len(paths) == 1:
        folder = Path(
            _fetched(paths[0], config, report) if _looks_prepared(paths[0]) else paths[0]
        ).expanduser()
        if (folder / MANIFEST).exists():
            corpus = _of_folder(folder)
            _same_tokenizer(corpus, tokenizer.info)
            return replace(corpus, train=(), validation=corpus.validation or corpus.train, name=name)
    whole = replace(
        config,
        source="files",
        paths=paths,
        sources=[],
        validation_sets={},
        validation_paths=[],
        validation_fraction=0.0,
        max_tokens=None,
    )
    corpus = _of_folder(prepare(whole, report=report, tokenizer=tokenizer))
    return replace(corpus, train=(), validation=corpus.train, name=name)


def _looks_prepared(path: str) -> bool:
    """Whether a URL names a folder with a manifest."""
    if not is_remote(path):
        return False
    from data.remote import file_system

    system, inside = file_system(path.rstrip("/"))
    return bool(system.exists(f"{inside}/{MANIFEST}"))


def _foreign(path: Path) -> Shard:
    return replace(foreign_shard(path), name=str(path.absolute()))
