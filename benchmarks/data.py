"""Speed of data loading and preparation: `python -m benchmarks.data [--json FILE] [--megabytes 20]`.

(c) The loader alone, including its background thread, in tokens per second of one core, against a plain torch DataLoader over
the same memory-mapped shard. (d) data.prepare, from JSON lines to finished shards, against `datasets.map` with the same
tokenizer, which starts from a data set already in Arrow format; two workers each.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Row, arguments, interleaved, report
from data.config import DataConfig, TokenizerConfig
from data.loader import Loader, Tokens
from data.prepare import prepare
from data.shards import Manifest, open_shard, write_shard
from data.sources import open_source

WORKERS = 2


def quiet(_: str) -> None:
    pass


class Windows(torch.utils.data.Dataset):
    """The usual hand-written map-style data set over one memory-mapped shard."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * self.length
        row = torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))
        return row[:-1], row[1:]


def loading(folder: Path, rounds: int, tokens: int = 8_000_000) -> list[Row]:
    """(c) Tokens per second of CPU time of all threads together: the speed of one core."""
    rng = np.random.default_rng(0)
    write_shard(folder / "train.bin", rng.integers(0, 50257, 50_000_000, np.uint16))
    shard = open_shard(folder / "train.bin")
    rows = []
    for length, micro_batch in ((1024, 8), (512, 8), (256, 16)):
        count = tokens // (length * micro_batch)
        ours = Loader(Tokens([shard]), length, micro_batch, micro_batch, 0, 1, 0, prefetch=4)
        theirs = torch.utils.data.DataLoader(Windows(shard, length), micro_batch, shuffle=True)
        seconds = interleaved(
            {"ours": take(ours.batches, count), "DataLoader": take(lambda d=theirs: iter(d), count)}, rounds
        )
        rate = {name: count * length * micro_batch / s / 1e6 for name, s in seconds.items()}
        rows.append(
            Row(
                f"(c) loader, sequences of {length}, micro-batch {micro_batch}",
                f"{rate['ours']:.0f} M tokens/s",
                f"torch DataLoader {rate['DataLoader']:.1f} M tokens/s",
                rate["ours"] / 20,
                "≥ 1.0 of 20 M tokens/s",
                "per core second",
            )
        )
    return rows


def take(start: Callable, count: int) -> Callable[[], None]:
    """Reads ``count`` batches from a fresh iterator and closes it."""

    def run() -> None:
        batches = start()
        for _ in itertools.islice(batches, count):
            pass
        getattr(batches, "close", lambda: None)()

    return run


def preparing(folder: Path, rounds: int, megabytes: float) -> list[Row]:
    """(d) From the same JSON lines to tokens, with two workers."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    os.environ["HF_DATASETS_CACHE"] = str(folder / "hf")
    corpus = folder / "corpus.jsonl"
    size = write_corpus(corpus, int(megabytes * 1e6))
    settings = DataConfig(
        source="files",
        paths=[str(corpus)],
        tokenizer=TokenizerConfig(vocab_size=8192),
        validation_fraction=0.0,
        cache=str(folder / "cache"),
        workers=WORKERS,
    )
    # Trains the tokenizer, which both use.
    first = prepare(settings, folder / "first", quiet)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(first / "tokenizer.json"))
    rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(folder / "hf"))
    numbers = itertools.count()

    def ours() -> None:
        prepare(settings, folder / f"out-{next(numbers)}", quiet)

    def theirs() -> None:
        rows.map(
            lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
            batched=True,
            num_proc=WORKERS,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
        )

    seconds: dict[str, list[float]] = {"ours": [], "map": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("map", theirs)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    tokens = sum(shard.tokens for shard in Manifest.load(first).train)
    return [
        Row(
            f"(d) data.prepare, {size / 1e6:.0f} MB of JSON lines, {WORKERS} workers",
            f"{size / median['ours'] / 1e6:.2f} MB/s",
            f"datasets.map {size / median['map'] / 1e6:.2f} MB/s",
            median["map"] / median["ours"],
            "≥ 1.0",
            f"{tokens:,} tokens; ours from text to synced shards, theirs from Arrow to Arrow",
        )
    ]


def write_corpus(path: Path, size: int) -> int:
    """Writes the built-in corpus, repeated until it reaches ``size`` bytes; returns the bytes of text."""
    documents = [part.text for part in open_source(DataConfig()).documents()]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in itertools.cycle(documents):
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= size:
                return written
    raise AssertionError("unreachable: the corpus cycles")


def main() -> None:
    parser = arguments("The speed of the loader and of preparing shards.")
    parser.add_argument("--megabytes", type=float, default=20, help="text to prepare in (d)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rows = loading(Path(name), options.rounds)
        rows += preparing(Path(name), options.rounds, options.megabytes)
    report("Data", rows, options.json)


if __name__ == "__main__":
    main()
