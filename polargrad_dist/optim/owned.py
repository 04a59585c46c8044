"""Whole matrices: momentum on this rank's shards, matrices to their owners, directions back.

Where nothing has to travel the same code works on views of what is here. (`Tall` and `Elementwise`, whose elements stay where
they lie, are in `shards`.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polargrad_dist.distributed.layout import Cut3, overlap, volume
from polargrad_dist.distributed.plan import NUMBERS
from polargrad_dist.distributed.schedule import Bucket
from polargrad_dist.distributed.transport import Started
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.batch import Batch, Steps
from polargrad_dist.optim.control import controlled, share_nuclear
from polargrad_dist.optim.facts import Facts
from polargrad_dist.optim.matrix import Direction
from polargrad_dist.optim.member import Member, Travel, slices
from polargrad_dist.polar.oracle import is_finite


class Owned(Batch):
    """Alike matrix parameters: each matrix is whole for a moment at its owner."""

    def __init__(self, bucket: Bucket, members: Sequence[Member], travel: Travel):
        super().__init__(bucket, members, travel)
        self._join(self.first.elementwise)
        e = self.entry
        assert e.split is not None
        self.split = e.split
        self.wire_dtype = travel.dtype or e.dtype
        self.momentum_dtype = travel.dtype or e.momentum_dtype
        per_slice = len(e.owners) // self.split.stack
        order = self.team.order if self.team.group is not None else [0]
        owned: dict[int, list[tuple[int, int]]] = {place: [] for place in order}
        for i, item in enumerate(bucket.items):
            for j in range(item.first * per_slice, item.last * per_slice):
                owned[self.members[i].entry.owners[j]].append((i, j))
        for matrices in owned.values():
            matrices.sort(key=lambda ij: (self.split.stored_shape(ij[1]), ij))
        self.owned, self.mine = [owned[place] for place in order], owned[self.place]
        self.shapes = [self.split.stored_shape(j) for _, j in self.mine]
        boxes = [self._window(e.rectangles[place]) for place in order]
        self._index(self._window(e.rectangles[self.place]))
        here = self._window(e.rectangles[self.place])
        # The same pieces go to an owner and come back: of all matrices what lies here, of those owned here what lies where.
        self.parts = [
            [(i, slices(overlap(here, self.split.matrices[j]))) for i, j in own] for own in self.owned
        ]
        self.gaps = [[overlap(self.split.matrices[j], box) for _, j in self.mine] for box in boxes]
        self.sent = [sum(volume(overlap(here, self.split.matrices[j])) for _, j in own) for own in self.owned]
        self.received = [sum(map(volume, cuts)) for cuts in self.gaps]
        alike = len({tuple(b - a for a, b in box) for box in boxes}) == 1 and boxes == sorted(boxes)
        axes = [axis for axis in range(3) if len({box[axis] for box in boxes}) > 1]
        in_turn = [ij for own in self.owned for ij in own] == [(i, 0) for i in range(len(self.members))]
        # Then all pieces are of one shape, in the order of ranks, and put together by moving one dimension.
        self.even = alike and in_turn and len(e.owners) == len(axes) == 1
        self.axis_cut = axes[0] if axes else 0

    def _window(self, box: Cut3) -> Cut3:
        """A place's rectangle, of the bucket's slices only."""
        return box if self.slab == slice(None) else ((self.slab.start, self.slab.stop), *box[1:])

    def _index(self, here: Cut3) -> None:
        """Fills in `arrival` and `index`."""
        arrival = [ij for own in self.owned for ij in own] if self.entry.travels else self.mine
        self.arrival = arrival
        if arrival == [(i, 0) for i in range(len(self.members))]:
            return
        several = len(self.split.matrices) > self.split.stack
        by_rows, by_cols = several and not self.split.transposed, several and self.split.transposed
        depth, rows, cols = (b - a for a, b in here)
        index = torch.zeros(
            len(self.members), depth, rows if by_rows else 1, cols if by_cols else 1, dtype=torch.int64
        )
        for at, (i, j) in enumerate(arrival):
            deep, down, across = slices(overlap(here, self.split.matrices[j]))
            index[i, deep, down if by_rows else slice(None), across if by_cols else slice(None)] = at
        self.index = index.to(self.travel.device)

    def run(self, facts: Facts) -> Steps:
        """The bucket's step."""
        A = self.momentum()
        shape = A.shape
        if self.entry.travels:
            started = self._to_owners(A.to(self.travel.device, self.momentum_dtype))
            del A
            D, numbers = self.directed(self._assembled((yield started)), facts)
            started = self._to_shards([d.to(self.wire_dtype) for d in D], numbers)
            del D
            direction, numbers = self._pieces((yield started), shape)
        else:
            D, numbers = self.directed(self._whole_here(A.to(self.travel.device)), facts)
            direction = self._as_shards(D, shape)
            numbers = numbers if self.mine else numbers.new_ones(1, NUMBERS)  # of no elements here
            del A, D
        scales, good = self.spread(numbers).to(self.first.device).unbind(-1)
        good = self.travel.sure(good > 0)
        direction = direction.to(self.first.device)
        if self.entry.pauses:
            yield from controlled(self, direction, scales, good, facts)
            return self.settle()
        for part in self.bucket.portions:
            own = part.items, slice(None), part.rows if good.shape[2] > 1 else slice(None)
            message = self.advance(part, direction[part.items, :, part.rows], scales[own], good[own])
            if message is not None:
                self.arrived(part, (yield self.share(part, message)))
        self.settle()

    def directed(self, batches: list[Tensor], facts: Facts) -> tuple[list[Tensor], Tensor]:
        """The rule, on this rank's matrices: their directions, and (matrices, NUMBERS) in fp64.

        A failure of the rule gives zeros that are not stepped, no exception: the other ranks must not be left waiting.
        """
        out, numbers, at = [], [batches[0].new_empty(0, NUMBERS, dtype=torch.float64)], 0
        for A in batches:
            owners = [self.members[i] for i, _ in self.mine[at : at + len(A)]]
            try:
                D, figures = self._ruled(A, owners, at, facts) if owners else (A, numbers[0])
            except Exception as error:  # whatever it is, all ranks raise it together after the step
                facts.failed(owners[0], error)
                D, figures = torch.zeros_like(A), A.new_zeros(len(A), NUMBERS, dtype=torch.float64)
            out.append(D)
            numbers.append(figures)
            at += len(A)
        return out, torch.cat(numbers) if len(numbers) > 2 else numbers[1]

    def _ruled(self, A: Tensor, owners: list[Member], at: int, facts: Facts) -> tuple[Tensor, Tensor]:
        """The rule on alike matrices A (k, m, n) of these parameters, the first of them number ``at`` of this rank's."""
        rows = (
            [self.members[i].owner_rows[j] for i, j in self.mine[at : at + len(A)]]
            if self.entry.in_order
            else []
        )
        held = self.first.owner_state((A.shape[1], A.shape[2])) if rows else {}
        with facts.clock(self.entry.role, A.device):
            answer = self.rule.direction(A, {key: value[rows] for key, value in held.items()}, self.group)
        if not isinstance(answer, Direction):
            kind = type(answer).__name__
            raise ConfigError(
                f"the rule {self.group['algorithm']!r} gives a {kind}, expected a polargrad_dist.Direction"
            )
        if answer.D.shape != A.shape or answer.scale.shape != A.shape[:1]:
            raise ConfigError(
                f"the rule {self.group['algorithm']!r} gives directions {tuple(answer.D.shape)} and scales "
                f"{tuple(answer.scale.shape)} for matrices {tuple(A.shape)}, expected {tuple(A.shape)} and {(len(A),)}"
            )
        ok = answer.D.sum((-2, -1)) if answer.nuclear_norm is None else answer.nuclear_norm
        ok = is_finite(ok) & is_finite(answer.scale)
        keep = self.travel.sure(ok)
        for key, value in held.items():
            value[rows] = torch.where(
                keep.view(-1, *[1] * (value.ndim - 1)), answer.state[key].to(value.dtype), value[rows]
            )
        facts.learnt(owners, answer, ok, A)
        if self.group["scale"] == "nuclear_shared":
            share_nuclear(self, answer.nuclear_norm, answer.scale, ok, facts)
        return answer.D, torch.stack([answer.scale.double(), ok.double()], 1)

    def _to_owners(self, A: Tensor) -> Started:
        """Starts sending this rank's pieces of all matrices."""
        flat = A.reshape(-1) if self.even else A.new_empty(sum(self.sent))
        if not self.even:
            _copy(flat, [A[i][cut] for own in self.parts for i, cut in own], into_views=False)
        assert self.team.group is not None
        return self.travel.traffic.all_to_all(flat, self.sent, self.received, self.team.group)

    def _assembled(self, received: Tensor) -> list[Tensor]:
        """This rank's matrices put together, those of one shape as (k, m, n), in at least fp32."""
        wide = torch.promote_types(received.dtype, torch.float32)
        if self.even:
            piece = [b - a for a, b in self.entry.rectangles[self.place]][1:]
            parts = received.view(len(self.gaps), len(self.mine), *piece).movedim(0, self.axis_cut)
            return [parts.reshape(len(self.mine), self.split.rows, self.split.cols).to(wide)]
        batches = self._new_batches(received)
        _copy(received, self._gap_views(batches), into_views=True)
        return [batch.to(wide) for batch in batches]

    def _new_batches(self, like: Tensor) -> list[Tensor]:
        """Room for this rank's matrices, those of one shape together; one empty batch where there are none."""
        kinds = list(dict.fromkeys(self.shapes)) or [(1, 1)]
        return [like.new_empty(self.shapes.count(shape), *shape) for shape in kinds]

    def _as_stored(self, batch: Tensor) -> Tensor:
        """Matrices (k, m, n) as stretches of them lie in the parameter."""
        return batch.flatten(1).unsqueeze(-1) if self.split.flattened else batch

    def _gap_views(self, batches: list[Tensor]) -> list[Tensor]:
        """Of this rank's matrices, rank by rank of the group, the pieces that lie there."""
        matrices = [matrix.unsqueeze(0) for batch in batches for matrix in self._as_stored(batch)]
        return [m[slices(cut)] for cuts in self.gaps for m, cut in zip(matrices, cuts, strict=True)]

    def _to_shards(self, D: list[Tensor], numbers: Tensor) -> Started:
        """Starts sending each rank its pieces of this rank's directions, behind the numbers of these matrices."""
        bits, ranks = numbers.reshape(-1).view(D[0].dtype), len(self.gaps)
        if self.even:
            parts = (
                self._as_stored(D[0])
                .unflatten(self.axis_cut, (ranks, -1))
                .movedim(self.axis_cut, 0)
                .reshape(ranks, -1)
            )
            flat = torch.cat([bits.expand(ranks, -1), parts], 1).view(-1)
        else:
            flat, views, count = (
                D[0].new_empty(ranks * len(bits) + sum(self.received)),
                self._gap_views(D),
                len(self.mine),
            )
            _copy(
                flat,
                [x for k in range(ranks) for x in (bits, *views[k * count : (k + 1) * count])],
                into_views=False,
            )
        each = 8 // bits.element_size() * NUMBERS
        back = [each * len(own) + sent for own, sent in zip(self.owned, self.sent, strict=True)]
        given = [len(bits) + received for received in self.received]
        assert self.team.group is not None
        return self.travel.traffic.all_to_all(flat, given, back, self.team.group)

    def _pieces(self, received: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """This rank's shards of the directions (items, slices, rows, columns), and the numbers of all matrices."""
        each = 8 // received.element_size() * NUMBERS
        stretches = received.split(
            [
                size
                for own, sent in zip(self.owned, self.sent, strict=True)
                for size in (each * len(own), sent)
            ]
        )
        numbers = torch.cat(stretches[::2]).view(torch.float64).view(-1, NUMBERS)
        if self.even:
            return torch.cat(stretches[1::2]).view(shape), numbers
        D = received.new_empty(shape)
        for own, stretch in zip(self.parts, stretches[1::2], strict=True):
            _copy(stretch, [D[i][cut] for i, cut in own], into_views=True)
        return D, numbers

    @property
    def _in_a_row(self) -> bool:
        """Whether shards that hold whole matrices are nothing but matrices of one shape, one after the other."""
        runs = self.split.runs
        return len(runs) == 1 and not (self.split.transposed and runs[0][1] > 1)

    def _whole_here(self, A: Tensor) -> list[Tensor]:
        """The matrices of shards that hold them whole: views where they follow one another."""
        if self._in_a_row and self.mine:
            return [A.reshape(-1, *self.shapes[0])]
        batches = self._new_batches(A)
        matrices = [m for batch in batches for m in batch]
        if matrices:
            torch._foreach_copy_(matrices, [A[i][cut].squeeze(0) for i, cut in self._cuts_here()])
        return batches

    def _as_shards(self, D: list[Tensor], shape: torch.Size) -> Tensor:
        """The directions of `_whole_here` as shards."""
        if self._in_a_row and self.mine:
            return D[0].reshape(shape)
        out = D[0].new_zeros(shape)
        if self.mine:
            torch._foreach_copy_(
                [out[i][cut].squeeze(0) for i, cut in self._cuts_here()], [d for batch in D for d in batch]
            )
        return out

    def _cuts_here(self) -> list[tuple[int, tuple[slice, ...]]]:
        here = self._window(self.entry.rectangles[self.place])
        return [(i, slices(overlap(here, self.split.matrices[j]))) for i, j in self.mine]


def _copy(flat: Tensor, views: list[Tensor], *, into_views: bool) -> None:
    """The views in turn from stretches of ``flat``, or the other way round."""
    if views:
        stretches = [
            s.view(v.shape) for s, v in zip(flat.split([v.numel() for v in views]), views, strict=True)
        ]
        torch._foreach_copy_(views, stretches) if into_views else torch._foreach_copy_(stretches, views)
