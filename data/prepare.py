"""Turns text into token shards: `python -m data.prepare --source files --paths '["*.jsonl"]' --out FOLDER …`.

Text is read in a fixed order, tokenized by several threads (the tokenizers work outside Python), and written in the same
order, so the shards do not depend on the number of threads. After each shard ``progress.json`` records the position in the
corpus, so that an interrupted preparation continues there; a folder with a manifest is complete. Every document begins with
end-of-text, as in modded-nanoGPT's shards.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig
from data.documents import PART_CHARACTERS, Part, Source
from data.files import digest, folder_lock, make_folder, read_json, write_atomically, write_json
from data.gauge import Gauge
from data.shards import (
    MANIFEST,
    Manifest,
    Shard,
    check_fields,
    token_dtype,
    write_shard,
)
from data.sources import open_source
from data.tokenizers import Tokenizer, open_tokenizer
from polargrad_dist.arguments import read_arguments, safe_parser
from polargrad_dist.errors import ConfigError, DataError
from polargrad_dist.words import counted

CHUNK_BYTES = 2**20
# Limit of text that is being tokenized or not yet written
AHEAD_BYTES = 2**25
PROGRESS = "progress.json"
Report = Callable[[str], None]


def say(message: str) -> None:
    """Prints a line to stderr."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        # A lost terminal does not stop preparation
        print(message, file=sys.stderr, flush=True)


def prepare(
    config: DataConfig, out: Path | None = None, report: Report = say, tokenizer: Tokenizer | None = None
) -> Path:
    """Tokenizes the configured corpus, and returns the folder of its shards, complete and with a manifest.

    ``out``: the folder; None for one in ``config.cache`` named by a hash of everything that changes a token. Existing shards
    are kept. ``tokenizer``: an open tokenizer, instead of the configured one. Raises DataError or ConfigError.
    """
    if config.sources:
        raise ConfigError(
            "data.sources is a mixture, whose sources are prepared one by one when a run starts, expected one corpus: use "
            "data.source"
        )
    source = open_source(config, report)
    report(source.describe())
    tokenizer = tokenizer or open_tokenizer(config.tokenizer, source, Path(config.cache) / "tokenizers")
    inputs = source.identity() | {
        "pieces": PART_CHARACTERS,
        "tokenizer": tokenizer.info.hash,
        "end_of_text": tokenizer.info.end_of_text,
        "shard_tokens": config.shard_tokens,
        "max_tokens": config.max_tokens,
    }
    folder = out or Path(config.cache) / f"{config.source}-{digest(inputs)[:16]}"
    make_folder(folder)
    with folder_lock(folder):
        if (folder / MANIFEST).exists():
            _same(folder / MANIFEST, Manifest.load(folder).inputs, inputs)
            report(f"prepared already: {folder}")
            return folder
        _write_shards(config, source, tokenizer, inputs, folder, report)
    return folder


def _same(path: Path, found: dict[str, Any], inputs: dict[str, Any]) -> None:
    for key in inputs:
        if found.get(key) != inputs[key]:
            raise ConfigError(
                f"{path} was made from other inputs ({key}: {_short(found.get(key))} there, {_short(inputs[key])} here), "
                "expected the same: choose another folder, or delete this one"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


@dataclass
class Progress:
    """How far a corpus is prepared: the first ``parts`` of its documents are in the shards named here."""

    parts: int = 0
    cursor: Any = None
    """The source's own position at that point."""
    train: list[Shard] = field(default_factory=list)
    validation: list[Shard] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path, inputs: dict[str, Any]) -> Progress:
        path = folder / PROGRESS
        if not path.exists():
            return cls()
        raw = read_json(path)
        try:
            check_fields(raw["inputs"], {})
            _same(path, raw["inputs"], inputs)
            shards = ([Shard.read(s) for s in raw[split]] for split in ("train", "validation"))
            return cls(int(raw["pieces"]), raw["cursor"], *shards)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error!r}): delete {folder} and prepare again") from error

    def save(self, folder: Path, inputs: dict[str, Any]) -> None:
        saved = asdict(self) | {"inputs": inputs}
        # The count's name in the file, and in the folder's key, stays that of earlier versions, whose folders still go on.
        write_json(folder / PROGRESS, {"pieces": saved.pop("parts")} | saved)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.train)


@dataclass
class Buffer:
    """Tokens of one split that are not yet in a shard."""

    arrays: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0

    def add(self, part: Part, ids: np.ndarray, end_of_text: np.ndarray) -> None:
        self.arrays += [end_of_text, ids] if part.begins else [ids]
        self.tokens += len(ids) + part.begins
        self.documents += part.begins
        self.text_bytes += part.size

    def write(self, path: Path) -> Shard:
        return write_shard(
            path, np.concatenate(self.arrays), documents=self.documents, text_bytes=self.text_bytes
        )


def _write_shards(
    config: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    inputs: dict[str, Any],
    folder: Path,
    report: Report,
) -> None:
    progress = Progress.load(folder, inputs)
    if progress.parts:
        report(
            f"continuing after {counted(progress.parts, 'part')} of documents and {counted(len(progress.train), 'shard')} "
            f"in {folder}"
        )
    dtype = token_dtype(tokenizer.info.vocab_size)
    end_of_text = np.array([tokenizer.info.end_of_text], dtype)
    limit = config.max_tokens or sys.maxsize
    buffers = {"train": Buffer(), "validation": Buffer()}
    done, cursor = progress.parts, progress.cursor

    def flush() -> None:
        for split, buffer in buffers.items():
            if buffer.tokens:
                shards = getattr(progress, split)
                shards.append(buffer.write(folder / f"{split}-{len(shards):05}.bin"))
                report(f"wrote {folder / shards[-1].name}: {counted(buffer.tokens, 'token')}")
                buffers[split] = Buffer()
        progress.parts, progress.cursor = done, cursor
        progress.save(folder, inputs)

    gauge = Gauge(source.size, config.max_tokens, report, progress.tokens)
    chunks = _chunks(source, progress.parts, progress.cursor)
    with (
        contextlib.closing(gauge),
        contextlib.closing(_tokenized(chunks, tokenizer, config.workers or _cores(), dtype)) as tokenized,
    ):
        while progress.tokens + buffers["train"].tokens < limit:
            if (chunk := next(tokenized, None)) is None:
                break
            for part, ids in zip(chunk.parts, chunk.ids, strict=True):
                buffers["validation" if part.validation else "train"].add(part, ids, end_of_text)
            done, cursor = done + len(chunk.parts), chunk.cursor
            gauge.show(chunk.position, progress.tokens + buffers["train"].tokens)
            if buffers["train"].tokens >= config.shard_tokens:
                flush()
    if any(buffer.tokens for buffer in buffers.values()):
        flush()
    if not progress.train:
        raise DataError(
            f"the corpus ({source.describe()}) holds no training text: add text, or lower data.validation_fraction"
        )
    info = tokenizer.info
    if (text := tokenizer.json()) is not None:
        write_atomically(folder / "tokenizer.json", text.encode())
    manifest = Manifest(inputs, asdict(info), tuple(progress.train), tuple(progress.validation))
    manifest.save(folder)
    held = sum(shard.tokens for shard in progress.validation)
    if not held and config.validation_fraction:
        report(
            "no text fell into the validation split: raise data.validation_fraction, set data.validation_paths, or raise "
            "data.max_tokens (the validation part of plain text is its end)"
        )
    parts = f"{progress.tokens:,} training and {held:,} validation" if held else f"{progress.tokens:,}"
    report(f"prepared {parts} tokens in {folder}")


@dataclass
class Chunk:
    """About 1 MiB of text on its way from the source to a shard."""

    parts: list[Part]
    cursor: Any
    position: int
    ids: list[np.ndarray] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def portions(self) -> Iterator[list[str]]:
        """Its texts in batches of about 1 MiB, which bound the tokenizer's memory."""
        lot: list[str] = []
        size = 0
        for part in self.parts:
            lot.append(part.text)
            size += part.size
            if size >= CHUNK_BYTES:
                yield lot
                lot, size = [], 0
        if lot:
            yield lot


def _tokenized(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, threads: int, dtype: np.dtype
) -> Generator[Chunk, None, None]:
    """Yields the chunks with their ids, in order, while further ones are being tokenized."""

    def work(chunk: Chunk) -> Chunk:
        for texts in chunk.portions():
            chunk.ids += tokenizer.encode_batch(texts, dtype)
        return chunk

    waiting: deque[Future[Chunk]] = deque()
    sizes: deque[int] = deque()
    with _one_thread_each(), ThreadPoolExecutor(threads, thread_name_prefix="tokenize") as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(work, chunk))
                sizes.append(chunk.size)
                while len(waiting) > 2 * threads or (len(waiting) > 1 and sum(sizes) > AHEAD_BYTES):
                    sizes.popleft()
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Turns off the tokenizers' own threads, which would compete with ours: each of ours tokenizes a chunk."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _chunks(source: Source, start: int, cursor: Any) -> Iterator[Chunk]:
    parts: list[Part] = []
    size = 0
    for part in source.documents(start, cursor):
        parts.append(part)
        size += part.size
        if size >= CHUNK_BYTES and part.ends:
            yield Chunk(parts, source.cursor(), source.position)
            parts, size = [], 0
    if parts:
        yield Chunk(parts, source.cursor(), source.position)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(args: list[str]) -> tuple[DataConfig, Path | None]:
    """The configuration and the output folder of a command line. Raises ConfigError."""
    from jsonargparse import ArgumentError

    parser = safe_parser(prog="python -m data.prepare", description="Tokenize a corpus into .bin shards.")
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument("--run", type=str, help="YAML file of a training run whose data section to prepare")
    parser.add_argument("--out", type=str, help="folder for the shards; default: one in --cache")
    parser.add_class_arguments(DataConfig)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--run", type=Path)
    run = first.parse_known_args(args)[0].run
    try:
        parsed = read_arguments(parser, [*(_data_of(run) if run else []), *args])
    except ArgumentError as error:
        raise ConfigError(_with_nearest_key(" ".join(str(error).split()), parser.get_defaults())) from None
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built = build(parsed)
    config = DataConfig(**{name: built[name] for name in DataConfig.__dataclass_fields__})
    return config, Path(parsed.out) if parsed.out else None


def _with_nearest_key(message: str, defaults: Any) -> str:
    """The parser's message; for an unknown key, with the nearest valid one."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|Option '([\w.]+)' is not accepted", message)
    if unknown is None:
        return message
    name = unknown[1] or unknown[2]
    nearest = difflib.get_close_matches(name, defaults.keys(), n=1, cutoff=0.3)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "see --help for the keys"
    return f"there is no key {name!r}: {hint}"


def _data_of(run: Path) -> list[str]:
    """The data section of a run's YAML as command-line arguments, which later ones override."""
    import yaml

    try:
        content = yaml.safe_load(run.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--run {run} cannot be read as YAML: {error}") from error
    section = content.get("data") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"--run {run} has no data section, expected the YAML file of a training run")
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in section.items()
    ]


def main() -> int:
    # So that a file-size limit raises an error instead
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        folder = prepare(*parse(sys.argv[1:]))
    except (DataError, ConfigError) as error:
        say(f"data.prepare: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("data.prepare: interrupted; run the same command again to continue")
        return 130
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
