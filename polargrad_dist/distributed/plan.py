"""Which rank computes which matrix, and what that costs: pure functions of names, shapes, rules and ranks.

A plan knows neither process groups nor values, so one for 512 ranks can be made on a laptop, on meta tensors.
Matrices of all shapes are assigned longest first (Graham's LPT rule: at most 4/3 of the smallest possible largest load).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch

from polargrad_dist.distributed.layout import Box, Cut3, Layout, Split, Stretches, rectangle, volume
from polargrad_dist.errors import ConfigError
from polargrad_dist.words import counted

TALL_ROLES = ("embed", "value_embed", "head")
# Up to this many elements, every rank that stores an elementwise parameter updates all of it.
SMALL = 1 << 16
# If whole matrices are stored more unevenly than this, they are sent to newly assigned owners.
UNEVEN = 1.1
# Sent in fp64 with each matrix's direction: its scale, and whether it may be stepped.
NUMBERS = 2
# Summed in fp64 for each matrix whose step waits for it: |W|^2, <W, S>, |S|^2 of weights and steps.
SUMS = 3
# Sent with a root: scale, largest and smallest singular value, whether it may be used.
ROOT_NUMBERS = 4


@dataclass
class Entry:
    """One parameter in the plan.

    ``kind`` is ``owner`` (each matrix is assembled at one place), ``tall`` (rows stay, the n x n problem is sent to one
    place) or ``elementwise``. ``ranks`` gives the global rank of each place of the layout, ``owners`` the place that owns
    each matrix. ``bounded``: a norm is sent with a tall matrix's Gram matrix, and a root that is not symmetric is returned.
    ``kept`` counts the elements of state that each matrix's owner keeps. ``centred``: a tall matrix's mean row is subtracted.
    ``pauses``: steps wait for sums over ranks (`sum_rows`). ``travels``: some matrix is not whole in its owner's optimizer
    shard.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    role: str
    rule: str
    lr: float
    kind: str
    dtype: torch.dtype
    states: int
    layout: Layout
    ranks: tuple[int, ...]
    split: Split | None = None
    costs: tuple[float, ...] = ()
    in_order: bool = False
    bounded: bool = False
    centred: bool = False
    pauses: bool = False
    wide: bool = False
    kept: tuple[int, ...] = ()
    owners: list[int] = field(default_factory=list)
    travels: bool = False

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """Identifies a parameter among all: stages and experts may share a name, but not ranks."""
        return self.name, self.ranks

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float32 if self.itemsize < 4 else self.dtype

    @property
    def momentum_dtype(self) -> torch.dtype:
        """The dtype in which momenta are sent: an exact oracle would treat rounding errors of bf16 as directions, and fp16
        has too small a range for gradients."""
        return self.state_dtype if self.wide or self.dtype == torch.float16 else self.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def cost(self) -> float:
        return sum(self.costs)

    @property
    def triangle(self) -> int:
        """Elements of the packed n x n Gram triangle of a tall matrix."""
        n = self.shape[-1]
        return n * (n + 1) // 2

    @cached_property
    def rectangles(self) -> list[Cut3]:
        """Each place's optimizer shard as ranges of (slice, row, column)."""
        stacked = self.split is not None and self.split.stacked
        return [rectangle(box, self.shape, stacked) for box in self.layout.shards]

    def candidates(self) -> list[tuple[int, ...]]:
        """The places that may own each matrix: the one that stores it whole, if that is even enough, else all."""
        assert self.split is not None
        everywhere = tuple(range(self.layout.world))
        if self.layout.world > 1 and self.kind == "owner" and not self.in_order:
            homes = whole_at(self.layout, self.split)
            # Here the elements of all parameters together are divided evenly, not those of each.
            if isinstance(self.layout, Stretches):
                return [everywhere if home is None else (home,) for home in homes]
            counts = Counter(homes)
            if None not in counts and max(counts.values()) * self.layout.world <= UNEVEN * len(homes):
                return [(home,) for home in homes]  # type: ignore[misc]
        return [everywhere] * len(self.costs)


@lru_cache(maxsize=4096)
def whole_at(layout: Layout, split: Split) -> list[int | None]:
    """The one place whose optimizer shard contains each matrix whole; None if there is none, or several."""
    shards = [rectangle(box, layout.shape, split.stacked) for box in layout.shards]
    homes: list[int | None] = []
    for matrix in split.matrices:
        places = [place for place, shard in enumerate(shards) if _within(matrix, shard)]
        homes.append(places[0] if len(places) == 1 else None)
    return homes


def deal(entries: Sequence[Entry], loads: dict[int, float]) -> None:
    """Assigns an owner to each matrix: the costliest first (then the largest, then by name) to the least loaded rank.

    ``loads`` are flops already assigned to each global rank, updated in place. Matrices stored whole at one place stay there.
    Those whose rule keeps state at the owner are assigned in order, so that those of one shape are a stack divided evenly
    over the ranks. A parameter with the same layout on several meshes (copies of experts) gets the same owners on each: equal
    batches give copies the same bits.
    """
    whole = [e for e in entries if e.kind != "elementwise"]
    firsts: dict[tuple, Entry] = {}
    twins: dict[tuple, list[Entry]] = defaultdict(list)
    for e in whole:
        e.owners = [-1] * len(e.costs)
        twins[firsts.setdefault((e.name, e.shape, e.layout, e.split), e).key].append(e)
    sizes: dict[int, int] = defaultdict(int)

    def give(e: Entry, matrix: int, place: int) -> None:
        for each in twins[e.key]:
            each.owners[matrix] = place
            loads[each.ranks[place]] += each.costs[matrix]
            sizes[each.ranks[place]] += each.bytes // len(each.costs)

    items = []
    dealt = [e for e in whole if e.key in twins]
    stacks = in_order(dealt)
    for e in dealt:
        for i, places in enumerate([] if e.in_order else e.candidates()):
            if len(places) == 1:
                give(e, i, places[0])
            else:
                items.append((e, i))
    for alike in stacks.values():
        where = index_of(ranks := alike[0][0].ranks)
        for k, (e, i) in enumerate(alike):
            give(e, i, where[sorted(ranks)[k // -(-len(alike) // len(ranks))]])
    heaps: dict[tuple[int, ...], list[tuple[float, int, int]]] = {}
    items.sort(key=lambda item: (-item[0].costs[item[1]], -item[0].bytes, item[0].name, item[1]))
    for e, i in items:
        if e.ranks not in heaps:
            heaps[e.ranks] = [(loads[rank], sizes[rank], place) for place, rank in enumerate(e.ranks)]
            heapq.heapify(heaps[e.ranks])
        heap = heaps[e.ranks]
        while heap[0][:2] != (now := (loads[e.ranks[heap[0][2]]], sizes[e.ranks[heap[0][2]]])):
            # The rank has been assigned a matrix of another mesh in the meantime.
            heapq.heapreplace(heap, (*now, heap[0][2]))
        place = heap[0][2]
        give(e, i, place)
        heapq.heapreplace(heap, (loads[e.ranks[place]], sizes[e.ranks[place]], place))
    for e in whole:
        if e.kind == "owner" and e.split is not None:
            e.travels = e.layout.world > 1 and e.owners != whole_at(e.layout, e.split)
    if lost := [e.name for e in whole if min(e.owners) < 0]:
        raise ConfigError(
            f"{lost[0]} has a matrix that no rank can own, expected an owner among the ranks that store it"
        )


def in_order(entries: Iterable[Entry]) -> dict[tuple, list[tuple[Entry, int]]]:
    """Matrices whose rule keeps state at the owner, grouped by shape, in an order that does not depend on the layout."""
    alike: dict[tuple, list[tuple[Entry, int]]] = defaultdict(list)
    for e in entries:
        if e.in_order:
            assert e.split is not None
            for i in range(len(e.costs)):
                alike[e.group, e.split.stored_shape(i), e.dtype].append((e, i))
    for members in alike.values():
        if len({e.ranks for e, _ in members}) > 1:
            raise ConfigError(
                f"{members[0][0].name} and {members[-1][0].name} have one shape but different meshes, and their rule keeps "
                "state per matrix, expected one mesh: put them into different parameter groups"
            )
    return alike


def sum_rows(entries: Iterable[Entry]) -> dict[tuple[Any, int], int]:
    """Positions of the sums of each matrix that waits for some, by (key, matrix); the sums of each role follow."""
    waiting = [e for e in entries if e.pauses]
    rows: dict[tuple[Any, int], int] = {}
    for e in waiting:
        for i in range(len(e.costs)):
            rows[e.key, i] = len(rows)
    for role in sorted({e.role for e in waiting}):
        rows[role, 0] = len(rows)
    return rows


@dataclass
class Plan:
    """Owners, balance, memory and traffic for the given ``ranks``; by default, the first ``world``."""

    world: int
    gradients: str = "all_reduced"
    comm_itemsize: int | None = None
    entries: list[Entry] = field(default_factory=list)
    loads: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    ranks: tuple[int, ...] | None = None

    def add(self, items: Sequence[Entry]) -> None:
        """Assigns owners to further parameters; earlier owners do not change."""
        deal(items, self.loads)
        self.entries.extend(items)

    @property
    def imbalance(self) -> float:
        """Largest load of a rank over the mean, in flops of the oracle; 1.0 is perfect."""
        mean = sum(self.loads.values()) / self.world
        return max(self.loads.values()) / mean if mean else 1.0

    @property
    def _ranks(self) -> Iterable[int]:
        return self.ranks or range(self.world)

    def _places(self, rank: int) -> Iterable[tuple[Entry, int]]:
        for e in self.entries:
            if rank in (index := index_of(e.ranks)):
                yield e, index[rank]

    def memory(self) -> list[dict[str, int]]:
        """Bytes that each rank holds throughout the run: parameters, gradients, optimizer state."""
        rows = []
        for rank in self._ranks:
            parameters = states = 0
            for e, place in self._places(rank):
                shard = volume(e.layout.shards[place])
                parameters += volume(e.layout.stored[place]) * e.itemsize
                states += shard * (e.states * e.state_dtype.itemsize + 2 * (e.dtype == torch.bfloat16))
                kept = sum(size for size, owner in zip(e.kept, e.owners, strict=False) if owner == place)
                states += kept * e.state_dtype.itemsize
            rows.append({"parameters": parameters, "gradients": parameters, "optimizer": states})
        return rows

    def traffic(self) -> dict[str, int]:
        """Bytes per step on the busiest rank of each collective that the optimizer starts.

        It counts the buffers passed to it: what a rank sends, or, for an all-gather, what it receives. The traffic of DDP or
        FSDP (2P and 3P in their own counts) comes on top.
        """
        if self.world == 1:
            return {}
        busiest: dict[str, int] = {}
        for rank in self._ranks:
            for kind, size in self.traffic_of(rank).items():
                busiest[kind] = max(busiest.get(kind, 0), size)
        return busiest

    def traffic_of(self, rank: int) -> dict[str, int]:
        """`traffic` of one rank."""
        out: dict[str, int] = defaultdict(int)
        if self.world > 1 and (count := len(sum_rows(self.entries))):
            out["all_gather"] += 8 * SUMS * count * self.world
        for e, place in self._places(rank):
            if e.layout.world == 1:
                continue
            updates = e.itemsize if e.itemsize < 4 else self.comm_itemsize or e.itemsize
            if e.layout.gathered(place):
                out["all_gather"] += e.layout.gathered(place) * updates
            if self.gradients == "reduce_scatter":
                if e.layout.cut is None:
                    out["all_reduce"] += e.bytes
                else:
                    out["reduce_scatter"] += e.layout.gathered(place) * e.itemsize
            if e.kind == "tall":
                n = e.shape[1]
                if e.centred:
                    out["all_reduce"] += 8 * n
                out["reduce"] += 8 * (e.triangle + e.bounded * (n + e.layout.world))
                out["broadcast"] += 8 * ((n * n if e.bounded else e.triangle) + ROOT_NUMBERS)
            elif e.kind == "owner" and e.travels:
                assert e.split is not None
                own = [
                    math.prod(e.split.stored_shape(i)) for i, owner in enumerate(e.owners) if owner == place
                ]
                out["all_to_all"] += volume(e.layout.shards[place]) * (
                    self.comm_itemsize or e.momentum_dtype.itemsize
                )
                out["all_to_all"] += sum(own) * (self.comm_itemsize or e.itemsize)
                out["all_to_all"] += 8 * NUMBERS * len(own) * e.layout.world
        return dict(out)

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """One line per parameter (name, shape, role, rule, learning rate, owners, flops), then the balance."""
        width = max([len(e.name) for e in self.entries] + [9])
        lines = [
            f"{'parameter':<{width}} {'shape':>16} {'role':<11} {'rule':<44} {'lr':>9} {'owner':>9} {'GFLOP':>9}"
        ]
        for e in self.entries:
            ranks = [str(e.ranks[owner]) for owner in e.owners]
            several = f"{len(set(ranks))} ranks" if len(set(ranks)) > 1 else "".join(ranks[:1])
            owner = {"elementwise": "all", "tall": f"rows/{several}", "owner": several}[e.kind]
            shape = "x".join(map(str, e.shape)) or "scalar"
            lines.append(
                f"{e.name:<{width}} {shape:>16} {e.role:<11} {e.rule:<44} {e.lr:>9.3g} {owner:>9} {e.cost / 1e9:>9.2f}"
            )
        lines.append(
            f"oracle work per rank, max/mean over {counted(self.world, 'rank')}: {self.imbalance:.3f}"
        )
        return "\n".join(lines)


def _within(a: Box, b: Box) -> bool:
    return all(low <= first and last <= high for (first, last), (low, high) in zip(a, b, strict=True))


_indices: dict[tuple[int, ...], dict[int, int]] = {}


def index_of(ranks: tuple[int, ...]) -> dict[int, int]:
    """The place of each global rank."""
    if ranks not in _indices:
        _indices[ranks] = {rank: place for place, rank in enumerate(ranks)}
    return _indices[ranks]
