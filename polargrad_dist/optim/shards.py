"""Buckets whose elements stay where they lie: tall matrices, of which an n x n problem travels, and AdamW's parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polargrad_dist.compiled import run_compiled
from polargrad_dist.distributed.plan import ROOT_NUMBERS
from polargrad_dist.distributed.schedule import Bucket
from polargrad_dist.distributed.transport import pack_triangle, unpack_triangle
from polargrad_dist.optim.batch import Batch, Steps
from polargrad_dist.optim.control import controlled, share_nuclear
from polargrad_dist.optim.facts import Facts
from polargrad_dist.optim.member import Member, Travel
from polargrad_dist.optim.parts import join_bf16, split_bf16
from polargrad_dist.polar import RowFactor, gram_matrix, norm_bound, norm_parts
from polargrad_dist.polar.oracle import is_finite, rows_at_once


class Tall(Batch):
    """A tall matrix: its rows stay, its n x n problem goes to its owner."""

    def __init__(self, bucket: Bucket, members: Sequence[Member], travel: Travel):
        super().__init__(bucket, members, travel)
        self._join(self.first.elementwise)
        e = self.entry
        self.triangle, self.slots = e.triangle, e.layout.world if e.bounded else 0

    def run(self, facts: Facts) -> Steps:
        """The matrix's step."""
        e, device = self.entry, self.travel.device
        n, owner = e.shape[1], e.owners[0]
        with facts.clock(e.role, device):
            A = self.momentum()[0, 0]
        if e.centred:
            total = A.sum(0, dtype=torch.float64).to(device)
            if self.team.group is not None:
                total = yield self.travel.traffic.all_reduce(total, self.team.group)
            A = A - (total / e.shape[0]).to(A)
        with facts.clock(e.role, device):
            S = gram_matrix(A.to(device))
            columns, largest = norm_parts(A.to(device)) if e.bounded else (S[:0, 0], S.new_zeros(()))
        if self.team.group is None:
            X, numbers = self._root(S, columns, largest, facts)
        else:
            at, traffic = self.team.order.index(owner), self.travel.traffic
            rows = [largest.view(1) if place == self.place else S.new_zeros(1) for place in range(self.slots)]
            packed = run_compiled(pack_triangle, self.backend, S)
            sums = yield traffic.reduce(torch.cat([packed, columns, *rows]), at, self.team.group)
            message = S.new_empty((n * n if e.bounded else self.triangle) + ROOT_NUMBERS)
            if self.place == owner:
                packed, columns, slots = sums.split([self.triangle, len(columns), len(rows)])
                largest = slots.amax() if e.bounded else largest
                S = run_compiled(unpack_triangle, self.backend, packed, n)
                X, numbers = self._root(S, columns, largest, facts)
                packed = X.reshape(-1) if e.bounded else run_compiled(pack_triangle, self.backend, X)
                message = torch.cat([packed, numbers])
            message = yield traffic.broadcast(message, at, self.team.group)
            root, numbers = message[:-ROOT_NUMBERS], message[-ROOT_NUMBERS:]
            X = root.view(n, n) if e.bounded else run_compiled(unpack_triangle, self.backend, root, n)
        precise = self.group["lower"] < 1e-4  # strict: directions that an fp32 product would lose
        numbers = numbers.to(self.first.device)
        good = self.travel.sure(numbers[3] > 0)
        factor, first, D = RowFactor(X, A.dtype, precise=precise), 0, A[:0]
        if e.pauses:
            D = factor.apply(A.to(device)).to(self.first.device)
            yield from controlled(self, D[None, None], numbers[0], good, facts)
            return self.settle()
        for part in self.bucket.portions:
            start, stop, _ = part.rows.indices(len(A))
            if stop > first + len(D):  # as many rows at a time as suit the device, however few are shared
                first = start
                with facts.clock(e.role, device):
                    D = factor.apply(A[first : max(stop, first + rows_at_once(A))].to(device)).to(
                        self.first.device
                    )
            shard = D[None, None, start - first : stop - first]
            changed = self.advance(part, shard, numbers[0], good)
            if changed is not None:
                self.arrived(part, (yield self.share(part, changed)))
        self.settle()

    def _root(self, S: Tensor, columns: Tensor, largest: Tensor, facts: Facts) -> tuple[Tensor, Tensor]:
        """X (n, n), and ROOT_NUMBERS: scale, largest and smallest singular value, whether it may be used."""
        given = S.clone() if self.first.index in facts.keep else None
        try:
            with facts.clock(self.entry.role, S.device):
                bound = norm_bound(columns, largest) if self.entry.bounded else None
                assert self.entry.split is not None
                rows = [self.first.owner_rows[0]] if self.entry.in_order else []
                held = self.first.owner_state(self.entry.split.stored_shape(0)) if rows else {}
                before = {key: value[rows] for key, value in held.items()}
                root, scales, after = self.rule.root(S, self.entry.shape[0], self.group, bound, before)
        except Exception as error:  # as in `Owned.directed`
            facts.failed(self.first, error)
            return torch.zeros_like(S), S.new_zeros(ROOT_NUMBERS)
        ok, scale = is_finite(root.nuclear_norm), scales[0]
        for key, value in held.items():
            value[rows] = torch.where(self.travel.sure(ok), after[key].to(value), before[key])
        facts.learnt_root(self.first, root, ok, given)
        if self.group["scale"] == "nuclear_shared":
            share_nuclear(self, root.nuclear_norm, scale, ok, facts)
        return root.X, torch.stack([scale, root.sigma_max, root.sigma_min, ok.double()])


class Elementwise(Batch):
    """Parameters that are stepped element by element: of any shapes, or alike ones where copies share the work."""

    def run(self, facts: Facts) -> Steps:
        """The bucket's step."""
        message = self._updated(facts)
        if message is not None:
            for part in self.bucket.portions:
                self.arrived(part, (yield self.share(part, message[part.items, :, part.rows])))

    def _updated(self, facts: Facts) -> Tensor | None:
        """Steps the weights; returns what the copies are to be given, (items, 1, rows, columns)."""
        weights = [m.weight() for m in self.members]
        dtype, ok = self.first.state_dtype, self.travel.ok
        grads = self.travel.shrunk([self.travel.gradient(m).to(dtype) for m in self.members])
        finite = is_finite(torch.stack(torch._foreach_norm(grads)))
        facts.finite(self.members, finite)
        sure = finite.all() if ok is None else finite.all() & ok.to(finite.device)
        host = sure.device.type == "cpu" and ok is None
        good = (
            finite.tolist() if host else [True] * len(weights)
        )  # a GPU skips the bucket, where it cannot look
        values = weights
        low: Tensor | None = None
        old: Tensor | None = None
        if self.shares or weights[0].element_size() < 4:
            old = torch.cat([w.reshape(-1) for w in weights])
            if self.entry.dtype == torch.bfloat16:
                low = torch.cat([m.held("low_bits").reshape(-1) for m in self.members])
            x = (
                old.to(dtype, copy=True)
                if low is None
                else run_compiled(join_bf16, self.backend, old, low, dynamic=True)
            )
            values = [
                v.view(w.shape) for v, w in zip(x.split([w.numel() for w in weights]), weights, strict=True)
            ]
        some = [i for i, w in enumerate(weights) if w.numel() and good[i]]
        for m, w in zip(self.members, weights, strict=True):
            if not w.numel():  # its count is saved too, and loaded where the shard is not empty
                m.state["step"] += 1 if host else sure.to(m.state["step"])
        self.rule.update(
            [values[i] for i in some], [grads[i] for i in some],
            {key: [self.members[i].held(key) for i in some] for key in self.rule.states(self.group)},
            [self.members[i].state["step"] for i in some], self.group, None if host else (~sure).float(),
        )  # fmt: skip
        return None if old is None else self._written(weights, old, x, low)

    def _written(self, weights: list[Tensor], old: Tensor, x: Tensor, low: Tensor | None) -> Tensor | None:
        sizes = [w.numel() for w in weights]
        if self.shares and self.travel.dtype is not None and old.element_size() >= 4:
            return (x - old).to(self.travel.dtype).view(len(weights), *weights[0].shape)
        new = x.to(old.dtype) if low is None else run_compiled(split_bf16, self.backend, x, low, dynamic=True)
        if low is not None:
            held = [m.held("low_bits") for m in self.members]
            torch._foreach_copy_(held, [v.view(h.shape) for v, h in zip(low.split(sizes), held, strict=True)])
        if self.shares:
            return new.view(len(weights), *weights[0].shape)
        torch._foreach_copy_(
            weights, [v.view(w.shape) for v, w in zip(new.split(sizes), weights, strict=True)]
        )
        return None
