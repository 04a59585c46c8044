"""A bucket's step: a coroutine that yields each collective it starts, and is resumed with the result.

`Owned` sends whole matrices to their owners and receives directions. Of a `Tall` matrix the rows stay, and only an n x n
problem is sent. `Elementwise` updates each element on its own. All share `Batch`'s code that steps weights and sends them to
ranks with copies. `distributed.transport` cuts and assembles matrices; `matrix` has the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polargrad_dist.compiled import run_compiled
from polargrad_dist.distributed.layout import Cut3, overlap, rectangle, slices, volume
from polargrad_dist.distributed.plan import NUMBERS, ROOT_NUMBERS, Entry
from polargrad_dist.distributed.reducer import ShardReducer
from polargrad_dist.distributed.schedule import Bucket, Portion
from polargrad_dist.distributed.teams import Team, local
from polargrad_dist.distributed.transport import Exchange, Started, Traffic, pack_triangle, unpack_triangle
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.control import lengths, per_matrix
from polargrad_dist.optim.elements import join_bf16, selected_ema, selected_step, split_bf16
from polargrad_dist.optim.facts import Facts
from polargrad_dist.optim.matrix import Direction, decay_and_step, relative, rule_of
from polargrad_dist.polar import RowFactor, gram_matrix, norm_bound, norm_parts
from polargrad_dist.polar.oracle import is_finite, rows_at_once

# A bucket's step: it yields each collective that it starts, or None for a pause, and is resumed with the result.
Steps = Generator[Started | None, Tensor, None]
CPU = torch.device("cpu")
# A GPU has memory for larger buckets, and each bucket costs it a dozen launches.
CPU_BUCKET, GPU_BUCKET = 32 << 20, 256 << 20


@dataclass(eq=False)
class Member:
    """A parameter with its plan entry, group, ranks and state.

    ``number`` is the group's, ``index`` the parameter's among those of all ranks. The *canonical* view of this rank's part of
    the parameter, or of a tensor like it, is (slices, rows, columns).
    """

    index: int
    entry: Entry
    p: nn.Parameter
    group: dict[str, Any]
    team: Team
    state: dict[str, Any]
    number: int
    owner_homes: dict[tuple[int, int], tuple[Member, dict[str, str]]] = field(default_factory=dict)
    owner_rows: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rule = rule_of(self.group)
        self.device, self.state_dtype = local(self.p).device, self.entry.state_dtype
        self.shape = tuple(self.p.shape)
        self.stacked = self.entry.split is not None and self.entry.split.stacked
        low_bits = ["low_bits"] * (self.entry.dtype == torch.bfloat16)
        self.elementwise = [*self.rule.states(self.group), *low_bits]

    def window(self, place: int) -> Cut3:
        """The optimizer shard of a place, relative to what that place stores."""
        stored = rectangle(self.entry.layout.stored[place], self.entry.shape, self.stacked)
        shard = self.entry.rectangles[place]
        return tuple((a - at, b - at) for (a, b), (at, _) in zip(shard, stored, strict=True))  # type: ignore[return-value]

    @cached_property
    def shard(self) -> tuple[slice, ...] | None:
        """This rank's optimizer shard as an index into what it stores; None if that is all of it."""
        layout = self.entry.layout
        whole = layout.copies == 1 or layout.cut is None
        return None if whole else slices(self.window(self.team.place))

    def canonical(self, x: Tensor, part: tuple[slice, ...] | None = None) -> Tensor:
        """This rank's part of ``x`` as (slices, rows, columns), or a part of that: a view."""
        x = (x.to_local() if isinstance(x, DTensor) else x).detach()
        if not self.stacked:
            x = x.flatten(1).unsqueeze(0) if x.ndim > 1 else x.view(1, -1, 1)
        return x if part is None else x[part]

    def held(self, key: str) -> Tensor:
        """This rank's part of an elementwise state; low bits as int16."""
        here = local(self.state[key])
        return self.canonical(here.view(torch.int16).squeeze(-1) if key == "low_bits" else here)

    def owner_state(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The rule's state for the matrices of this shape that this rank owns: (matrices, ...) for each name."""
        home, names = self.owner_homes[shape]
        return {key: local(home.state[name]) for key, name in names.items()}

    @property
    def misplaced(self) -> bool:
        """Whether the gradient's placement differs from the parameter's."""
        grad, p = self.p.grad, self.p
        both = isinstance(grad, DTensor) and isinstance(p, DTensor)
        return both and tuple(grad.placements) != tuple(p.placements)  # type: ignore[union-attr, attr-defined]


@dataclass
class Travel:
    """How a step communicates and computes.

    ``traffic`` starts and counts collectives, ``dtype`` is what they send (None: the parameters' dtype), and ``device``
    computes. ``wish`` is the bytes per collective, None for the device's default. ``ok`` (0-d bool on the device) says
    whether the step takes place, None for yes; ``shrink`` (0-d) multiplies all gradients, None for 1.
    """

    traffic: Traffic
    dtype: torch.dtype | None
    wish: int | None
    device: torch.device = CPU
    reducer: ShardReducer | None = None
    ok: Tensor | None = None
    shrink: Tensor | None = None
    numbers: dict[float, Tensor] = field(default_factory=dict)

    def number(self, value: float) -> Tensor:
        """A number of a group as a 0-d fp64 tensor on the device: with floats, each value would compile a new kernel."""
        if value not in self.numbers:
            self.numbers[value] = torch.full((), value, dtype=torch.float64, device=self.device)
        return self.numbers[value]

    @property
    def limit(self) -> int:
        """Bytes per collective."""
        return self.wish or (CPU_BUCKET if self.device.type == "cpu" else GPU_BUCKET)

    @property
    def backend(self) -> str | None:
        """The compiler of elementwise steps: inductor on a GPU, where every launch and every pass over memory counts."""
        return "inductor" if self.device.type == "cuda" else None

    def shrunk(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients of one dtype, times ``shrink``."""
        if self.shrink is None:
            return grads
        return list(torch._foreach_mul(grads, self.shrink.to(grads[0].device, grads[0].dtype)))

    def averaged(self, m: Tensor, grads: Sequence[Tensor], group: dict[str, Any]) -> Tensor:
        """Momentum of stacked shards m (k, slices, rows, columns), or its look-ahead.

        m is updated in place if the step takes place.
        """
        assert self.ok is not None
        stack = torch.stack(list(grads)) if len(grads) > 1 else grads[0].unsqueeze(0)
        shrink = self.number(1.0) if self.shrink is None else self.shrink
        numbers = self.number(group["beta"]), shrink, self.ok
        return run_compiled(
            selected_ema, self.backend, m, stack, *numbers, bool(group["nesterov"]), dynamic=True
        )

    def stepped(
        self,
        old: Tensor,
        low: Tensor | None,
        step: Tensor,
        scale: Tensor | None,
        ok: Tensor,
        group: dict[str, Any],
    ) -> Tensor:
        """New weights for old ones (k, slices, rows, columns) where ``ok``; see `selected_step`."""
        rate = group["lr"] * group["weight_decay"]
        decay = self.number(rate) if rate else None
        options = (old, low, step, scale, self.number(group["lr"]), decay, ok, group["control"] == "cautious")
        return run_compiled(selected_step, self.backend, *options, dynamic=True)

    def gradient(self, member: Member) -> Tensor:
        """The reduced gradient of a parameter's optimizer shard, or zeros if there is none: (slices, rows, columns)."""
        if self.reducer is not None:
            return member.canonical(self.reducer.shard(member.p))
        grad = member.p.grad
        if grad is None:
            return torch.zeros_like(member.canonical(member.p, member.shard))
        return member.canonical(grad, member.shard)


class Batch:
    """This rank's shards of a bucket's parameters, stacked: (items, slices, rows, columns)."""

    def __init__(self, bucket: Bucket, members: Sequence[Member], travel: Travel):
        """``members`` are the bucket's parameters, item by item; this rank is in their team."""
        self.bucket, self.members, self.travel = bucket, list(members), travel
        first = self.first = members[0]
        self.entry, self.team, self.rule, self.group = first.entry, first.team, first.rule, first.group
        self.place, item = self.team.place, bucket.items[0]
        whole = self.entry.split is None or (item.first, item.last) == (0, self.entry.split.stack)
        self.slab = slice(None) if whole else slice(item.first, item.last)
        self.states: dict[str, Tensor] = {}
        self.loose: list[tuple[list[Tensor], Tensor]] = []
        self._kept: dict[str, Tensor] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        # The compiler of elementwise steps; None if the weights are offloaded.
        self.backend = travel.backend if first.device == travel.device else None
        self.shares = bucket.shares
        # The matrix that row i of the numbers belongs to; the row of each (item, slice, row, column), None for one per item.
        self.arrival: list[tuple[int, int]] = [(0, 0)]
        self.index: Tensor | None = None
        self.places: Tensor | None = None
        if self.shares:
            self._find_copies()

    def run(self, facts: Facts) -> Steps:
        """The bucket's step."""
        raise AssertionError("each kind of bucket overrides this")

    def _join(self, keys: Sequence[str]) -> None:
        """Stacks these states: a view if they are adjacent in memory, else copies that are written back."""
        for key in keys:
            views = [m.held(key)[self.slab] for m in self.members]
            self.states[key], together = joined(views)
            if not together:
                self.loose.append((views, self.states[key]))

    def _find_copies(self) -> None:
        """Finds the shards of all ranks that store the same elements, relative to what each stores, in group order."""
        order = self.team.copy_order
        self.boxes = [self.first.window(place) for place in order]
        shapes = {tuple(b - a for a, b in box) for box in self.boxes}
        axes = [axis for axis in range(3) if len({box[axis] for box in self.boxes}) > 1]
        self.longest = {
            id(part): max(volume(self._portion_of(part, box)) for box in self.boxes)
            for part in self.bucket.portions
        }
        self.axis = axes[0] if len(shapes) == len(axes) == 1 and order == sorted(order) else None

    def momentum(self) -> Tensor:
        """The input of the rule's direction: the momentum of this rank's shards, stacked."""
        group, travel = self.group, self.travel
        # The copies may be out of date: the state may since have been loaded, or stepped in another bucket.
        for views, stack in self.loose:
            torch._foreach_copy_(list(stack.unbind(0)), views)
        grads = [travel.gradient(m)[self.slab] for m in self.members]
        if self.backend is not None and travel.ok is not None and self.rule.has_plain_momentum(group):
            self._kept = {}
            return travel.averaged(self.states["momentum"], grads, group)
        # Copies, if the step may still be skipped.
        kept = {} if travel.ok is None else self.states
        self._kept = {key: state.clone() for key, state in kept.items() if key != "low_bits"}
        stack = (torch.stack(grads) if len(grads) > 1 else grads[0].unsqueeze(0)).to(self.first.state_dtype)
        if travel.shrink is not None:
            (stack,) = travel.shrunk([stack])
        return self.rule.momentum(self.states, stack, group)

    def spread(self, numbers: Tensor) -> Tensor:
        """Numbers of each matrix, in the order of `arrival`, shaped to broadcast against (items, slices, rows, columns)."""
        return numbers.view(-1, 1, 1, 1, *numbers.shape[1:]) if self.index is None else numbers[self.index]

    def advance(
        self, part: Portion, D: Tensor, ok: Tensor, scale: Tensor | None = None, shrink: Tensor | None = None
    ) -> Tensor | None:
        """Steps the weights of a portion along its direction D, where ``ok``; returns what to send to copies, if any.

        ``ok``, ``scale`` and ``shrink`` are broadcast against D (items, slices, rows, columns). Without a ``scale`` D is the
        step itself; ``shrink`` multiplies the new weights.
        """
        group, dtype = self.group, self.first.state_dtype
        compiled = self.backend is not None and shrink is None
        if scale is not None and not (compiled and self.rule.is_plain(group)):
            states = {k: v[part.items, :, part.rows] for k, v in self.states.items() if k != "low_bits"}
            D, scale = self.rule.apply(states, D, scale, group), None
        low = self.states["low_bits"][part.items, :, part.rows] if "low_bits" in self.states else None
        weights = [m.canonical(m.p, m.shard)[self.slab, part.rows] for m in self.members[part.items]]
        narrow = weights[0].element_size() < 4
        rate, cautious = group["lr"] * group["weight_decay"], group["control"] == "cautious"
        sure = self.travel.ok is None and ok.device.type == "cpu" and bool(ok.all())
        if sure and not (compiled or self.shares or narrow or shrink is not None):
            decay_and_step(weights, list(D.to(weights[0].dtype).unbind(0)), rate, cautious)
            return None
        old = torch.stack(weights) if len(weights) > 1 else weights[0].unsqueeze(0)
        if compiled:
            new = self.travel.stepped(old, low, D if scale is not None else D.to(dtype), scale, ok, group)
        else:
            # A stack of several is a copy already, whose old values are not needed.
            fresh = len(weights) > 1 and self.travel.dtype is None
            x = join_bf16(old, low) if low is not None else old.to(dtype, copy=not fresh)
            before = None if sure else x.clone()
            decay_and_step([x], [D.to(dtype)], rate, cautious)
            if shrink is not None:
                x.mul_(shrink)
            if before is not None:
                x = torch.where(ok, x, before)
            new = x.to(old.dtype) if narrow and low is None else x
            new = new if low is None else split_bf16(x, low)
        if self.shares:
            return new if self.travel.dtype is None or narrow else (new - old).to(self.travel.dtype)
        torch._foreach_copy_(weights, list(new.unbind(0)))
        return None

    def controlled(self, D: Tensor, scale: Tensor, ok: Tensor, facts: Facts) -> Steps:
        """`advance` for all portions of the bucket's direction D, with a pause until all ranks know the sums.

        ``scale`` and ``ok`` are broadcast against D (items, slices, rows, columns).
        """
        assert facts.sums is not None
        states = {k: v for k, v in self.states.items() if k != "low_bits"}
        steps = torch.where(ok, self.rule.apply(states, D, scale, self.group), 0)
        weights = torch.stack([m.canonical(m.p, m.shard)[self.slab] for m in self.members]).to(steps.dtype)
        pairs = ((weights, weights), (weights, steps), (steps, steps))
        each = [per_matrix(a * b, self.index, len(self.arrival)) for a, b in pairs]
        del weights
        if self.places is None:
            self.places = facts.sums.places([(self.members[i].entry, j) for i, j in self.arrival])
        count = len(self.places)
        if count and self.entry.layout.counted(self.place):
            facts.sums.add(self.places, torch.stack(each, 1)[:count])
        yield None
        grow = shrink = steps.new_ones(1, 1, 1, 1)
        if count:
            sums, shared = facts.sums.values[self.places], facts.sums.nuclear(self.entry.role)
            grow, shrink = (self.spread(x).to(steps) for x in lengths(self.group, sums, shared))
        for part in self.bucket.portions:
            rows = part.rows if grow.shape[2] > 1 else slice(None)
            step = steps[part.items, :, part.rows] * grow[part.items, :, rows]
            good = ok[part.items, :, rows] if ok.ndim else ok
            message = self.advance(part, step, good, shrink=shrink[part.items, :, rows])
            if message is not None:
                self.arrived(part, (yield self.share(part, message)))

    def share(self, part: Portion, message: Tensor) -> Started:
        """Starts sending this rank's shards, or their updates, to ranks with copies: (copies, items, longest)."""
        longest = self.longest[id(part)]
        flat = message.to(self.travel.device).reshape(len(message), -1)
        if flat.shape[1] < longest:
            flat = torch.cat([flat, flat.new_zeros(len(flat), longest - flat.shape[1])], 1)
        assert self.team.copies is not None
        return self.travel.traffic.all_gather(flat, self.team.copies)

    def _portion_of(self, part: Portion, box: Cut3) -> Cut3:
        """A portion's part of a copy's shard, relative to what that copy stores."""
        depth, (top, bottom), across = box
        first, last, _ = part.rows.indices(bottom - top)
        depth = depth if self.slab == slice(None) else (self.slab.start, self.slab.stop)
        return depth, (top + first, top + max(first, last)), across

    def arrived(self, part: Portion, gathered: Tensor) -> None:
        """Writes the results of all copies into the parameters."""
        stored = [m.canonical(m.p) for m in self.members[part.items]]
        ours, theirs = [], []
        if self.axis is not None:
            for w, messages in zip(stored, gathered.unbind(1), strict=True):
                cut = w.unflatten(self.axis, (len(self.boxes), -1)).movedim(self.axis, 0)
                ours.append(cut[:, self.slab, part.rows])
                theirs.append(messages.view(ours[-1].shape))
        else:
            for box, messages in zip(self.boxes, gathered, strict=True):
                place = self._portion_of(part, box)
                for w, message in zip(stored, messages, strict=True):
                    ours.append(w[slices(place)])
                    theirs.append(message[: volume(place)].view(ours[-1].shape))
        if gathered.dtype == self.entry.dtype and not (self.travel.dtype and self.entry.itemsize >= 4):
            torch._foreach_copy_(ours, theirs)
        else:
            torch._foreach_add_(ours, [x.to(ours[0].device, self.entry.dtype) for x in theirs])

    def _rows(self, rows: list[int]) -> Tensor:
        """Rows of owner state as an index on the device, made once: copying it from the host would make a GPU wait."""
        key = tuple(rows)
        if key not in self._indices:
            self._indices[key] = torch.tensor(rows, dtype=torch.int64, device=self.travel.device)
        return self._indices[key]

    def _keep(self, held: dict[str, Tensor], rows: Tensor, after: dict[str, Tensor], ok: Tensor) -> None:
        """Writes the next states of matrices owned here into these rows, if the step takes place and ``ok`` (matrices,)."""
        ok = ok if self.travel.ok is None else ok & self.travel.ok.to(ok.device)
        for key, value in held.items():
            may = ok.view(-1, *[1] * (value.ndim - 1))
            value[rows] = torch.where(may, after[key].to(value.dtype), value[rows])

    def _related(self, scale: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """A rule's scales (matrices,), relative to their early mean if the group's ``scale`` says so, and the next mean."""
        seen = state["nuclear_mean"]
        # A group may switch to another scale between steps.
        if self.group["scale"] == "nuclear_relative":
            scale, seen = relative(scale.double(), seen)
        return scale, {"nuclear_mean": seen}

    def _share_nuclear(self, norms: Tensor | None, scale: Tensor, ok: Tensor, facts: Facts) -> None:
        """Adds the scaled nuclear norms of matrices that are owned here to their role's sum."""
        if norms is None:
            raise ConfigError(
                f"the rule {self.group['algorithm']!r} returned no nuclear norms, expected them for scale 'nuclear_shared'"
            )
        assert facts.sums is not None
        facts.sums.add_nuclear(self.entry, torch.where(ok, norms * scale, 0))

    def settle(self) -> None:
        """Restores the states if the step was skipped, and writes back stacked copies of states."""
        for key, old in self._kept.items():
            assert self.travel.ok is not None
            self.states[key].copy_(torch.where(self.travel.ok.to(old.device), self.states[key], old))
        for views, stack in self.loose:
            torch._foreach_copy_(views, list(stack.unbind(0)))


class Owned(Batch):
    """Matrix parameters of one kind and shape: each matrix is assembled at its owner, unless it is stored whole there."""

    def __init__(self, bucket: Bucket, members: Sequence[Member], travel: Travel):
        super().__init__(bucket, members, travel)
        self._join(self.first.elementwise)
        e = self.entry
        assert e.split is not None
        self.wire_dtype = travel.dtype or e.dtype
        self.momentum_dtype = travel.dtype or e.momentum_dtype
        per_slice = len(e.owners) // e.split.stack
        order = self.team.order if self.team.group is not None else [0]
        owned: dict[int, list[tuple[int, int]]] = {place: [] for place in order}
        for i, item in enumerate(bucket.items):
            for j in range(item.first * per_slice, item.last * per_slice):
                owned[self.members[i].entry.owners[j]].append((i, j))
        for matrices in owned.values():
            matrices.sort(key=lambda ij: (e.split.stored_shape(ij[1]), ij))  # type: ignore[union-attr]
        # The bucket's slices only.
        slab = (item.first, item.last)
        boxes = [(slab, *e.rectangles[p][1:]) if self.slab != slice(None) else e.rectangles[p] for p in order]
        self.mine, rank = owned[self.place], order.index(self.place)
        self.exchange = Exchange(
            travel.traffic, self.team.group, e.split, [owned[place] for place in order], boxes, rank
        )
        self.arrival = [ij for place in order for ij in owned[place]] if e.travels else self.mine
        if self.arrival != [(i, 0) for i in range(len(members))]:
            self.index = self._index(boxes[rank])

    def _index(self, here: Cut3) -> Tensor:
        """The row of the numbers for each (item, slice, row, column) of this rank's shards; see `Batch.index`."""
        split = self.entry.split
        assert split is not None
        several = len(split.matrices) > split.stack
        by_rows, by_cols = several and not split.transposed, several and split.transposed
        depth, rows, cols = (b - a for a, b in here)
        size = len(self.members), depth, rows if by_rows else 1, cols if by_cols else 1
        index = torch.zeros(size, dtype=torch.int64)
        for at, (i, j) in enumerate(self.arrival):
            deep, down, across = slices(overlap(here, split.matrices[j]))
            index[i, deep, down if by_rows else slice(None), across if by_cols else slice(None)] = at
        return index.to(self.travel.device)

    def run(self, facts: Facts) -> Steps:
        """The bucket's step."""
        A = self.momentum()
        shape, exchange = A.shape, self.exchange
        if self.entry.travels:
            started = exchange.to_owners(A.to(self.travel.device, self.momentum_dtype))
            del A
            D, numbers = self.directed(exchange.matrices((yield started)), facts)
            started = exchange.to_shards([d.to(self.wire_dtype) for d in D], numbers)
            del D
            direction, numbers = exchange.shards((yield started), shape)
        else:
            D, numbers = self.directed(exchange.whole_here(A.to(self.travel.device)), facts)
            direction = exchange.as_shards(D, shape)
            # A placeholder row: this rank's shards have no elements.
            numbers = numbers if self.mine else numbers.new_ones(1, NUMBERS)
            del A, D
        scales, good = self.spread(numbers).to(self.first.device).unbind(-1)
        good, ok = good > 0, self.travel.ok
        good = good if ok is None else good & ok.to(good.device)
        direction = direction.to(self.first.device)
        if self.entry.pauses:
            yield from self.controlled(direction, scales, good, facts)
        else:
            for part in self.bucket.portions:
                own = part.items, slice(None), part.rows if good.shape[2] > 1 else slice(None)
                message = self.advance(part, direction[part.items, :, part.rows], good[own], scales[own])
                if message is not None:
                    self.arrived(part, (yield self.share(part, message)))
        if self._kept or self.loose:
            self.settle()

    def directed(self, batches: list[Tensor], facts: Facts) -> tuple[list[Tensor], Tensor]:
        """Applies the rule to this rank's matrices: their directions, and (matrices, NUMBERS) in fp64.

        If the rule fails, the result is zeros that are not stepped, not an exception: the other ranks must not wait.
        """
        out, numbers, at = [], [batches[0].new_empty(0, NUMBERS, dtype=torch.float64)], 0
        for A in batches:
            owners = [self.members[i] for i, _ in self.mine[at : at + len(A)]]
            try:
                D, figures = self._ruled(A, owners, at, facts) if owners else (A, numbers[0])
            # Any error is raised on all ranks together after the step.
            except Exception as error:
                facts.failed(owners[0].index, error)
                D, figures = torch.zeros_like(A), A.new_zeros(len(A), NUMBERS, dtype=torch.float64)
            out.append(D)
            numbers.append(figures)
            at += len(A)
        return out, torch.cat(numbers) if len(numbers) > 2 else numbers[1]

    def _ruled(self, A: Tensor, owners: list[Member], at: int, facts: Facts) -> tuple[Tensor, Tensor]:
        """Applies the rule to matrices A (k, m, n) of these parameters; the first is number ``at`` of this rank's."""
        held: dict[str, Tensor] = {}
        if self.entry.in_order:
            rows = self._rows([self.members[i].owner_rows[j] for i, j in self.mine[at : at + len(A)]])
            held = self.first.owner_state((A.shape[1], A.shape[2]))
        state = {key: value[rows] for key, value in held.items()}
        answer = facts.timed(self.entry.role, A.device, self.rule.direction, A, state, self.group)
        if not isinstance(answer, Direction):
            kind = type(answer).__name__
            raise ConfigError(
                f"direction() of the rule {self.group['algorithm']!r} returned a {kind}, expected a polargrad_dist.Direction"
            )
        if answer.D.shape != A.shape or answer.scale.shape != A.shape[:1]:
            raise ConfigError(
                f"the rule {self.group['algorithm']!r} returned directions {tuple(answer.D.shape)} and scales "
                f"{tuple(answer.scale.shape)} for matrices {tuple(A.shape)}, expected {tuple(A.shape)} and {(len(A),)}"
            )
        scale, seen = self._related(answer.scale, state) if "nuclear_mean" in state else (answer.scale, {})
        ok = answer.D.sum((-2, -1)) if answer.nuclear_norm is None else answer.nuclear_norm
        ok = is_finite(ok) & is_finite(scale)
        if held:
            self._keep(held, rows, {**answer.state, **seen}, ok)
        facts.learnt([m.index for m in owners], answer, ok, A)
        if self.group["scale"] == "nuclear_shared":
            self._share_nuclear(answer.nuclear_norm, answer.scale, ok, facts)
        return answer.D, torch.stack([scale.double(), ok.double()], 1)


class Tall(Batch):
    """A tall matrix: its rows stay where they are, and its n x n problem is sent to its owner."""

    def __init__(self, bucket: Bucket, members: Sequence[Member], travel: Travel):
        super().__init__(bucket, members, travel)
        self._join(self.first.elementwise)
        e = self.entry
        self.triangle, self.slots = e.triangle, e.layout.world if e.bounded else 0
        self.pack: Callable[..., Tensor] = pack_triangle
        self.unpack: Callable[..., Tensor] = unpack_triangle
        if self.backend is not None:
            self.pack = partial(run_compiled, pack_triangle, self.backend)
            self.unpack = partial(run_compiled, unpack_triangle, self.backend)

    def run(self, facts: Facts) -> Steps:
        """The matrix's step."""
        e, device = self.entry, self.travel.device
        n, owner = e.shape[1], e.owners[0]
        A = self.momentum()[0, 0]
        if e.centred:
            total = A.sum(0, dtype=torch.float64).to(device)
            if self.team.group is not None:
                total = yield self.travel.traffic.all_reduce(total, self.team.group)
            A = A - (total / e.shape[0]).to(A)
        S = facts.timed(e.role, device, gram_matrix, A.to(device))
        columns, largest = S[:0, 0], S.new_zeros(())
        if e.bounded:
            columns, largest = facts.timed(e.role, device, norm_parts, A.to(device))
        if self.team.group is None:
            X, numbers = self._root(S, columns, largest, facts)
        else:
            at, traffic = self.team.order.index(owner), self.travel.traffic
            rows = [largest.view(1) if place == self.place else S.new_zeros(1) for place in range(self.slots)]
            sums = yield traffic.reduce(torch.cat([self.pack(S), columns, *rows]), at, self.team.group)
            message = S.new_empty((n * n if e.bounded else self.triangle) + ROOT_NUMBERS)
            if self.place == owner:
                packed, columns, slots = sums.split([self.triangle, len(columns), len(rows)])
                largest = slots.amax() if e.bounded else largest
                X, numbers = self._root(self.unpack(packed, n), columns, largest, facts)
                message = torch.cat([X.reshape(-1) if e.bounded else self.pack(X), numbers])
            message = yield traffic.broadcast(message, at, self.team.group)
            root, numbers = message[:-ROOT_NUMBERS], message[-ROOT_NUMBERS:]
            X = root.view(n, n) if e.bounded else self.unpack(root, n)
        numbers, ok = numbers.to(self.first.device), self.travel.ok
        good = numbers[3] > 0
        good = good if ok is None else good & ok.to(good.device)
        # Strict mode: an fp32 product would lose directions this small.
        precise = self.group["lower"] < 1e-4
        factor, first, D = RowFactor(X, A.dtype, precise=precise), 0, A[:0]
        if e.pauses:
            D = factor.apply(A.to(device)).to(self.first.device)
            yield from self.controlled(D[None, None], numbers[0], good, facts)
        else:
            for part in self.bucket.portions:
                start, stop, _ = part.rows.indices(len(A))
                # Multiply as many rows at a time as suit the device, however few are shared at a time.
                if stop > first + len(D):
                    first = start
                    some = A[first : max(stop, first + rows_at_once(A))].to(device)
                    D = facts.timed(e.role, device, factor.apply, some).to(self.first.device)
                changed = self.advance(part, D[None, None, start - first : stop - first], good, numbers[0])
                if changed is not None:
                    self.arrived(part, (yield self.share(part, changed)))
        if self._kept or self.loose:
            self.settle()

    def _root(self, S: Tensor, columns: Tensor, largest: Tensor, facts: Facts) -> tuple[Tensor, Tensor]:
        """X (n, n), and ROOT_NUMBERS: scale, largest and smallest singular value, whether it may be used."""
        e, given = self.entry, S.clone() if self.first.index in facts.keep else None
        assert e.split is not None
        try:
            bound = norm_bound(columns, largest) if e.bounded else None
            held: dict[str, Tensor] = {}
            if e.in_order:
                rows = self._rows([self.first.owner_rows[0]])
                held = self.first.owner_state((e.split.rows, e.split.cols))
            state = {key: value[rows] for key, value in held.items()}
            asked = S, e.shape[0], self.group, bound
            root, scales = facts.timed(e.role, S.device, self.rule.root, *asked)
            scales, after = self._related(scales, state) if "nuclear_mean" in state else (scales, {})
        # As in `Owned.directed`.
        except Exception as error:
            facts.failed(self.first.index, error)
            return torch.zeros_like(S), S.new_zeros(ROOT_NUMBERS)
        scale = scales[0]
        ok = is_finite(root.nuclear_norm) & is_finite(scale)
        if held:
            self._keep(held, rows, after, ok.view(1))
        facts.learnt_root(self.first.index, root, ok, given)
        if self.group["scale"] == "nuclear_shared":
            self._share_nuclear(root.nuclear_norm, scale, ok, facts)
        return root.X, torch.stack([scale, root.sigma_max, root.sigma_min, ok.double()])


class Elementwise(Batch):
    """Parameters that are stepped element by element: of any shape, or of one shape if copies share the work."""

    def run(self, facts: Facts) -> Steps:
        """The bucket's step."""
        message = self._updated(facts)
        if message is not None:
            for part in self.bucket.portions:
                self.arrived(part, (yield self.share(part, message[part.items, :, part.rows])))

    def _updated(self, facts: Facts) -> Tensor | None:
        """Steps the weights; returns what to send to copies, (items, 1, rows, columns), if any."""
        weights = [m.canonical(m.p, m.shard) for m in self.members]
        dtype, ok = self.first.state_dtype, self.travel.ok
        grads = self.travel.shrunk([self.travel.gradient(m).to(dtype) for m in self.members])
        finite = is_finite(torch.stack(torch._foreach_norm(grads)))
        facts.finite([m.index for m in self.members], finite)
        sure = finite.all() if ok is None else finite.all() & ok.to(finite.device)
        host = sure.device.type == "cpu" and ok is None
        # On a GPU the host cannot look, so a non-finite gradient skips the whole bucket.
        good = finite.tolist() if host else [True] * len(weights)
        values = weights
        low: Tensor | None = None
        old: Tensor | None = None
        if self.shares or weights[0].element_size() < 4:
            old = torch.cat([w.reshape(-1) for w in weights])
            if self.entry.dtype == torch.bfloat16:
                low = torch.cat([m.held("low_bits").reshape(-1) for m in self.members])
                x = run_compiled(join_bf16, self.backend, old, low, dynamic=True)
            else:
                x = old.to(dtype, copy=True)
            values = _like(x, weights)
        some = [i for i, w in enumerate(weights) if w.numel() and good[i]]
        for m, w in zip(self.members, weights, strict=True):
            # The step count of an empty shard is saved too, and may be loaded where the shard is not empty.
            if not w.numel():
                m.state["step"] += 1 if host else sure.to(m.state["step"])
        self.rule.update(
            [values[i] for i in some], [grads[i] for i in some],
            {key: [self.members[i].held(key) for i in some] for key in self.rule.states(self.group)},
            [self.members[i].state["step"] for i in some], self.group, None if host else (~sure).float(),
        )  # fmt: skip
        return None if old is None else self._written(weights, old, x, low)

    def _written(self, weights: list[Tensor], old: Tensor, x: Tensor, low: Tensor | None) -> Tensor | None:
        """Writes the concatenated new weights x into the parameters, or returns what to send to copies."""
        if self.shares and self.travel.dtype is not None and old.element_size() >= 4:
            return (x - old).to(self.travel.dtype).view(len(weights), *weights[0].shape)
        new = x.to(old.dtype) if low is None else run_compiled(split_bf16, self.backend, x, low, dynamic=True)
        if low is not None:
            held = [m.held("low_bits") for m in self.members]
            torch._foreach_copy_(held, _like(low, held))
        if self.shares:
            return new.view(len(weights), *weights[0].shape)
        torch._foreach_copy_(weights, _like(new, weights))
        return None


KINDS: dict[str, type[Batch]] = {"owner": Owned, "tall": Tall, "elementwise": Elementwise}


class Schedule(NamedTuple):
    """This rank's buckets, and the orders in which they are resumed: before the sums over ranks, and after."""

    batches: list[Batch]
    orders: list[list[int]]


def run(schedule: Schedule, facts: Facts, between: Callable[[], None] | None) -> None:
    """Resumes the buckets in the first order, after which some pause, calls ``between``, and resumes them in the second."""
    running = [batch.run(facts) for batch in schedule.batches]
    started: list[Started | None] = [None] * len(running)
    for order in schedule.orders:
        for number in order:
            on_its_way, started[number] = started[number], None
            arrived = None
            if on_its_way is not None:
                on_its_way.work.wait()
                arrived = on_its_way.out
            # This also frees the buffer it was sent from.
            del on_its_way
            # The coroutine may have come to its end.
            with suppress(StopIteration):
                started[number] = running[number].send(arrived)  # type: ignore[arg-type]
            del arrived
        if between is not None and order is schedule.orders[0]:
            between()


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive parts of ``flat`` in the shapes of these tensors."""
    pieces = flat.split([x.numel() for x in tensors])
    return [piece.view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]


def joined(views: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Tensors of one shape stacked, and whether the stack is a view: it is if they are adjacent in memory."""
    first = views[0]
    if len(views) == 1:
        return first.unsqueeze(0), True
    size, at = first.numel(), first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    together = all(
        v.is_contiguous()
        and v.untyped_storage().data_ptr() == storage
        and v.storage_offset() == at + i * size
        for i, v in enumerate(views)
    )
    if together:
        return first.as_strided((len(views), *first.shape), (size, *first.stride())), True
    return torch.stack(list(views)), False
