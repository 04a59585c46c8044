"""Samples from token shards, in an order that depends only on (seed, sample index).

Window j of an epoch is tokens [jT, jT + T + 1) of the concatenated shards. Epoch e visits the N windows in the order of a
keyed permutation (a Feistel network on the smallest square domain, walked until it lands below N: Black and Rogaway 2002),
which needs no table, however large N is.
"""

from __future__ import annotations

import bisect
import itertools
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.checksums import Background
from polargrad_dist.errors import ConfigError, DataError
from polargrad_dist.words import counted

if TYPE_CHECKING:
    import torch

Batch = tuple["torch.Tensor", "torch.Tensor"]
_ROUNDS = 6
_PERMUTED_AT_ONCE = 1024
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Tokens:
    """Concatenated shards; memory-mapped."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self.shards = list(shards)
        self.ends = list(itertools.accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, first: int, count: int) -> np.ndarray:
        """``count`` tokens from ``first`` on, across shard boundaries."""
        index = bisect.bisect_right(self.ends, first)
        offset = first - (self.ends[index - 1] if index else 0)
        parts = []
        while count > 0:
            part = self.shards[index][offset : offset + count]
            parts.append(part)
            count, index, offset = count - len(part), index + 1, 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def permutation(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Applies the keyed permutation of range(size) to ``indices`` (int64)."""
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    out = np.empty(len(indices), dtype=np.int64)
    left, at = indices.astype(np.uint64), np.arange(len(indices))
    while len(left):
        left = _feistel(left, np.uint64(half), low, keys)
        inside = left < np.uint64(size)
        out[at[inside]] = left[inside].astype(np.int64)
        left, at = left[~inside], at[~inside]
    return out


def _feistel(x: np.ndarray, half: np.uint64, low: np.uint64, keys: np.ndarray) -> np.ndarray:
    a, b = x >> half, x & low
    for key in keys:
        mixed = (b ^ key) * _MIX
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
        a, b = b, a ^ (mixed & low)
    return (a << half) | b


@dataclass(frozen=True)
class Loader:
    """This rank's micro-batches of the training data. Batch sizes count samples (sequences)."""

    tokens: Tokens
    sequence_length: int
    global_batch: int
    micro_batch: int
    rank: int
    world: int
    seed: int
    prefetch: int = 4
    description: Any = None
    background: Background | None = None

    def __post_init__(self) -> None:
        if self.global_batch % (self.world * self.micro_batch):
            raise ConfigError(
                f"the global batch is {self.global_batch}, expected a multiple of world size x micro-batch = "
                f"{self.world} x {self.micro_batch}"
            )
        if self.num_samples < 1:
            raise DataError(
                f"the training data has {counted(len(self.tokens), 'token')}, too few for one sequence of "
                f"{self.sequence_length}: lower trainer.sequence_length, or add text"
            )

    @property
    def num_samples(self) -> int:
        """Samples per epoch."""
        return max(0, (len(self.tokens) - 1) // self.sequence_length)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.sequence_length

    def sample_indices(self, step: int) -> np.ndarray:
        """The sample indices of this rank in a step, int64."""
        return self._share(step * self.global_batch)

    def _share(self, sample: int) -> np.ndarray:
        share = self.global_batch // self.world
        return sample + self.rank * share + np.arange(share)

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """The window of each sample index: sample i is in epoch i // N."""
        epochs = samples // self.num_samples
        out = np.empty_like(samples)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = (self.seed << 32) + int(epoch)
            out[chosen] = permutation(samples[chosen] % self.num_samples, self.num_samples, key)
        return out

    def places(self, samples: np.ndarray) -> list[tuple[Tokens, int]]:
        """The tokens and the window that each sample index reads."""
        return [(self.tokens, window) for window in self.windows(samples).tolist()]

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Micro-batches (tokens, targets), each (b, T) int64, from a step on, endlessly."""
        return self.batches_from(start_step * self.global_batch)

    def batches_from(self, sample: int) -> Iterator[Batch]:
        """The same from any sample index on, which is the position of a run at any batch size."""
        if self.background is not None:
            self.background.start()
        made = self._batches(sample)
        return _Ahead(made, self.prefetch) if self.prefetch else made

    def _batches(self, sample: int) -> Iterator[Batch]:
        length, share = self.sequence_length, self.global_batch // self.world
        # Steps whose windows are computed at once
        ahead = max(1, _PERMUTED_AT_ONCE // share)
        while True:
            steps = sample + self.global_batch * np.arange(ahead)[:, None]
            places = self.places((steps + self._share(0)).ravel())
            for first in range(0, len(places), self.micro_batch):
                if self.background is not None:
                    self.background.raise_if_found()
                rows = np.empty((self.micro_batch, length + 1), dtype=np.int64)
                for row, (tokens, window) in zip(rows, places[first : first + self.micro_batch], strict=True):
                    row[:] = tokens.read(window * length, length + 1)
                yield _pair(rows)
            sample += ahead * self.global_batch

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able: everything that determines the tokens of a sample index."""
        return {**(self.description or {}), "sequence_length": self.sequence_length, "seed": self.seed}


def _pair(rows: np.ndarray) -> Batch:
    """Tokens and targets of rows (b, T + 1) int64; in pinned memory if this process uses a GPU, so that copies overlap."""
    import torch

    pair = (torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy()))
    return (pair[0].pin_memory(), pair[1].pin_memory()) if torch.cuda.is_initialized() else pair


def _device() -> int | None:
    """The GPU of this process; None without one."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


class _Ahead:
    """An iterator with a background thread that prefetches items. `close`, or deleting it, ends the thread."""

    def __init__(self, made: Iterator[Batch], depth: int):
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        # The thread must not reference this object, or deleting it would leave the thread running.
        self._thread = threading.Thread(
            target=_fill, args=(made, self._queue, self._stop, _device()), daemon=True, name="loader"
        )
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def _fill(
    made: Iterator[Any], into: queue.Queue[Any], stop: threading.Event, device: int | None = None
) -> None:
    # A new thread uses the first GPU, where pinning would take memory for every rank
    if device is not None:
        import torch

        torch.cuda.set_device(device)

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return into.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        while not stop.is_set():
            put(next(made))
    except BaseException as error:
        put(error)


@dataclass(frozen=True)
class ValidationSet:
    """A fixed set of targets, each on exactly one rank; every rank has the same number of batches. Targets of -100 are
    padding."""

    tokens: Tokens
    sequence_length: int
    micro_batch: int
    rank: int
    world: int
    num_targets: int
    bytes_per_token: float | None

    def batches(self) -> Iterator[Batch]:
        """(tokens, targets), each (b, T) int64; on some ranks the last ones may hold no targets."""
        length = self.sequence_length
        windows = -(-self.num_targets // length)
        per_round = self.micro_batch * self.world
        for start in range(0, windows, per_round):
            rows = np.zeros((self.micro_batch, length + 1), dtype=np.int64)
            known = np.zeros((self.micro_batch, length), dtype=bool)
            for row in range(self.micro_batch):
                window = start + self.rank * self.micro_batch + row
                count = min(length, self.num_targets - window * length)
                if count > 0:
                    rows[row, : count + 1] = self.tokens.read(window * length, count + 1)
                    known[row, :count] = True
            tokens, targets = _pair(rows)
            yield tokens, targets.masked_fill(~_mask(known), -100)

    def targets(self) -> np.ndarray:
        """The targets, preceded by the token before them: (num_targets + 1,)."""
        return self.tokens.read(0, self.num_targets + 1)


def _mask(known: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(known)
