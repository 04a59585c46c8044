"""From a configuration to one rank's data: prepared if necessary, and verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.checks import check_values
from data.checksums import Background
from data.config import DataConfig
from data.corpora import Corpus, find_corpora
from data.kept import keep
from data.loader import Loader, Tokens, ValidationSet
from data.mixture import MixedLoader, shares
from data.prepare import Report, say
from data.sequential import SequentialLoader
from data.shards import Manifest, Shard, open_shard, sampled_sha256, verify_shards
from data.tokenizers import TokenizerInfo, open_ready
from polargrad_dist.errors import ConfigError, DataError, PolarGradError
from polargrad_dist.limits import MESHES, OTHERS, make_room, open_files
from polargrad_dist.words import counted

Gather = Callable[[Any], list[Any]]
Meanwhile = Callable[[str, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Data:
    """A run's data: training and validation sets, and their tokenizer and vocabulary."""

    train: Loader
    validation: ValidationSet | None
    tokenizer: TokenizerInfo | None
    vocab_size: int | None
    end_of_text: int | None
    folder: Path
    shards: tuple[Shard, ...]
    validations: Mapping[str, ValidationSet] = field(default_factory=dict)
    """Further validation sets by name: one per source of a mixture, and those of ``data.validation_sets``."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able: tokenizer, shards, sequence length and seed."""
        return self.train.fingerprint()

    def describe(self) -> dict[str, Any]:
        """JSON-able: ``train_tokens``, ``validation_targets``, ``vocab_size``, ``tokenizer``; None if unknown.

        The first token of the validation shards is only an input, so that there is one target less than tokens.
        """
        held_out = self.validation
        return {
            "train_tokens": len(self.train.tokens),
            "validation_targets": None if held_out is None else held_out.num_targets,
            "vocab_size": self.vocab_size,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.name,
        }

    def load_tokenizer(self) -> Any:
        """The tokenizer, for encoding and decoding. Raises DataError if there is none."""
        if self.tokenizer is None:
            raise DataError(
                "the shards have no tokenizer, expected the one that made them: set data.tokenizer.name to it"
            )
        return self.tokenizer.load(self.folder)

    def keep_tokenizer(self, run_dir: Path) -> None:
        """Copies the tokenizer into a run's directory, so that the tools work on machines without the data."""
        keep(run_dir, self.load_tokenizer() if self.tokenizer else None, self.end_of_text)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError if a shard holds a token id outside the model's vocabulary."""
        for shard in self.shards:
            largest = shard.max_token
            if largest is None:
                largest = int(open_shard(Path(shard.name)).max())
            if largest >= vocab_size:
                raise DataError(
                    f"{shard.name} holds token {largest}, expected at most {vocab_size - 1}, the model's last: set "
                    "model.vocab_size to the tokenizer's, or prepare the data with the model's tokenizer"
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

    ``all_gather(x)`` returns every rank's x in rank order. ``meanwhile(doing, fn)`` runs ``fn()`` on rank 0, while the others
    wait, however long it takes. An error on one rank (DataError, ConfigError) is raised on all.
    """
    check_values(config)

    def on_rank_0(doing: str, fn: Callable[[], Any]) -> Any:
        return _together(lambda: meanwhile(doing, lambda: fn() if rank == 0 else None), all_gather)[0]

    corpora: list[Corpus] = on_rank_0("prepare the data", lambda: find_corpora(config, report))
    everything = [shard for corpus in corpora for shard in (*corpus.train, *corpus.validation)]

    def ready() -> None:
        make_room_for_shards(len(everything), world)
        verify_shards(Path(), everything, config.verify, part=rank, parts=world)

    _together(ready, all_gather)
    first = corpora[0]
    info, end_of_text = on_rank_0("open the tokenizer", lambda: _tokenizer(config, first.manifest))
    held = ValidationMaker(sequence_length, micro_batch, rank, world, config.validation_tokens)
    mixed = [corpus for corpus in corpora if corpus.weight]
    order = (sequence_length, global_batch, micro_batch, rank, world, seed, config.prefetch)
    tokenizer_hash = info.hash if info else None
    unknown = [] if config.verify == "sizes" else [shard for shard in everything if not shard.sha256]
    foreign = [Path(shard.name) for shard in unknown]
    background = Background(foreign[rank::world], Path(config.cache) / "checksums", report)
    # Sets that are only evaluated are not part of the fingerprint: a run may change them.
    held_out = [_identity(shard) for corpus in mixed for shard in corpus.validation]
    if config.sources:
        counts = shares([corpus.weight for corpus in mixed])
        parts = [
            {"name": corpus.name, "share": count, "shards": [_identity(shard) for shard in corpus.train]}
            for corpus, count in zip(mixed, counts, strict=True)
        ]
        opened = [_open(corpus.train) for corpus in mixed]
        train: Loader = MixedLoader(
            Tokens([shard for part in opened for shard in part.shards]),
            *order,
            {"tokenizer": tokenizer_hash, "sources": parts, "validation": held_out},
            background,
            tuple(opened),
            tuple(corpus.name for corpus in mixed),
            tuple(counts),
        )
        validation = held.together([corpus.validation for corpus in mixed], counts)
    else:
        description = {
            "tokenizer": tokenizer_hash,
            "shards": [_identity(shard) for shard in first.train],
            "validation": held_out,
        }
        kind = SequentialLoader if config.order == "sequential" else Loader
        train = kind(_open(first.train), *order, description, background)
        validation = held.of(first.validation)
    named = {corpus.name: held.of(corpus.validation) for corpus in corpora if corpus.name}
    return Data(
        train,
        validation,
        info,
        info.vocab_size if info else None,
        end_of_text,
        first.folder,
        tuple(everything),
        {name: found for name, found in named.items() if found is not None},
    )


def make_room_for_shards(shards: int, world: int) -> None:
    """Raises the limit of open files, of which each memory-mapped shard is one. Raises ``ConfigError`` if the system forbids
    it."""
    # Ranks make some of their connections only after the data are open.
    later = MESHES * (world + 3) + OTHERS
    make_room(open_files() + shards, counted(shards, "token shard"), spare=later)


@dataclass(frozen=True)
class ValidationMaker:
    """Makes this rank's validation sets."""

    sequence_length: int
    micro_batch: int
    rank: int
    world: int
    limit: int | None

    def of(self, shards: tuple[Shard, ...]) -> ValidationSet | None:
        """The first targets of shards, up to the limit; None if there are none."""
        return self._made(_open(shards), _text_bytes(shards), self.limit) if shards else None

    def together(self, sets: list[tuple[Shard, ...]], counts: list[int]) -> ValidationSet | None:
        """One set from the beginnings of several sources' shards: each its share of the limit, or all without one."""
        parts: list[np.ndarray] = []
        size: float | None = 0.0
        for shards, count in zip(sets, counts, strict=True):
            if not shards:
                continue
            tokens, known = _open(shards), _text_bytes(shards)
            wanted = len(tokens)
            if self.limit is not None:
                wanted = min(wanted, self.limit * count // sum(counts) + 1)
            parts.append(tokens.read(0, wanted).astype(np.uint32))
            size = None if size is None or known is None else size + known * wanted / len(tokens)
        if not parts:
            return None
        return self._made(Tokens(parts), size, self.limit)

    def _made(self, tokens: Tokens, text_bytes: float | None, limit: int | None) -> ValidationSet | None:
        targets = len(tokens) - 1
        ratio = None if text_bytes is None or targets < 1 else text_bytes / targets
        targets = targets if limit is None else min(targets, limit)
        if targets < 1:
            return None
        where = (self.sequence_length, self.micro_batch, self.rank, self.world)
        return ValidationSet(tokens, *where, targets, ratio)


def _text_bytes(shards: tuple[Shard, ...]) -> int | None:
    """Bytes of the shards' text; None if it is unknown for one."""
    known = [shard.text_bytes for shard in shards if shard.text_bytes is not None]
    return sum(known) if len(known) == len(shards) else None


def _tokenizer(config: DataConfig, manifest: Manifest | None) -> tuple[TokenizerInfo | None, int | None]:
    """The tokenizer of the shards and their end-of-text; for foreign shards, those of the configuration."""
    if manifest is not None:
        info = TokenizerInfo(**manifest.tokenizer)
        return info, info.end_of_text
    named = config.tokenizer
    if named.name == "bpe":
        return None, named.end_of_text if isinstance(named.end_of_text, int) else None
    info = replace(open_ready(named.name, named.end_of_text).info, file=None)
    return info, info.end_of_text


def _identity(shard: Shard) -> dict[str, Any]:
    """Identifies a shard independently of its folder."""
    checksum = shard.sha256 or sampled_sha256(Path(shard.name))
    return {"name": Path(shard.name).name, "tokens": shard.tokens, "sha256": checksum}


def _open(shards: tuple[Shard, ...]) -> Tokens:
    opened = [open_shard(Path(shard.name)) for shard in shards]
    if len({shard.dtype for shard in opened}) > 1:
        raise ConfigError(
            "some shards hold uint16 tokens and some uint32, expected one type: prepare all with one tokenizer"
        )
    return Tokens(opened)


def _together(fn: Callable[[], Any], all_gather: Gather) -> list[Any]:
    """Every rank's result; the first error on any rank is raised on all."""
    try:
        answer: tuple[Any, PolarGradError | None] = (fn(), None)
    except PolarGradError as error:
        answer = (None, error)
    answers = all_gather(answer)
    for _, failure in answers:
        if failure is not None:
            raise failure
    return [value for value, _ in answers]
