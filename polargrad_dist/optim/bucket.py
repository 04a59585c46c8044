"""A bucket's step: a coroutine that yields each collective it starts, and is resumed with the result.

`Owned` sends whole matrices to their owners and receives directions. Of a `Tall` matrix the rows stay, and only an n x n
problem is sent. `Elementwise` updates each element on its own. All step weights and send them as `batch` has it.
`distributed.transport` cuts and assembles matrices; `matrix` has the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from polargrad_dist.compiled import run_compiled
from polargrad_dist.distributed.layout import Cut3, overlap, slices
from polargrad_dist.distributed.plan import NUMBERS, ROOT_NUMBERS
from polargrad_dist.distributed.schedule import Bucket
from polargrad_dist.distributed.transport import Exchange, Started, pack_triangle, unpack_triangle
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.batch import Batch, Steps
from polargrad_dist.optim.elements import join_bf16, split_bf16
from polargrad_dist.optim.facts import Facts
from polargrad_dist.optim.matrix import Direction
from polargrad_dist.optim.member import Member, Travel
from polargrad_dist.polar import RowFactor, gram_matrix, norm_bound, norm_parts
from polargrad_dist.polar.oracle import is_finite, rows_at_once


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
        index = torch.zeros(size, dtype=torch.int64, device="cpu")
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
        scale = answer.scale
        seen: dict[str, Tensor] = {}
        if "nuclear_mean" in state:
            scale, seen = self._related(scale, state, A.shape[1:])
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
            after: dict[str, Tensor] = {}
            if "nuclear_mean" in state:
                scales, after = self._related(scales, state, (e.split.rows, e.split.cols))
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
