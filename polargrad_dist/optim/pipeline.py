"""How the matrices of one grid get stepped together: what travels when, written once for DDP, FSDP2 and HSDP.

Row-sharded matrices: `start_tall` sums Gram matrices, `solve_tall` takes the root at the owner, `finish_tall` multiplies
the rows. Whole ones go in `Round`s: to their owners, through the oracle, back. Where there are replicas, all steps are
shared by an `UpdateStream`. Every rank makes the same calls in the same order, whatever it owns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from polargrad_dist.distributed.grid import Grid
from polargrad_dist.distributed.plan import chunk
from polargrad_dist.distributed.transport import (
    Exchange,
    Traffic,
    UpdateStream,
    broadcast_from,
    pack_triangle,
    reduce_to,
    unpack_triangle,
    wait,
)
from polargrad_dist.errors import PolarError
from polargrad_dist.optim.rules import step_scale
from polargrad_dist.optim.update import NAN, Facts, Work, apply_step, local, orthogonalize, source, step_of
from polargrad_dist.polar import apply_rows, gram_matrix, inverse_sqrt

ROWS = 4096  # rows of a tall matrix that are multiplied and handed on at a time

Deliver = Callable[[Work, int, torch.Tensor], None]


@dataclass
class Travel:
    """The choices of how things travel: counted by ``traffic``, in ``dtype`` (None: the parameters'), by ``bucket`` bytes."""

    traffic: Traffic
    dtype: torch.dtype | None
    bucket: int

    def dtype_of(self, works: list[Work]) -> torch.dtype:
        """The one type in which the momenta or updates of these parameters travel together."""
        if self.dtype is not None:
            return self.dtype
        widest = works[0].p.dtype
        for work in works:
            widest = torch.promote_types(widest, work.p.dtype)
        return widest


@dataclass
class Tall:
    """A row-sharded matrix in the middle of its step: its rows here, and the packed n x n problem on its way."""

    work: Work
    rows: torch.Tensor
    packed: torch.Tensor
    pending: Any


def start_tall(work: Work, travel: Travel, facts: Facts) -> Tall:
    """Moves the momentum of this rank's rows, and starts summing their Gram matrices at the owner."""
    rows, n = local(work.p).shape
    first, last = work.grid.my_rows(rows)
    with facts.clock(work.entry.role, work.p.device):
        mine = source(work, work.grad[first * n : last * n]).view(-1, n)
        packed = pack_triangle(gram_matrix(mine))
    return Tall(work, mine, packed, reduce_to(packed, work.owner, work.grid, travel.traffic))


def solve_tall(tall: Tall, travel: Travel, facts: Facts) -> None:
    """The owner takes the inverse square root of the summed Gram matrix; all ranks get the owner's bits."""
    work, n = tall.work, tall.work.cols
    wait(tall.pending)
    answer = tall.packed.new_empty(tall.packed.numel() + 3)
    if work.grid.rank == work.entry.owner:
        with facts.clock(work.entry.role, answer.device):
            try:
                S = unpack_triangle(tall.packed, n)
                kept = S.clone() if work.index in facts.keep else None
                homogenized = work.group["spectrum"] == "homogenized"
                root = inverse_sqrt(S, lower=work.group["lower"], homogenized=homogenized)
                if kept is not None:
                    facts.kept_gram[work.index] = (kept, root.X)
                answer[:-3] = pack_triangle(root.X)
                answer[-3:] = torch.stack([root.nuclear_norm, root.sigma_max, root.sigma_min])
            except (RuntimeError, PolarError):
                answer.fill_(NAN)
        facts.values[work.index] = torch.cat([answer[-3:], answer.new_tensor([NAN])])
        facts.flag(work.index, ~answer[-3].isfinite())
    tall.packed, tall.pending = answer, broadcast_from(answer, work.owner, work.grid, travel.traffic)


def finish_tall(tall: Tall, travel: Travel, facts: Facts, deliver: Deliver) -> None:
    """Each rank multiplies its own rows; where nobody else needs them, straight into the parameter."""
    work, group, n = tall.work, tall.work.group, tall.work.cols
    wait(tall.pending)
    root, nuclear = unpack_triangle(tall.packed[:-3], n), tall.packed[-3]
    constant = step_scale(group["scale"], work.entry.shape[0], n)
    scale = nuclear if group["scale"] == "nuclear" else torch.full_like(nuclear, constant)
    precise = group["lower"] < 1e-4  # strict: directions that an fp32 product would lose
    alone = work.grid.replicas == 1 and not group["cautious"] and "residual" not in work.state
    with facts.clock(work.entry.role, work.p.device):
        if alone and group["momentum"] != "polar_first" and work.p.element_size() >= 4:
            target = local(work.p)
            if decay := group["lr"] * group["weight_decay"]:
                target.mul_(1 - decay)
            apply_rows(tall.rows, root * (scale * -group["lr"]), out=target, precise=precise)
            return
        first, _ = work.grid.my_rows(local(work.p).shape[0])
        for at in range(0, tall.rows.shape[0], ROWS):
            u = apply_rows(tall.rows[at : at + ROWS], root, precise=precise)
            deliver(work, (first + at) * n, step_of(work, u, scale.expand(u.shape[0]), at * n))


class Round:
    """One batch of alike matrices at every owner of a replica, from the momentum held here to the steps stored here."""

    def __init__(self, grid: Grid, batches: list[list[Work]], travel: Travel, facts: Facts):
        """``batches[s]`` is what shard rank s of this replica computes. Starts sending, where matrices are sharded."""
        self.works, self.mine = [w for batch in batches for w in batch], batches[grid.shard]
        self.grid, self.travel, self.facts = grid, travel, facts
        self.polar_first = any(w.group["momentum"] == "polar_first" for w in self.works)
        self.exchange: Exchange | None = None
        if grid.sharding is not None:
            pieces = [source(work, work.grad) for work in self.works]
            held = [[[w.entry.held(t) for t in range(grid.shards)] for w in batch] for batch in batches]
            dtype = travel.dtype_of(self.works)
            self.exchange = Exchange(grid, travel.traffic, held)
            self.exchange.send(torch.cat([piece.to(dtype) for piece in pieces]))

    def compute(self) -> None:
        """The oracle, on this rank's matrices; starts sending back."""
        if self.exchange is None:
            self.stack = torch.stack([source(work, work.grad) for work in self.mine])
            self.scales = orthogonalize(self.mine, self.stack, self.facts)
            return
        travelling = self.exchange.matrices()
        stack = travelling.to(torch.promote_types(travelling.dtype, torch.float32))
        scales = orthogonalize(self.mine, stack, self.facts) if self.mine else stack.new_empty(0)
        if self.polar_first:
            self._share_scales(scales)
        elif self.mine:  # the scale travels inside the factor
            stack = (stack.view(*scales.shape, -1) * scales.unsqueeze(-1)).view(len(self.mine), -1)
        self.exchange.send_back(stack.to(travelling.dtype))

    def _share_scales(self, scales: torch.Tensor) -> None:
        """Polar-first momentum takes in the bare factor, so the scale of each row of the round travels beside it."""
        assert self.grid.sharding is not None
        rows = {w.index: w.entry.numel // w.cols for w in self.works}
        self.scales = scales.new_zeros(sum(rows.values()))
        if self.mine:
            at = sum(rows[w.index] for w in self.works[: self.works.index(self.mine[0])])
            self.scales[at : at + scales.numel()] = scales.view(-1)
        self.pending = self.travel.traffic.all_reduce(self.scales, self.grid.sharding)

    def finish(self, deliver: Deliver) -> None:
        """Waits for the results, makes them steps, and hands these on."""
        if self.exchange is None:
            for work, u, scales in zip(self.mine, self.stack, self.scales, strict=True):
                deliver(work, 0, step_of(work, u, scales))
            return
        pieces = self.exchange.results().split([w.entry.held(self.grid.shard) for w in self.works])
        if self.polar_first:
            self.pending.wait()
        at = 0
        for work, piece in zip(self.works, pieces, strict=True):
            if self.polar_first:
                before = sum(work.entry.held(t) for t in range(self.grid.shard))
                first, last = before // work.cols, (before + piece.numel()) // work.cols
                scales = self.scales[at + first : at + last]
                at += work.entry.numel // work.cols
            else:
                scales = piece.new_ones(piece.numel() // work.cols)
            deliver(work, 0, step_of(work, piece, scales))


def step_grid(grid: Grid, works: list[Work], talls: list[Tall], travel: Travel, facts: Facts) -> None:
    """Steps the whole matrices of one grid in rounds, then the rows of its tall ones."""
    owners = [batches(works, rank, travel.bucket) for rank in range(grid.world)]
    stream = open_stream(grid, owners, talls, travel) if grid.replicas > 1 else None

    def deliver(work: Work, first: int, step: torch.Tensor) -> None:
        facts.bytes[work.entry.role] += (
            step.numel() * travel.dtype_of([work]).itemsize if grid.world > 1 else 0
        )
        if stream is not None:
            stream.write(step)
        else:
            apply_step(work, first, first + step.numel(), step)

    mine = owners[grid.replica * grid.shards : (grid.replica + 1) * grid.shards]
    before: Round | None = None
    coming: Round | None = None
    for batch in [*in_rounds(mine), None]:
        current, coming = coming, Round(grid, batch, travel, facts) if batch else None
        if current is not None:
            current.compute()
        if before is not None:
            before.finish(deliver)
        before = current
    if before is not None:
        before.finish(deliver)
    for tall in talls:
        finish_tall(tall, travel, facts, deliver)
    if stream is not None:
        stream.finish()


def batches(works: list[Work], rank: int, bucket: int) -> list[list[Work]]:
    """An owner's matrices in the order in which it computes them: alike in group and shape, up to a bucket's bytes."""
    kinds: dict[tuple, list[Work]] = defaultdict(list)
    for work in works:
        if work.entry.owner == rank:
            kinds[(id(work.group), work.entry.shape, work.p.dtype)].append(work)
    cut = []
    for alike in kinds.values():
        size = max(1, bucket // max(1, alike[0].entry.bytes))
        cut += [alike[i : i + size] for i in range(0, len(alike), size)]
    return cut


def in_rounds(owners: list[list[list[Work]]]) -> list[list[list[Work]]]:
    """Round k is the k-th batch of each owner, empty where it has none left."""
    count = max(map(len, owners), default=0)
    return [[own[k] if k < len(own) else [] for own in owners] for k in range(count)]


def open_stream(
    grid: Grid, owners: list[list[list[Work]]], talls: list[Tall], travel: Travel
) -> UpdateStream:
    """The stream in which replicas share their steps: who writes what, in which order, is known to all beforehand."""
    segments: list[list[tuple[Work, int, int]]] = []
    for replica in range(grid.replicas):
        theirs = owners[replica * grid.shards : (replica + 1) * grid.shards]
        own = [(w, 0, w.flat.numel()) for batch in in_rounds(theirs) for owned in batch for w in owned]
        for tall in talls:
            rows, n = local(tall.work.p).shape
            first, last = chunk(rows, grid.replicas, replica)
            own.append((tall.work, first * n, last * n))
        segments.append(own)
    works = [work for own in segments for work, _, _ in own]
    like = works[0].flat.new_empty(0, dtype=travel.dtype_of(works))
    return UpdateStream(
        grid, travel.traffic, segments, max(1, travel.bucket // like.element_size()), like, apply_step
    )
