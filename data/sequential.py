"""Shards read from their first token to their last, in the batch order of modded-nanoGPT's loaders.

A step takes the next global batch of a shard, sequence after sequence; when less than a batch and two tokens remain of a
shard, the next one begins. Rank r has the r-th part of each batch. Nothing is shuffled, so the seed does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data.loader import Loader, Tokens
from polargrad_dist.errors import DataError
from polargrad_dist.words import counted


@dataclass(frozen=True)
class SequentialLoader(Loader):
    """This rank's micro-batches; after the last shard comes the first again."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            longest = max(map(len, self.tokens.shards), default=0)
            raise DataError(
                f"the longest training shard holds {counted(longest, 'token')}, too few for one "
                f"batch of {self.tokens_per_step:,} and two more with data.order 'sequential': lower "
                "trainer.global_batch, or set data.order to 'shuffled'"
            )
        super().__post_init__()

    @cached_property
    def _shards(self) -> list[Tokens]:
        return [Tokens([shard]) for shard in self.tokens.shards]

    @cached_property
    def _ends(self) -> np.ndarray:
        """Steps up to the end of each shard: the batch at p needs p + batch + 1 < tokens."""
        steps = [max(0, -(-(len(shard) - 1) // self.tokens_per_step) - 1) for shard in self.tokens.shards]
        return np.cumsum(steps, dtype=np.int64)

    @property
    def num_samples(self) -> int:
        """Samples per epoch."""
        return int(self._ends[-1]) * self.global_batch if len(self._ends) else 0

    def places(self, samples: np.ndarray) -> list[tuple[Tokens, int]]:
        """The shard and the window that each sample index reads."""
        steps, within = np.divmod(samples % self.num_samples, self.global_batch)
        shards = np.searchsorted(self._ends, steps, side="right")
        firsts = np.concatenate([[0], self._ends[:-1]])[shards]
        windows = (steps - firsts) * self.global_batch + within
        return [
            (self._shards[shard], window)
            for shard, window in zip(shards.tolist(), windows.tolist(), strict=True)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able: everything that determines the tokens of a sample index, including the batch."""
        return super().fingerprint() | {"order": "sequential", "global_batch": self.global_batch}
