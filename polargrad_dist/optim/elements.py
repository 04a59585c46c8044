"""Elementwise operations: norms and clipping, and on a GPU all elementwise work of a bucket.

On a GPU every launch and every pass over memory counts, so momentum and weights take one kernel each. Numbers that change
from step to step are 0-d tensors: with floats, each value would compile a new kernel.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from polargrad_dist.polar.oracle import is_finite


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups tensors by dtype and device, in order, as multi-tensor kernels need them."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for x in tensors:
        kinds.setdefault((x.dtype, x.device), []).append(x)
    return list(kinds.values())


def sum_of_squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum over all elements, 0-d fp64 on ``device``; within a tensor in at least fp32."""
    square = torch.zeros((), dtype=torch.float64, device=device)
    for alike in by_kind(x for x in tensors if x.numel()):
        wide = torch.promote_types(alike[0].dtype, torch.float32)
        square = square + torch.stack(torch._foreach_norm(alike, dtype=wide)).to(square).square().sum()
    return square


def shrinking(norm: Tensor, max_norm: float) -> Tensor:
    """The factor that brings gradients of this norm to a norm of at most ``max_norm``; 0-d fp64.

    It is 1 for a non-finite norm: scaling by that would hide which gradient was bad.
    """
    return torch.where(is_finite(norm), torch.clamp(max_norm / (norm + 1e-6), max=1.0), 1.0)


def selected_ema(m: Tensor, grad: Tensor, beta: Tensor, shrink: Tensor, ok: Tensor, nesterov: bool) -> Tensor:
    """`ema` with a gradient of any dtype times ``shrink``, applied only if ``ok``; beta, shrink and ok are 0-d.

    Compiled, it is one kernel.
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
    """(1 - decay) old - lr · scale · direction where ``ok``, else old; in the dtype of old. Compiled, it is one kernel.

    low: low bits of bf16 weights, updated in place. scale: broadcast against direction; None if the direction is the step
    itself. lr, decay: 0-d; decay is None for no decay.
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

    Where ``high`` is zero, ``low`` is ignored: it is left over if weights were set to zero between two steps, and a negative
    one would give NaN. (Values that round to zero are below 1e-40.) For any other ``high`` it is at most half a unit.
    """
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32) * (high != 0)
    return bits.view(torch.float32)


def split_bf16(x: Tensor, low: Tensor) -> Tensor:
    """The bf16 value nearest to fp32 ``x`` (ties away from zero); ``low`` gets the rest, so that `join_bf16` is exact."""
    bits = x.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    low.copy_(bits - (upper << 16))
    return upper.to(torch.int16).view(torch.bfloat16)
