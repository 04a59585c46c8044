"""The end of a step whose length depends on norms of weights or on other matrices: a pause, then weights by `lengths`.

It works on the stacked shards of a bucket. All it knows about ranks is that `Facts.sums` are summed during the pause.
"The benchmark" is the one that `matrix` names.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polargrad_dist.distributed.layout import overlap, slices
from polargrad_dist.distributed.plan import Entry, sum_rows
from polargrad_dist.distributed.transport import Agreement
from polargrad_dist.errors import ConfigError

if TYPE_CHECKING:
    from polargrad_dist.optim.bucket import Batch, Member
    from polargrad_dist.optim.facts import Facts


def controlled(batch: Batch, D: Tensor, scale: Tensor, ok: Tensor, facts: Facts) -> Generator[Any, Any, None]:
    """`Batch.advance` for all portions of the bucket's direction D, with a pause until all ranks know the sums.

    ``scale`` and ``ok`` are broadcast against D (items, slices, rows, columns).
    """
    assert facts.sums is not None
    states = {k: v for k, v in batch.states.items() if k != "low_bits"}
    steps = torch.where(ok, batch.rule.apply(states, D, scale, batch.group), 0)
    weights = torch.stack([m.canonical(m.p, m.shard)[batch.slab] for m in batch.members]).to(steps.dtype)
    pairs = ((weights, weights), (weights, steps), (steps, steps))
    each = [per_matrix(a * b, batch.index, len(batch.arrival)) for a, b in pairs]
    del weights
    if batch.places is None:
        batch.places = facts.sums.places([(batch.members[i].entry, j) for i, j in batch.arrival])
    count = len(batch.places)
    if count and batch.entry.layout.counted(batch.place):
        facts.sums.add(batch.places, torch.stack(each, 1)[:count])
    yield None
    grow = shrink = steps.new_ones(1, 1, 1, 1)
    if count:
        sums, shared = facts.sums.values[batch.places], facts.sums.nuclear(batch.entry.role)
        grow, shrink = (batch.spread(x).to(steps) for x in lengths(batch.group, sums, shared))
    for part in batch.bucket.portions:
        rows = part.rows if grow.shape[2] > 1 else slice(None)
        step = steps[part.items, :, part.rows] * grow[part.items, :, rows]
        good = ok[part.items, :, rows] if ok.ndim else ok
        message = batch.advance(part, step, good, shrink=shrink[part.items, :, rows])
        if message is not None:
            batch.arrived(part, (yield batch.share(part, message)))


def lengths(group: Mapping[str, Any], sums: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of each matrix's step, and then of its new weights: (grow, shrink), fp64 (matrices,).

    ``sums`` (matrices, 3) are |W|^2, <W, S> and |S|^2 of weights and steps, ``shared`` (0-d) the role's sum_k s_k |M_k|_nuc.

    - scale "nuclear_shared": S shared^alpha. Here, on hidden matrices of a small model, 3.94 nats became 3.69.
    - floor f: |S| is at least lr f |W|. The benchmark: NorMuon without decay, f = 0.35, lr 0.0375, 3,250 (3.2771, n = 8).
    - control "hyperball": W <- |W| normalize(W + lr |W| S/|S|), so that |W| keeps its initial value (Wen 2026). The
      benchmark: Muon 3,250 (3.2786, n = 10) with lr 0.018, linear to zero over the whole run.
    """
    weight, step = sums[:, 0].sqrt(), sums[:, 2].sqrt()
    grow = torch.ones_like(step)
    if group["scale"] == "nuclear_shared":
        grow = grow * shared ** group["alpha"]
    if group["floor"]:
        target = group["floor"] * group["lr"] * weight
        grow = torch.where((step > 0) & (grow * step < target), target / step, grow)
    if group["control"] != "hyperball":
        return grow, torch.ones_like(grow)
    grow = torch.where(step > 0, group["lr"] * weight / step, grow)
    after = (sums[:, 0] + 2 * grow * sums[:, 1] + grow.square() * sums[:, 2]).sqrt()
    return grow, torch.where(after > 0, weight / after, 1.0)


def per_matrix(x: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Sums of x (items, slices, rows, columns) over this rank's part of each of ``count`` matrices, fp64.

    ``index``, broadcast against x, says which matrix each element belongs to; None for one matrix per item.
    """
    if index is None:
        return x.sum((1, 2, 3), dtype=torch.float64)
    across = [dim for dim in (2, 3) if index.shape[dim] == 1]
    part = (x.sum(across, keepdim=True, dtype=torch.float64) if across else x.double()).reshape(-1)
    which = torch.arange(max(1, count), device=x.device)
    # A product, not index_add: index_add on a GPU adds in any order, and a run must resume bit for bit.
    return (index.to(x.device).reshape(1, -1) == which[:, None]).double() @ part


def share_nuclear(batch: Batch, norms: Tensor | None, scale: Tensor, ok: Tensor, facts: Facts) -> None:
    """Adds the scaled nuclear norms of matrices that are owned here to their role's sum."""
    if norms is None:
        raise ConfigError(
            f"the rule {batch.group['algorithm']!r} returned no nuclear norms, expected them for scale 'nuclear_shared'"
        )
    assert facts.sums is not None
    facts.sums.add_nuclear(batch.entry, torch.where(ok, norms * scale, 0))


def refuse_zero(members: Sequence[Member], entries: Sequence[Entry], agreement: Agreement | None) -> None:
    """Raises ``ConfigError``, on all ranks, for a matrix of zeros with control "hyperball". A collective.

    ``entries`` are the parameters of all ranks, ``members`` those that are stored here.
    """
    rows = sum_rows(entries)
    if not rows:
        return
    seen = torch.zeros(len(rows), dtype=torch.int32)
    for m in members:
        if not m.entry.pauses or m.entry.split is None:
            continue
        here, weight = m.entry.rectangles[m.team.place], m.canonical(m.p, m.shard)
        free = m.group["control"] != "hyperball"
        for i, matrix in enumerate(m.entry.split.matrices):
            seen[rows[m.entry.key, i]] = free or bool(weight[slices(overlap(here, matrix))].any())
    if agreement is not None:
        agreement.largest(seen)
    for e in entries:
        if e.pauses and not all(seen[rows[e.key, i]] for i in range(len(e.costs))):
            raise ConfigError(
                f"{e.name} holds a matrix of zeros with control 'hyperball', which keeps norms and could never step it, "
                "expected nonzero weights: initialize it otherwise, or use control 'decay'"
            )
