"""Runs the coroutines of a step: each is resumed with what the collective that it started last has brought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from polargrad_dist.distributed.transport import Started
from polargrad_dist.optim.batch import Batch
from polargrad_dist.optim.facts import Facts


def run(
    batches: Sequence[Batch], orders: Sequence[Sequence[int]], facts: Facts, between: Callable[[], None]
) -> None:
    """Resumes the buckets in the first order, which brings some to a pause, calls ``between``, then takes the second."""
    running = [batch.run(facts) for batch in batches]
    started: list[Started | None] = [None] * len(running)
    for order in orders:
        for number in order:
            on_its_way, started[number] = started[number], None
            arrived = None if on_its_way is None else on_its_way.wait()
            del on_its_way  # and what it was sent from
            with suppress(StopIteration):  # it has come to its end
                started[number] = running[number].send(arrived)  # type: ignore[arg-type]
            del arrived
        if order is orders[0]:
            between()
