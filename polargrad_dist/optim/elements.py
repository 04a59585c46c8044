"""Passes over elements that know no matrix: norms and clipping, and on a GPU the whole of a bucket's elementwise work.

There every launch and pass over memory counts, so that momentum and weights are one kernel each. Numbers that change from
step to step are 0-d tensors: for each float a kernel would be compiled anew.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from polargrad_dist.polar.oracle import is_finite


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and device together, in their order, as multi-tensor kernels take them."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for x in tensors:
        kinds.setdefault((x.dtype, x.device), []).append(x)
    return list(kinds.values())


def sum_of_squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Of all elements, 0-d fp64 on ``device``; of each tensor in at least fp32."""
    square = torch.zeros((), dtype=torch.float64, device=device)
    for alike in by_kind(x for x in tensors if x.numel()):
        wide = torch.promote_types(alike[0].dtype, torch.float32)
        square = square + torch.stack(torch._foreach_norm(alike, dtype=wide)).to(square).square().sum()
    return square


def shrinking(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by so that it is at most ``max_norm``; 0-d fp64.

    A non-finite norm leaves finite gradients alone, so that the culprit can still be found.
    """
    return torch.where(is_finite(norm), torch.clamp(max_norm / (norm + 1e-6), max=1.0), 1.0)


def selected_ema(m: Tensor, grad: Tensor, beta: Tensor, shrink: Tensor, ok: Tensor, nesterov: bool) -> Tensor:
    """`ema` with a gradient of any dtype, times ``shrink``, and where ``ok`` alone; beta, shrink and ok are 0-d.

    One kernel where it is compiled.
    """
    grad = grad.to(m.dtype) * shrink.to(m.dtype)
    new = torch.where(ok, torch.lerp(m, grad, (1 - beta).to(m.dtype)), m)
    m.copy_(new)
    return torch.lerp(grad, new, beta.to(m.dtype)) if nesterov else new


def selected_step(
    old: Tensor,
    low: Tensor | None,
    direction: Tensor,
    scale: Tensor | None,
    lr: Tensor,
    decay: Tensor | None,
    ok: Tensor,
    cautious: bool,
) -> Tensor:
    """(1 - decay) old - lr · scale · direction where ``ok``, else old; in the dtype of old. One kernel where it is compiled.

    low: low bits of bf16 weights, brought up to date in place. scale: broadcast against direction; None where that is the
    step itself. lr, decay: 0-d; decay None for none.
    """
    direction = direction.to(torch.promote_types(direction.dtype, torch.float32))
    x = join_bf16(old, low) if low is not None else old.to(direction.dtype)
    step = direction if scale is None else direction * (scale * -lr).to(direction.dtype)
    moved = x
    if decay is not None and cautious:
        moved = x - decay.to(x.dtype) * (x * (x * step < 0).to(x.dtype))
    elif decay is not None:
        moved = x * (1 - decay).to(x.dtype)
    x = torch.where(ok, moved + step, x)
    return split_bf16(x, low) if low is not None else x.to(old.dtype)


def join_bf16(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 value of which ``high`` (bf16) is the rounding and ``low`` (int16) the difference of their bits.

    Where ``high`` is zero ``low`` is left out: whoever set weights to zero between two steps left it behind, and below zero
    it would make NaN. (Values that round to zero are under 1e-40.) Beside any other ``high`` it is half a unit at most.
    """
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32) * (high != 0)
    return bits.view(torch.float32)


def split_bf16(x: Tensor, low: Tensor) -> Tensor:
    """The bf16 nearest to fp32 ``x`` (ties away from zero); ``low`` takes what remains, so that `join_bf16` is exact."""
    bits = x.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    low.copy_(bits - (upper << 16))
    return upper.to(torch.int16).view(torch.bfloat16)
