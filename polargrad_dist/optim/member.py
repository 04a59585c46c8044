"""One parameter in the optimizer, as canonical (slices, rows, columns) views of what this rank stores of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polargrad_dist.distributed.layout import Box, Cut3, rectangle, volume
from polargrad_dist.distributed.plan import Entry
from polargrad_dist.distributed.reducer import ShardReducer
from polargrad_dist.distributed.teams import Team, local
from polargrad_dist.distributed.transport import Traffic
from polargrad_dist.optim.matrix import rule_of


def slices(cut: Box) -> tuple[slice, ...]:
    """Ranges as an index."""
    return tuple(slice(first, last) for first, last in cut)


@dataclass(eq=False)
class Member:
    """A parameter: its plan entry, its group and its number, the ranks that store it, its state; ``index`` counts all of the
    world's."""

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
        self.elementwise = [
            *self.rule.states(self.group),
            *["low_bits"] * (self.entry.dtype == torch.bfloat16),
        ]

    @cached_property
    def stacked(self) -> bool:
        return self.entry.split is not None and self.entry.split.stacked

    @cached_property
    def window(self) -> Cut3:
        """This rank's optimizer shard within what it stores."""
        return self.window_of(self.team.place)

    def window_of(self, place: int) -> Cut3:
        """The optimizer shard of a place within what that place stores."""
        layout = self.entry.layout
        stored = rectangle(layout.stored[place], self.entry.shape, self.stacked)
        shard = self.entry.rectangles[place]
        return tuple((a - at, b - at) for (a, b), (at, _) in zip(shard, stored, strict=True))  # type: ignore[return-value]

    @cached_property
    def _shard(self) -> tuple[slice, ...] | None:
        """`window` as an index; None where it is all that is stored."""
        whole = self.entry.layout.copies == 1 or self.entry.layout.cut is None
        return None if whole else slices(self.window)

    def canonical(self, x: Tensor, part: tuple[slice, ...] | None = None) -> Tensor:
        """What is here of ``x`` as (slices, rows, columns), or a part of that; writes through."""
        x = (x.to_local() if isinstance(x, DTensor) else x).detach()
        if not self.stacked:
            x = x.flatten(1).unsqueeze(0) if x.ndim > 1 else x.view(1, -1, 1)
        return x if part is None else x[part]

    def stored(self) -> Tensor:
        """What this rank stores of the weights; writes through."""
        return self.canonical(self.p)

    def weight(self) -> Tensor:
        """The weights of this rank's optimizer shard; writes through."""
        return self.canonical(self.p, self._shard)

    def gradient(self) -> Tensor:
        """The gradient of this rank's optimizer shard, zeros where this rank has none."""
        grad = self.p.grad
        return torch.zeros_like(self.weight()) if grad is None else self.canonical(grad, self._shard)

    def held(self, key: str) -> Tensor:
        """This rank's part of an elementwise state; low bits as int16."""
        here = local(self.state[key])
        return self.canonical(here.view(torch.int16).squeeze(-1) if key == "low_bits" else here)

    def owner_state(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """What the rule keeps with whole matrices, of those of this shape owned here: (matrices, ...) for each name."""
        home, names = self.owner_homes[shape]
        return {key: local(home.state[name]) for key, name in names.items()}

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """The shape of this rank's optimizer shard, in the parameter's dimensions."""
        return tuple(b - a for a, b in self.entry.layout.shards[self.team.place])

    @property
    def misplaced(self) -> bool:
        """Whether the gradient is placed otherwise than the parameter."""
        grad, p = self.p.grad, self.p
        return (
            isinstance(grad, DTensor)
            and isinstance(p, DTensor)
            and tuple(grad.placements) != tuple(p.placements)
        )

    @property
    def elements(self) -> int:
        """Elements of this rank's optimizer shard."""
        return volume(self.entry.layout.shards[self.team.place])


CPU = torch.device("cpu")
# A GPU has memory for larger pieces, and each costs it a dozen launches.
CPU_BUCKET, GPU_BUCKET = 32 << 20, 256 << 20


@dataclass
class Travel:
    """How things travel in a step: counted by ``traffic``, in ``dtype`` (None: the parameters'), ``device`` computes.

    ``wish`` is the bytes of a collective, None for what suits the device. ``ok`` (0-d bool on the device) says whether the
    step is to happen at all, None for yes; ``shrink`` (0-d) multiplies all gradients, None for 1.
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
        """A number of the groups as a 0-d fp64 tensor on the device: a kernel would be compiled anew for each float."""
        if value not in self.numbers:
            self.numbers[value] = torch.full((), value, dtype=torch.float64, device=self.device)
        return self.numbers[value]

    def begin(self, ok: Tensor | None, shrink: Tensor | None) -> None:
        """A step begins."""
        self.ok, self.shrink = ok, shrink
        self.numbers.clear()

    @property
    def limit(self) -> int:
        """Bytes of a collective."""
        return self.wish or (CPU_BUCKET if self.device.type == "cpu" else GPU_BUCKET)

    @property
    def backend(self) -> str | None:
        """What compiles elementwise steps: inductor on a GPU, where every launch and every pass over memory counts."""
        return "inductor" if self.device.type == "cuda" else None

    def sure(self, ok: Tensor) -> Tensor:
        """``ok`` of each matrix, and of the step."""
        return ok if self.ok is None else ok & self.ok.to(ok.device)

    def shrunk(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients of one dtype as the step takes them."""
        if self.shrink is None:
            return grads
        return list(torch._foreach_mul(grads, self.shrink.to(grads[0].device, grads[0].dtype)))

    def gradient(self, member: Member) -> Tensor:
        """The reduced gradient of a parameter's optimizer shard, as (slices, rows, columns)."""
        return member.gradient() if self.reducer is None else member.canonical(self.reducer.shard(member.p))


def joined(views: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Alike tensors stacked, and whether that is their own memory: it is where they lie one behind the other."""
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
