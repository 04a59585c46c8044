"""Buckets of parameters that are stepped together, and the order in which all ranks start and await their collectives.

Equal bucket order is not enough: with two buckets in flight and overlapping groups, a rank that has no part in a bucket would
start a later one before its peers do, and collectives on a shared group would be paired wrongly. So every rank computes the
list of (bucket, stage) over all buckets of all meshes, and runs its own entries in that order.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from polargrad_dist.distributed.layout import volume
from polargrad_dist.distributed.plan import Entry

# Buckets in flight at a time.
WINDOW = 2
# An owner computes 1/SHARE of the bucket's bytes at a time; the rest covers the other memory of a step.
SHARE = 4
# Without copies, at least this many rows of a tall matrix are multiplied at a time.
ROWS = 4096


@dataclass(frozen=True)
class Item:
    """A parameter, by its number in the list of entries, or the slices ``first`` to ``last`` of a stack of matrices."""

    entry: int
    first: int
    last: int


@dataclass(frozen=True)
class Portion:
    """What is stepped and sent to copies at a time: some items of a bucket, some rows of each item's shard."""

    items: slice
    rows: slice


@dataclass
class Bucket:
    """Parameters that are communicated together: of one kind, group, shape, dtype, layout and split."""

    items: list[Item]
    like: Entry
    portions: list[Portion]

    @property
    def shares(self) -> bool:
        """Whether an all-gather updates the copies."""
        return self.like.layout.copies > 1 and self.like.layout.cut is not None

    @property
    def stages(self) -> tuple[int, int]:
        """How often its coroutine is resumed before the sums over all ranks are known, and after."""
        travels = self.like.kind == "tall" or (self.like.kind == "owner" and self.like.travels)
        alone = self.like.layout.world == 1
        before, after = (
            0 if alone else 2 * travels + self.like.centred,
            0 if alone else self.shares * len(self.portions),
        )
        return (1 + before, 1 + after) if self.like.pauses else (1 + before + after, 0)


def in_buckets(entries: Sequence[Entry], present: Sequence[bool], limit: int) -> list[Bucket]:
    """The buckets of the parameters that have gradients, so that a step needs about three times ``limit`` bytes.

    Tall matrices come first, because their small problems are in flight while others compute; then elementwise parameters,
    then matrices, the largest first.
    """
    limit = max(1, limit // SHARE)
    alike: dict[tuple, list[int]] = defaultdict(list)
    for number, (e, here) in enumerate(zip(entries, present, strict=True)):
        if not here:
            continue
        key: tuple = (e.kind, e.ranks, e.group, e.dtype)
        if e.kind == "tall":
            key += (number,)
        elif e.kind == "owner" or e.layout.cut is not None:
            key += (e.shape, e.layout, e.split, e.travels if e.kind == "owner" else False)
        alike[key].append(number)
    buckets = []
    for numbers in alike.values():
        for items in _filled(entries, numbers, limit):
            like = entries[items[0].entry]
            if like.kind == "owner" and len(like.owners) == 1:
                items.sort(key=lambda item: entries[item.entry].owners)
            buckets.append(Bucket(items, like, _portions(items, like, limit)))
    rank = {"tall": 0, "elementwise": 1, "owner": 2}
    buckets.sort(key=lambda b: (rank[b.like.kind], -b.like.cost, b.like.name, b.items[0].first, b.like.ranks))
    return buckets


def _filled(entries: Sequence[Entry], numbers: list[int], limit: int) -> list[list[Item]]:
    """Distributes parameters of one kind over buckets, as items."""
    like = entries[numbers[0]]
    if like.kind != "owner":
        items = [Item(number, 0, 1) for number in numbers]
        if like.kind == "elementwise" and like.layout.cut is not None:
            count = max(1, limit // max(1, like.bytes))
            return [items[i : i + count] for i in range(0, len(items), count)]
        return [items]
    assert like.split is not None
    buckets: list[list[Item]] = []
    loads: dict[int, int] = defaultdict(int)
    per_slice = len(like.costs) // like.split.stack
    for number in sorted(numbers, key=lambda i: entries[i].name):
        e = entries[number]
        slabs = _slabs(e, limit)
        for first, last in slabs:
            added: dict[int, int] = defaultdict(int)
            for i in range(first * per_slice, last * per_slice):
                added[e.owners[i]] += math.prod(like.split.stored_shape(i)) * e.itemsize
            if (
                not buckets
                or len(slabs) > 1
                or any(loads[t] + n > limit for t, n in added.items() if loads[t])
            ):
                buckets.append([])
                loads.clear()
            for t, size in added.items():
                loads[t] += size
            buckets[-1].append(Item(number, first, last))
    return buckets


def _slabs(e: Entry, limit: int) -> list[tuple[int, int]]:
    """Ranges of slices of a stack whose matrices fit into a bucket; the whole stack if it is sharded by slices."""
    assert e.split is not None
    stack = e.split.stack
    whole = all(box[0] == (0, stack) for box in e.rectangles)
    if stack == 1 or not whole:
        return [(0, stack)]
    at_once = max(1, limit * e.layout.world * stack // e.bytes)
    return [(first, min(stack, first + at_once)) for first in range(0, stack, at_once)]


def _portions(items: list[Item], like: Entry, limit: int) -> list[Portion]:
    """Divides a bucket into what is sent to copies at a time: several items, or some rows of one."""
    copies, itemsize = like.layout.copies, like.itemsize
    rows = max(last - first for _, (first, last), _ in like.rectangles)
    if copies == 1 or like.layout.cut is None:
        if like.kind != "tall":
            return [Portion(slice(0, len(items)), slice(0, rows))]
        step = max(ROWS, limit // (like.itemsize * like.shape[-1]))
        return [Portion(slice(0, 1), slice(at, at + step)) for at in range(0, max(rows, 1), step)]
    part = (items[0].last - items[0].first) / (like.split.stack if like.split is not None else 1)
    size = copies * max(map(volume, like.layout.shards)) * itemsize * part
    if size > limit and len(items) == 1 and (items[0].last - items[0].first == 1 or like.split is None):
        step = max(1, int(rows * limit // size))
        return [Portion(slice(0, 1), slice(at, min(rows, at + step))) for at in range(0, rows, step)]
    count = max(1, int(limit // max(1.0, size)))
    return [
        Portion(slice(i, min(i + count, len(items))), slice(0, rows)) for i in range(0, len(items), count)
    ]


def in_order(stages: Sequence[int]) -> list[int]:
    """The order, as coroutine numbers, in which coroutines with these numbers of stages are resumed, `WINDOW` at a time."""
    order: list[int] = []
    running: deque[tuple[int, int]] = deque()
    waiting = deque((number, count) for number, count in enumerate(stages) if count)
    while waiting or running:
        while waiting and len(running) < WINDOW:
            number, left = waiting.popleft()
            order.append(number)
            if left > 1:
                running.append((number, left - 1))
        if running:
            number, left = running.popleft()
            order.append(number)
            if left > 1:
                running.append((number, left - 1))
    return order
