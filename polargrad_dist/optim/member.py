"""A parameter as the optimizer sees it, and how a step communicates and computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polargrad_dist.compiled import run_compiled
from polargrad_dist.distributed.layout import Cut3, rectangle, slices
from polargrad_dist.distributed.plan import Entry
from polargrad_dist.distributed.reducer import ShardReducer
from polargrad_dist.distributed.teams import Team, local
from polargrad_dist.distributed.transport import Traffic
from polargrad_dist.optim.elements import selected_ema, selected_step
from polargrad_dist.optim.matrix import rule_of

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
