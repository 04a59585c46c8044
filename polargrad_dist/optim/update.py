"""The mathematics of one step, on whatever part of a parameter this rank stores; knows no collective.

Sources: algorithms C.1-C.4 of Lau, Long, Su (2025), with decoupled weight decay; AdamW is torch's own function.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from polargrad_dist.distributed.grid import Grid
from polargrad_dist.distributed.plan import Entry
from polargrad_dist.errors import PolarError
from polargrad_dist.optim.rules import POLYNOMIAL, step_scale
from polargrad_dist.polar import homogenize, polar

NAN = float("nan")


def local(x: torch.Tensor) -> torch.Tensor:
    """What this rank stores of a tensor, writing through."""
    return x.to_local() if isinstance(x, DTensor) else x


@dataclass(eq=False)
class Work:
    """One parameter: its plan entry, its group, the grid it lives on, its state."""

    entry: Entry
    p: nn.Parameter
    group: dict[str, Any]
    grid: Grid
    state: dict[str, torch.Tensor]
    index: int

    @property
    def owner(self) -> tuple[int, int]:
        """(replica, shard) of the rank that owns it."""
        return self.entry.place(self.entry.owner)

    @property
    def cols(self) -> int:
        assert self.entry.layout is not None
        return self.entry.layout.cols

    @property
    def flat(self) -> torch.Tensor:
        """The elements of the parameter stored here, one-dimensional."""
        return local(self.p).view(-1)

    @property
    def grad(self) -> torch.Tensor:
        """The gradient of those elements, zeros where this rank has none."""
        return torch.zeros_like(self.flat) if self.p.grad is None else local(self.p.grad).reshape(-1)

    def held(self, key: str) -> torch.Tensor:
        """The elements of a state stored here, one-dimensional."""
        return local(self.state[key]).view(-1)


@dataclass
class Facts:
    """What a step learnt in passing. ``values[i]`` belongs to parameter i, at its owner: nuclear norm, largest and
    smallest singular value, residual ||U'U - I||, NaN where the oracle does not know it.

    Of the parameters in ``keep`` the owner also keeps what the oracle was given and gave: pairs (A, U), each (..., m, n), in
    ``kept``, or of a row-sharded matrix (A'A, X) with U = A X, in ``kept_gram``.
    """

    values: dict[int, torch.Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failed: torch.Tensor | None = None
    keep: frozenset[int] = frozenset()
    kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    kept_gram: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _events: list[tuple[str, Any, Any]] = field(default_factory=list)

    def clock(self, role: str, device: torch.device) -> _Clock:
        """A context that adds the time of the device's work in it to a role, without waiting for a GPU."""
        return _Clock(self, role, device)

    def keep_matrices(self, batch: Sequence[Work], a: torch.Tensor, u: torch.Tensor) -> None:
        """Keeps the (k, ...) matrices and factors of those of the ``batch`` of k parameters that are to be kept."""
        for i, work in enumerate(batch):
            if work.index in self.keep:
                self.kept[work.index].append((a[i].clone(), u[i].clone()))

    def flag(self, index: int, bad: torch.Tensor) -> None:
        """Remembers, on the device, that a parameter's step is not finite where ``bad`` (0-d bool) is true."""
        found = bad * (index + 1)
        self.failed = found if self.failed is None else torch.maximum(self.failed, found)

    def total_seconds(self, role: str) -> float:
        """Time of the oracle for a role on this rank."""
        for its_role, start, end in self._events:
            end.synchronize()
            self.seconds[its_role] += start.elapsed_time(end) / 1e3
        self._events.clear()
        return self.seconds[role]


class _Clock:
    def __init__(self, facts: Facts, role: str, device: torch.device):
        self.facts, self.role, self.gpu = facts, role, device.type == "cuda"

    def __enter__(self) -> None:
        if self.gpu:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.start.record()
        else:
            self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.gpu:
            self.end.record()
            self.facts._events.append((self.role, self.start, self.end))
        else:
            self.facts.seconds[self.role] += time.perf_counter() - self.began


def source(work: Work, grad: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Moves the momentum along a stretch of the gradient, and returns what the oracle is to be given for it.

    ``grad`` are the elements from ``first`` on of those whose momentum is held here.
    """
    group, beta = work.group, work.group["beta"]
    if group["momentum"] in ("none", "polar_first"):
        return grad.to(torch.promote_types(grad.dtype, torch.float32))
    m = work.held("momentum")[first : first + grad.numel()]
    grad = grad.to(m.dtype)
    if group["momentum"] == "heavy_ball":
        m.mul_(beta).add_(grad)
        return grad.add(m, alpha=beta) if group["nesterov"] else m
    m.lerp_(grad, 1 - beta)
    return grad.lerp(m, beta) if group["nesterov"] else m


def step_of(work: Work, u: torch.Tensor, scales: torch.Tensor, first: int = 0) -> torch.Tensor:
    """The step of a stretch of the polar factor (its elements from ``first`` on), whose rows have the given scales."""
    if work.group["momentum"] == "polar_first":
        m = work.held("momentum")[first : first + u.numel()]
        u = m.lerp_(u.reshape(-1).to(m.dtype), 1 - work.group["beta"])
    return (u.view(-1, work.cols) * (scales * -work.group["lr"]).to(u.dtype).unsqueeze(-1)).view(-1)


def apply_step(work: Work, first: int, last: int, step: torch.Tensor) -> None:
    """Decays and steps a stretch of the elements stored here. Elementwise, so any stretch at any time."""
    x = target = work.flat[first:last]
    residual = work.held("residual")[first:last] if "residual" in work.state else None
    if residual is not None:
        x = join_bf16(target, residual)
    elif target.dtype == torch.float16:
        x = target.float()
    step = step.view(-1).to(x.dtype)
    if decay := work.group["lr"] * work.group["weight_decay"]:
        if work.group["cautious"]:
            x.addcmul_(x, (x * step < 0).to(x.dtype), value=-decay)
        else:
            x.mul_(1 - decay)
    x.add_(step)
    if residual is not None:
        split_bf16(x, target, residual)
    elif x is not target:
        target.copy_(x)


def orthogonalize(batch: list[Work], stack: torch.Tensor, facts: Facts) -> torch.Tensor:
    """Replaces the matrices of alike parameters (k, numel) by their polar factors; returns the scale of each row (k, rows).

    A failure of the oracle gives NaN and a flag, no exception: the other ranks must not be left waiting.
    """
    work = batch[0]
    layout, group = work.entry.layout, work.group
    assert layout is not None
    scales, columns = [], []
    with facts.clock(work.entry.role, stack.device):
        try:
            for view in layout.views(stack):  # (k, stack, blocks, m, n)
                m, n = view.shape[-2:]
                u, nuclear, *known = factor(view.to(oracle_dtype(group, view.dtype)), group)
                facts.keep_matrices(batch, view, u)
                view.copy_(u)
                nothing = torch.full_like(nuclear, NAN)
                known = [nothing if x is None else x.to(nuclear.dtype) for x in known]
                columns.append(torch.stack([nuclear, *known], -1).flatten(1, 2))
                constant = torch.full_like(nuclear, step_scale(group["scale"], m, n))
                scale = nuclear if group["scale"] == "nuclear" else constant
                scales.append(scale.unsqueeze(-1).expand(*scale.shape, m).flatten(2))
        except (RuntimeError, PolarError):
            stack.fill_(NAN)
            facts.flag(work.index, torch.ones((), dtype=torch.bool, device=stack.device))
            return stack.new_full((len(batch), layout.stack * layout.rows), NAN)
    nuclear, largest, smallest, residual = torch.cat(columns, 1).unbind(-1)  # each (k, matrices)
    worst = (largest / smallest).nan_to_num(0).argmax(1, keepdim=True)
    worst_of = [x.gather(1, worst).squeeze(1) for x in (largest, smallest)]
    learnt = torch.stack([nuclear.sum(1), *worst_of, residual.amax(1)], 1)
    for work, values, finite in zip(batch, learnt, nuclear.isfinite().all(1), strict=True):
        facts.values[work.index] = values
        facts.flag(work.index, ~finite)
    return torch.cat(scales, -1).flatten(1).to(stack.dtype)


def factor(a: torch.Tensor, group: dict[str, Any]) -> tuple[Any, ...]:
    """The factor of each matrix that its group steps along, then its nuclear norm, largest and smallest singular value,
    and ||U'U - I||, None where unknown."""
    if group["spectrum"] == "homogenized":
        return homogenize(a, lower=group["lower"])
    u, _, nuclear, info = polar(
        a,
        method=group["oracle"],
        steps=group["steps"],
        lower=group["lower"],
        check=False,
        info=group["oracle"] not in POLYNOMIAL,  # which know nothing of the spectrum for free
    )
    return u, nuclear, *(info[2:] if info else (None, None, None))


def oracle_dtype(group: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The type in which a group's oracle is given matrices of ``dtype``."""
    if group["oracle_dtype"] is not None:
        return getattr(torch, group["oracle_dtype"])
    return torch.bfloat16 if group["oracle"] in POLYNOMIAL and dtype != torch.float64 else dtype


def step_adamw(works: Iterable[Work]) -> None:
    """AdamW on what this rank stores, group by group, by torch's own function; bf16 parameters in fp32."""
    groups: dict[int, list[Work]] = defaultdict(list)
    for work in works:
        if work.flat.numel():
            groups[id(work.group)].append(work)
    for members in groups.values():
        group = members[0].group
        values = [join_bf16(w.flat, w.held("residual")) if "residual" in w.state else w.flat for w in members]
        values = [v.float() if v.dtype == torch.float16 else v for v in values]
        adamw(
            values,
            [w.grad.to(v.dtype) for w, v in zip(members, values, strict=True)],
            [w.held("exp_avg") for w in members],
            [w.held("exp_avg_sq") for w in members],
            [],
            [w.state["step"] for w in members],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for work, value in zip(members, values, strict=True):
            if "residual" in work.state:
                split_bf16(value, work.flat, work.held("residual"))
            elif work.p.dtype == torch.float16:
                work.flat.copy_(value)


def make_state(work: Work, world: int, rank: int) -> None:
    """Zeros for every state of a parameter. What another rank holds is an empty tensor here: keys are the same on all."""
    p, entry = work.p, work.entry
    dtype = torch.float32 if p.element_size() < 4 else p.dtype
    if p.dtype == torch.bfloat16:
        work.state["residual"] = torch.zeros_like(p, dtype=torch.int16, requires_grad=False)
    if entry.kind == "everywhere":
        work.state["step"] = torch.zeros(())
        for key in ("exp_avg", "exp_avg_sq"):
            work.state[key] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
    elif entry.states:
        size = entry.held_state(rank, world)
        zeros = torch.zeros(size, dtype=dtype, device=local(p).device)
        if entry.kind == "rows":
            work.state["momentum"] = work.grid.rows_state(zeros.view(-1, work.cols), p.shape)
        elif work.owner[0] == work.grid.replica:
            work.state["momentum"] = work.grid.shard_state(zeros.view(-1, *p.shape[1:]), p.shape)
        else:
            work.state["momentum"] = zeros


def join_bf16(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 value of which ``high`` (bf16) is the rounding and ``low`` (int16) the difference of their bits.

    Where ``high`` is zero ``low`` is left out: whoever set weights to zero between two steps left it behind, and below zero
    it would make NaN. (Values that round to zero are under 1e-40.) Beside any other ``high`` it is half a unit at most.
    """
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32) * (high != 0)
    return bits.view(torch.float32)


def split_bf16(x: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Writes fp32 ``x`` into its nearest bf16 (ties away from zero) and the remaining bits, so that `join_bf16` is exact."""
    bits = x.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    low.copy_(bits - (upper << 16))
    high.copy_(upper.to(torch.int16).view(torch.bfloat16))
