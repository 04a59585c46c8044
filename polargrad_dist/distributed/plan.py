"""Who computes which matrix, and what that costs: pure functions of names, shapes, rules and the world's size.

A plan knows no process group and no tensor's values, so that it can be made for 128 ranks on a laptop, on meta tensors.
Matrices are dealt longest first over all shapes together (Graham's LPT rule, at most 4/3 of the best possible largest load).
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from polargrad_dist.errors import ConfigError
from polargrad_dist.polar import cost as oracle_cost

TALL_ROLES = ("embed", "value_embed", "head")


def chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """The half-open range of part ``index`` when ``length`` rows are cut as ``torch.chunk`` and DTensor cut them."""
    size = -(-length // parts)
    return min(length, index * size), min(length, (index + 1) * size)


@dataclass(frozen=True)
class Layout:
    """How a parameter of ``stack * rows * cols`` elements splits into matrices, each with a step scale of its own.

    ``runs`` cuts the rows of each of the ``stack`` slices into equal blocks: (first row, blocks, rows of a block).
    """

    stack: int
    rows: int
    cols: int
    runs: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(
        cls,
        name: str,
        shape: Sequence[int],
        split_sizes: Sequence[int] | None,
        num_heads: int | None,
        flatten: bool,
    ) -> Layout:
        """Reads a parameter's shape: 2-D one matrix, 3-D a stack of experts, more (or ``flatten``) a convolution.

        Raises ``ConfigError`` when the splits do not add up to the rows.
        """
        if len(shape) < 2 or math.prod(shape) == 0:
            raise ConfigError(
                f"{name} has shape {tuple(shape)}, expected a matrix with at least one element: "
                "give it to a group with algorithm 'adamw'"
            )
        if len(shape) > 3 or flatten:
            shape = (shape[0], math.prod(shape[1:]))
        stack, rows, cols = (1, *shape) if len(shape) == 2 else shape
        if split_sizes and num_heads:
            raise ConfigError(f"{name}: split_sizes and num_heads are both set, expected at most one of them")
        if num_heads:
            if rows % num_heads:
                raise ConfigError(f"{name} has {rows} rows, which num_heads={num_heads} does not divide")
            split_sizes = (rows // num_heads,) * num_heads
        sizes = tuple(split_sizes or (rows,))
        if sum(sizes) != rows or min(sizes) < 1:
            raise ConfigError(f"{name} has {rows} rows, but split_sizes {sizes} add up to {sum(sizes)}")
        runs: list[tuple[int, int, int]] = []
        first = 0
        for size in sizes:
            if runs and runs[-1][2] == size:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, size)
            else:
                runs.append((first, 1, size))
            first += size
        return cls(stack, rows, cols, tuple(runs))

    @property
    def matrices(self) -> int:
        """How many matrices the parameter holds."""
        return self.stack * sum(blocks for _, blocks, _ in self.runs)

    def views(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Cuts ``x`` (k, numel) into one (k, stack, blocks, m, n) view for each run of equal blocks."""
        x = x.view(-1, self.stack, self.rows, self.cols)
        for first, blocks, m in self.runs:
            yield x[:, :, first : first + blocks * m].unflatten(2, (blocks, m))

    def cost(self, method: str, steps: int | None) -> float:
        """Flops of the oracle on all matrices of the parameter."""
        per_slice = sum(blocks * oracle_cost((m, self.cols), method, steps) for _, blocks, m in self.runs)
        return self.stack * per_slice


@dataclass
class Entry:
    """One parameter in the plan. ``kind`` is ``owner`` (a whole matrix at one rank), ``rows`` (row-sharded polar, its
    n x n problem at the owner) or ``everywhere`` (elementwise, each rank does what it holds)."""

    name: str
    shape: tuple[int, ...]
    role: str
    rule: str
    lr: float
    kind: str
    itemsize: int
    state_itemsize: int
    states: int
    layout: Layout | None
    cost: float = 0.0
    owner: int = -1
    shards: int = 1

    def place(self, rank: int) -> tuple[int, int]:
        """The (replica, shard) coordinates of a rank on the rectangle that the parameter lives on."""
        return divmod(rank, self.shards)

    def held(self, rank: int) -> int:
        """Elements of the parameter that ``rank`` stores."""
        if self.shards == 1:
            return self.numel
        first, last = chunk(self.shape[0], self.shards, rank % self.shards)
        return (last - first) * (self.numel // self.shape[0])

    def held_state(self, rank: int, world: int) -> int:
        """Elements of each of the parameter's states that ``rank`` stores, which are those whose step it works out."""
        if self.kind == "everywhere":
            return self.held(rank)
        replica, shard = self.place(rank)
        if self.kind == "owner":
            return self.held(rank) if self.place(self.owner)[0] == replica else 0
        first, last = chunk(self.shape[0], self.shards, shard)
        low, high = chunk(last - first, world // self.shards, replica)
        return (high - low) * self.shape[1]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def triangle(self) -> int:
        """Elements of the packed n x n Gram triangle of a row-sharded matrix."""
        n = self.shape[-1]
        return n * (n + 1) // 2


def entries(groups: Iterable[dict[str, Any]]) -> list[Entry]:
    """What the planner has to know of each parameter of the optimizer's groups, in their order."""
    return [
        entry(group, name, p)
        for group in groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]


def entry(group: dict[str, Any], name: str, p: torch.Tensor) -> Entry:
    """One parameter of a group, its owner not yet dealt."""
    half = p.dtype in (torch.bfloat16, torch.float16)
    common = (name, tuple(p.shape), group["role"], describe(group), float(group["lr"]))
    state_itemsize = 4 if half else p.element_size()
    if group["algorithm"] == "adamw":
        return Entry(*common, "everywhere", p.element_size(), state_itemsize, 2, None)
    layout = Layout.of(name, p.shape, group["split_sizes"], group["num_heads"], group["flatten"])
    states = int(group["momentum"] != "none")
    if row_sharded(group, layout):
        n = layout.cols
        return Entry(
            *common,
            "rows",
            p.element_size(),
            state_itemsize,
            states,
            layout,
            oracle_cost((n, n), "svd", None),
        )
    cost = layout.cost(group["oracle"], group["steps"])
    return Entry(*common, "owner", p.element_size(), state_itemsize, states, layout, cost)


def row_sharded(group: dict[str, Any], layout: Layout) -> bool:
    """Whether a matrix is computed from the Gram matrix of its row shards instead of travelling to one owner."""
    if layout.matrices != 1 or layout.rows < layout.cols or group["oracle"] not in ("auto", "gram"):
        return False
    wish = group["row_sharded"]
    return layout.rows >= 8 * layout.cols or group["role"] in TALL_ROLES if wish is None else wish


def describe(group: dict[str, Any]) -> str:
    """A rule in a few words, for tables."""
    if group["algorithm"] == "adamw":
        return "adamw"
    steps = f":{group['steps']}" if group["steps"] else ""
    nesterov = "+nesterov" if group["nesterov"] else ""
    factor = "polar" if group.get("spectrum", "polar") == "polar" else "homogenized"
    return f"{factor} {group['scale']} {group['momentum']}{nesterov} {group['oracle']}{steps}"


def deal(items: Sequence[Entry], world: int, loads: list[float] | None = None) -> None:
    """Gives each item its owner, the costliest first (then the largest, then by name) to the least loaded rank.

    ``loads`` are flops already dealt to each rank, updated in place.
    """
    loads = [0.0] * world if loads is None else loads
    heap = [(load, 0, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for item in sorted(items, key=lambda e: (-e.cost, -e.bytes, e.name)):
        load, size, rank = heapq.heappop(heap)
        item.owner = rank
        loads[rank] = load + item.cost
        heapq.heappush(heap, (loads[rank], size + item.bytes, rank))


@dataclass
class Plan:
    """Owners, balance, bytes and traffic of a world of ``world`` ranks.

    Every parameter lives on a rectangle of ``replicas x shards`` ranks: DDP is ``W x 1``, FSDP ``1 x W``, HSDP
    ``R x S``. The owner of an item is rank ``replica * shards + shard``.
    """

    world: int
    gradients: str = "all_reduced"
    entries: list[Entry] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        groups: Iterable[dict[str, Any]],
        *,
        replicas: int = 1,
        shards: int = 1,
        gradients: str = "all_reduced",
    ) -> Plan:
        """Plans the groups that `route` returned, on tensors of any device, meta included."""
        plan = cls(replicas * shards, gradients)
        items = entries(groups)
        for e in items:
            e.shards = shards
        plan.add(items)
        return plan

    def add(self, items: Sequence[Entry]) -> None:
        """Deals further parameters on top of what is dealt already; nobody's owner changes."""
        self.loads = self.loads or [0.0] * self.world
        deal([e for e in items if e.kind != "everywhere"], self.world, self.loads)
        self.entries.extend(items)

    @property
    def imbalance(self) -> float:
        """Largest load of a rank over the mean, in flops of the oracle; 1.0 is perfect."""
        mean = sum(self.loads) / len(self.loads)
        return max(self.loads) / mean if mean else 1.0

    def memory(self) -> list[dict[str, int]]:
        """Bytes that each rank keeps through the run: parameters, gradients, optimizer state."""
        rows = []
        for rank in range(self.world):
            parameters = sum(e.held(rank) * e.itemsize for e in self.entries)
            residuals = sum(2 * e.held(rank) for e in self.entries if e.itemsize < e.state_itemsize)
            states = sum(e.held_state(rank, self.world) * e.states * e.state_itemsize for e in self.entries)
            rows.append({"parameters": parameters, "gradients": parameters, "optimizer": states + residuals})
        return rows

    def traffic(self, comm_itemsize: int | None = None) -> dict[str, int]:
        """Bytes per step on the busiest rank of each collective that the optimizer starts.

        Counted as the buffers handed to it: what a rank sends, for an all-gather what it receives. What DDP or FSDP
        moves for the gradients (2P and 3P in their own counts) comes on top.
        """
        itemsize = comm_itemsize or max(
            (e.itemsize for e in self.entries if e.kind != "everywhere"), default=4
        )
        ranks = range(self.world)
        out: dict[str, int] = defaultdict(int)
        if self.world == 1:
            return {}
        if self.gradients == "to_owner":
            for e in self.entries:
                out["all_reduce" if e.kind == "everywhere" else "reduce"] += e.bytes
        for e in self.entries:
            if e.kind == "rows":
                stages = 1 + (1 < e.shards < self.world)  # within a replica, then between them
                out["reduce"] += stages * 8 * e.triangle
                out["broadcast"] += stages * 8 * (e.triangle + 3)
        sharded = [e for e in self.entries if e.kind == "owner" and e.shards > 1]
        if sharded:
            sent = [sum(e.held_state(rank, self.world) for e in sharded) for rank in ranks]
            back = [sum(e.numel for e in sharded if e.owner == rank) for rank in ranks]
            out["all_to_all"] = itemsize * max(s + b for s, b in zip(sent, back, strict=True))
        copied = [e for e in self.entries if e.kind != "everywhere" and e.shards < self.world]
        if copied:
            share = [sum(e.held_state(rank, self.world) for e in copied) for rank in ranks]
            out["all_gather"] = itemsize * max(share) * max(self.world // e.shards for e in copied)
        return dict(out)

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """One line per parameter (name, shape, role, rule, learning rate, owner, flops), then the balance."""
        width = max([len(e.name) for e in self.entries] + [9])
        lines = [
            f"{'parameter':<{width}} {'shape':>16} {'role':<11} {'rule':<44} {'lr':>9} {'owner':>7} {'GFLOP':>9}"
        ]
        for e in self.entries:
            owner = {"everywhere": "all", "rows": f"rows/{e.owner}", "owner": str(e.owner)}[e.kind]
            shape = "x".join(map(str, e.shape)) or "scalar"
            lines.append(
                f"{e.name:<{width}} {shape:>16} {e.role:<11} {e.rule:<44} {e.lr:>9.3g} {owner:>7} {e.cost / 1e9:>9.2f}"
            )
        lines.append(f"oracle work per rank, max/mean over {self.world} ranks: {self.imbalance:.3f}")
        return "\n".join(lines)
