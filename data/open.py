"""From a configuration to the data of a run: prepared where need be, verified, and cut for one rank."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.checksums import Background
from data.config import DataConfig
from data.files import sha256
from data.loader import Loader, Tokens, ValidationSet
from data.prepare import Report, prepare, say
from data.shards import MANIFEST, Manifest, Shard, foreign_shard, open_shard, sampled_sha256, verify_shards
from data.sources import find_files
from data.tokenizers import TokenizerInfo, open_ready
from polargrad_dist.errors import ConfigError, DataError, PolarGradError

Gather = Callable[[Any], list[Any]]
Meanwhile = Callable[[str, Callable[[], Any]], Any]
# Published shards of one folder tell their split by name: fineweb_train_000001.bin, fineweb_val_000000.bin.
_VALIDATION = re.compile(r"(^|[_.-])val(idation)?([_.-]|$)")


@dataclass(frozen=True)
class Data:
    """What a run reads: training and validation data, and what is known of their tokens."""

    train: Loader
    validation: ValidationSet | None
    tokenizer: TokenizerInfo | None
    vocab_size: int | None
    end_of_text: int | None
    folder: Path
    shards: tuple[Shard, ...]

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able: tokenizer, shards, sequence length and seed."""
        return self.train.fingerprint()

    def load_tokenizer(self) -> Any:
        """The tokenizer, to encode and decode with. Raises DataError where there is none."""
        if self.tokenizer is None:
            raise DataError("these shards come without a tokenizer; set data.tokenizer.name to theirs.")
        return self.tokenizer.load(self.folder)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError when a shard holds a token id that a model of this vocabulary does not have."""
        for shard in self.shards:
            largest = shard.max_token
            if largest is None:
                largest = int(open_shard(self.folder / shard.name).max())
            if largest >= vocab_size:
                raise DataError(
                    f"{self.folder / shard.name} holds token {largest}, the model's vocabulary ends at {vocab_size - 1}; set "
                    "model.vocab_size to the tokenizer's, or prepare the data with the model's tokenizer."
                )


def open_data(
    config: DataConfig,
    *,
    sequence_length: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    all_gather: Gather = lambda value: [value],
    meanwhile: Meanwhile = lambda doing, prepare: prepare(),
    report: Report = say,
) -> Data:
    """The data of one rank. Rank 0 prepares what is not prepared yet, while the others wait in ``meanwhile``.

    ``all_gather(x)`` returns every rank's x in rank order. ``meanwhile(doing, fn)`` is ``fn()`` on rank 0, and on the others
    a wait for it, however long it takes. An error of one rank (DataError, ConfigError) is raised on all.
    """
    for name, value in (("validation_tokens", config.validation_tokens), ("prefetch", config.prefetch)):
        if value is not None and value < 0:
            raise ConfigError(f"data.{name} is {value}, expected a whole number >= 0")

    def on_rank_0(doing: str, fn: Callable[[], Any]) -> Any:
        return _together(lambda: meanwhile(doing, lambda: fn() if rank == 0 else None), all_gather)[0]

    folder, manifest, train, validation = on_rank_0("prepare the data", lambda: _shards(config, report))
    _together(
        lambda: verify_shards(folder, [*train, *validation], config.verify, part=rank, parts=world),
        all_gather,
    )

    info, end_of_text = on_rank_0("open the tokenizer", lambda: _tokenizer(config, folder, manifest))
    description = {
        "tokenizer": info.hash if info else None,
        "shards": [_identity(folder, shard) for shard in train],
        "validation": [_identity(folder, shard) for shard in validation],
    }
    unknown = (
        [] if config.verify == "sizes" else [shard for shard in (*train, *validation) if not shard.sha256]
    )
    foreign = [folder / shard.name for shard in unknown]
    loader = Loader(
        _open(folder, train),
        sequence_length,
        global_batch,
        micro_batch,
        rank,
        world,
        seed,
        config.prefetch,
        description,
        Background(foreign[rank::world], Path(config.cache) / "checksums", report),
    )
    held_out = None
    if validation:
        tokens = _open(folder, validation)
        known = all(shard.text_bytes is not None for shard in validation)
        size = sum(shard.text_bytes or 0 for shard in validation)
        targets = len(tokens) - 1
        if config.validation_tokens is not None:
            targets = min(targets, config.validation_tokens)
        if targets > 0:
            ratio = size / (len(tokens) - 1) if known else None
            held_out = ValidationSet(tokens, sequence_length, micro_batch, rank, world, targets, ratio)
    vocab_size = info.vocab_size if info else None
    return Data(loader, held_out, info, vocab_size, end_of_text, folder, (*train, *validation))


def _shards(
    config: DataConfig, report: Report
) -> tuple[Path, Manifest | None, tuple[Shard, ...], tuple[Shard, ...]]:
    if config.source != "shards":
        folder = prepare(config, report=report)
        manifest = Manifest.load(folder)
        return folder, manifest, manifest.train, manifest.validation
    folders = [Path(path).expanduser() for path in config.paths]
    if any((folder / MANIFEST).exists() for folder in folders):
        return _prepared(folders, config)
    found = find_files(config.paths, "data.paths", (".bin",))
    if config.validation_paths:
        train, held_out = found, find_files(config.validation_paths, "data.validation_paths", (".bin",))
    else:
        train = [path for path in found if not _VALIDATION.search(path.name)]
        held_out = [path for path in found if _VALIDATION.search(path.name)]
    if not train:
        raise DataError(f"data.paths names no training shards but {held_out[0]} for validation; add some.")
    return Path(), None, tuple(map(_foreign, train)), tuple(map(_foreign, held_out))


def _prepared(
    folders: list[Path], config: DataConfig
) -> tuple[Path, Manifest, tuple[Shard, ...], tuple[Shard, ...]]:
    """Folders that ``data.prepare`` wrote, read one after another."""
    if strange := [str(folder) for folder in folders if not (folder / MANIFEST).exists()]:
        raise ConfigError(
            f"data.paths names prepared folders and, with {strange[0]}, shards without a manifest; name one kind only."
        )
    if config.validation_paths:
        raise ConfigError(
            "data.validation_paths is set, but prepared folders bring their own validation shards; leave it empty."
        )
    manifests = [Manifest.load(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.tokenizer.get("hash") != manifests[0].tokenizer.get("hash"):
            raise DataError(
                f"{folder} was prepared with another tokenizer than {folders[0]}; prepare both with the same one."
            )
    if len(folders) == 1:
        return folders[0], manifests[0], manifests[0].train, manifests[0].validation

    def of_all(split: str) -> tuple[Shard, ...]:
        return tuple(
            replace(shard, name=str((folder / shard.name).absolute()))
            for folder, manifest in zip(folders, manifests, strict=True)
            for shard in getattr(manifest, split)
        )

    return folders[0], manifests[0], of_all("train"), of_all("validation")


def _tokenizer(
    config: DataConfig, folder: Path, manifest: Manifest | None
) -> tuple[TokenizerInfo | None, int | None]:
    """The tokenizer of the shards and their end-of-text; of foreign shards what the configuration says.

    Raises DataError where the tokenizer beside the shards is no longer the one that made them.
    """
    if manifest is not None:
        info = TokenizerInfo(**manifest.tokenizer)
        if info.file is not None and (found := sha256(folder / info.file)) != info.hash:
            raise DataError(
                f"{folder / info.file} is not the tokenizer that made the shards beside it: its sha256 is {found[:16]}…, the "
                f"manifest says {info.hash[:16]}…; restore it, or delete the folder and prepare again."
            )
        return info, info.end_of_text
    named = config.tokenizer
    if named.name == "bpe":
        return None, named.end_of_text if isinstance(named.end_of_text, int) else None
    info = replace(open_ready(named.name, named.end_of_text).info, file=None)
    return info, info.end_of_text


def _identity(folder: Path, shard: Shard) -> dict[str, Any]:
    """What tells one shard from another, whatever folder it lies in."""
    checksum = shard.sha256 or sampled_sha256(folder / shard.name)
    return {"name": Path(shard.name).name, "tokens": shard.tokens, "sha256": checksum}


def _foreign(path: Path) -> Shard:
    return replace(foreign_shard(path), name=str(path.absolute()))


def _open(folder: Path, shards: tuple[Shard, ...]) -> Tokens:
    opened = [open_shard(folder / shard.name) for shard in shards]
    if len({shard.dtype for shard in opened}) > 1:
        raise ConfigError("some shards hold uint16 tokens and some uint32; prepare all with one tokenizer.")
    return Tokens(opened)


def _together(fn: Callable[[], Any], all_gather: Gather) -> list[Any]:
    """Every rank's result; the first error on any rank is raised on all of them."""
    try:
        answer: tuple[Any, PolarGradError | None] = (fn(), None)
    except PolarGradError as error:
        answer = (None, error)
    answers = all_gather(answer)
    for _, failure in answers:
        if failure is not None:
            raise failure
    return [value for value, _ in answers]
