"""Several corpora in fixed shares: the source of a sample depends only on its index and the weights.

Weights become whole numbers over a common denominator D. Of the first i samples, for any i, source k has i·w_k/D to within
less than one, and exactly w_k of each D (the source that is furthest behind comes next: the chairman assignment of Tijdeman
1980). So shares do not depend on the world size, and the position of a run remains a single number.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from data.documents import Part, Source
from data.loader import Loader, Tokens, permutation
from polargrad_dist.errors import ConfigError, DataError
from polargrad_dist.words import counted

# Longest period of the order of sources, in samples
MOST = 1_000_000


def shares(weights: list[float]) -> list[int]:
    """The weights as coprime whole numbers. Raises ``ConfigError`` if their sum would exceed `MOST`."""
    if bad := [w for w in weights if not (math.isfinite(w) and w > 0)]:
        raise ConfigError(f"data.sources has the weight {bad[0]}, expected a finite number > 0")
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    parts = [weight / total for weight in exact]
    denominator = math.lcm(*(part.denominator for part in parts))
    if denominator > MOST:
        raise ConfigError(
            f"data.sources has weights {weights}, exact only over {denominator:,} samples, expected at most {MOST:,}: "
            f"round them"
        )
    return [int(part * denominator) for part in parts]


class Dealing:
    """Maps sample indices to sources, and to indices within each source."""

    def __init__(self, counts: list[int]):
        """counts: whole-number shares, see `shares`."""
        self.counts = np.array(counts, dtype=np.int64)
        self.period = int(self.counts.sum())
        self._source = _dealt(counts)
        # Samples of the same source earlier in the period
        self._before = np.empty(self.period, dtype=np.int64)
        for k in range(len(counts)):
            here = self._source == k
            self._before[here] = np.arange(int(here.sum()))

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, index within the source) of sample indices (n,) int64."""
        rounds, at = np.divmod(samples, self.period)
        source = self._source[at]
        return source, rounds * self.counts[source] + self._before[at]


def _dealt(counts: list[int]) -> np.ndarray:
    """(D,) int64: the source of each sample of a period.

    Source k's j-th sample may come once its share allows it, and must come by ⌈j·D/w_k⌉: among those allowed, the one with
    the earliest deadline is next.
    """

    period = sum(counts)
    # (first allowed place, source)
    waiting: list[tuple[int, int]] = [(0, k) for k in range(len(counts))]
    # (last allowed place, source)
    ready: list[tuple[int, int]] = []
    done = [0] * len(counts)
    out = np.empty(period, dtype=np.int64)
    heapq.heapify(waiting)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, k = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(done[k] + 1) * period // counts[k]), k))
        _, k = heapq.heappop(ready)
        out[place] = k
        done[k] += 1
        if done[k] < counts[k]:
            heapq.heappush(waiting, (done[k] * period // counts[k], k))
    return out


@dataclass(frozen=True)
class MixedLoader(Loader):
    """A `Loader` over several sources, each with its own order and epochs. ``tokens`` is their concatenation."""

    parts: tuple[Tokens, ...] = ()
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    _dealing: Dealing = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, part in zip(self.names, self.parts, strict=True):
            if self._windows(part) < 1:
                raise DataError(
                    f"data.sources: {name} holds {counted(len(part), 'token')}, too few for one sequence of "
                    f"{self.sequence_length}: lower trainer.sequence_length, or add text"
                )
        object.__setattr__(self, "_dealing", Dealing(list(self.counts)))

    def _windows(self, part: Tokens) -> int:
        return max(0, (len(part) - 1) // self.sequence_length)

    @property
    def num_samples(self) -> int:
        """Sequences of all sources; those of a small source with a large weight repeat before all others have been read."""
        return sum(map(self._windows, self.parts))

    def places(self, samples: np.ndarray) -> list[tuple[Tokens, int]]:
        """Source and window of each sample index."""
        sources, indices = self._dealing(samples)
        windows = np.empty_like(samples)
        for k, part in enumerate(self.parts):
            size = self._windows(part)
            mine = sources == k
            for epoch in np.unique(indices[mine] // size):
                chosen = mine & (indices // size == epoch)
                key = (k << 96) + (self.seed << 32) + int(epoch)
                windows[chosen] = permutation(indices[chosen] % size, size, key)
        return [(self.parts[k], window) for k, window in zip(sources.tolist(), windows.tolist(), strict=True)]

    def epochs(self, samples: int) -> dict[str, float]:
        """The epochs of each source after ``samples`` samples."""
        total = sum(self.counts)
        return {
            name: samples * count / total / self._windows(part)
            for name, count, part in zip(self.names, self.counts, self.parts, strict=True)
        }


class MixedText:
    """The beginnings of several corpora, each according to its share: the training text of the mixture's tokenizer."""

    size: int | None = None
    position = 0

    def __init__(self, sources: list[Source], counts: list[int], limit: int):
        """limit: bytes of training text from all sources together."""
        self._sources, self._counts, self._limit = sources, counts, limit

    def identity(self) -> dict[str, Any]:
        parts = [
            [source.identity(), count] for source, count in zip(self._sources, self._counts, strict=True)
        ]
        return {"source": "mixture", "parts": parts}

    def describe(self) -> str:
        return "; ".join(source.describe() for source in self._sources)

    def cursor(self) -> None:
        return None

    def documents(self, start: int = 0, cursor: Any = None) -> Iterator[Part]:
        for source, count in zip(self._sources, self._counts, strict=True):
            left = self._limit * count // sum(self._counts)
            for part in source.documents():
                if left <= 0:
                    break
                if not part.validation:
                    yield part
                    left -= part.size
