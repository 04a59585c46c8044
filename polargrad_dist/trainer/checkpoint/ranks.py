"""Agreement between ranks about files: all ranks learn what one finds before any acts on it; and which rank writes what."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from polargrad_dist.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """This run's ranks on a separate gloo group; a single process has no group and sends no messages.

    On training's own group, background saves would interleave their collectives with training's, and hang.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if self.world > 1 else None

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, doing: str, fn: Callable[[], T]) -> list[T]:
        """Every rank's ``fn()``, in rank order; an error on one rank is raised as CheckpointError on all."""
        value, error = None, None
        try:
            value = fn()
        except CheckpointError as caught:
            error = str(caught)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        everyone = self.gather((value, error))
        for rank, (_, error) in enumerate(everyone):
            if error is not None:
                raise CheckpointError(f"{doing}: {error}" + (f" (rank {rank})" if self.world > 1 else ""))
        return [value for value, _ in everyone]  # type: ignore[misc]

    def on_rank_0(self, doing: str, fn: Callable[[], T]) -> T:
        """Rank 0's ``fn()``, or its error, on every rank."""
        return self.together(doing, lambda: fn() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def close(self) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None


def deal(held: tuple[dict[str, int], ...]) -> list[set[str]]:
    """Which rank writes which plain tensor, given each rank's names and their bytes; one set per rank.

    Tensors on a single rank come first; the others, largest first, go to the least loaded rank that holds them.
    """
    holders: dict[str, list[int]] = {}
    for rank, names in enumerate(held):
        for name in names:
            holders.setdefault(name, []).append(rank)
    load, mine = [0] * len(held), [set[str]() for _ in held]
    for name in sorted(holders, key=lambda n: (len(holders[n]) > 1, -held[holders[n][0]][n], n)):
        rank = min(holders[name], key=lambda r: (load[r], r))
        load[rank] += held[rank][name]
        mine[rank].add(name)
    return mine


def cause(error: BaseException) -> str:
    """The error of the first rank that failed, in one line."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        first = min(error.failures)
        ranks = f" (rank {', '.join(map(str, sorted(error.failures)))})" if dist.is_initialized() else ""
        return cause(error.failures[first][0]) + ranks
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
