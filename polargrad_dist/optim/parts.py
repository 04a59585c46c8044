"""What rules are composed of: momenta, scales, the step's length against the weights, the low bits of bf16 weights.

Pure functions of tensors of any shape. Sources: algorithms C.1-C.4 of Lau, Long, Su (2025); Muon's scale sqrt(max(1, m/n))
of Jordan et al. (2024), 0.2 sqrt(max(m, n)) of Liu et al. (2025, "Moonlight"), sqrt(d_out/d_in) of Bernstein and
Newhouse (2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from polargrad_dist.polar.oracle import is_finite

Momentum = Callable[[Tensor, Tensor, float, bool], Tensor]
Scale = Callable[[int, int, Tensor], Tensor | float]


def ema(m: Tensor, grad: Tensor, beta: float, nesterov: bool) -> Tensor:
    """M = beta M + (1 - beta) G, in place; returns M, or its look-ahead beta M + (1 - beta) G (C.2, Muon's order)."""
    m.lerp_(grad, 1 - beta)
    return grad.lerp(m, beta) if nesterov else m


def heavy_ball(m: Tensor, grad: Tensor, beta: float, nesterov: bool) -> Tensor:
    """M = beta M + G, in place; returns M, or G + beta M (C.4, Polyak's)."""
    m.mul_(beta).add_(grad)
    return grad.add(m, alpha=beta) if nesterov else m


MOMENTA: dict[str, Momentum] = {"momentum_first": ema, "heavy_ball": heavy_ball}

# The factor of an m x n direction whose matrix has the given nuclear norm.
SCALES: dict[str, Scale] = {
    "nuclear": lambda m, n, nuclear: nuclear,
    "muon": lambda m, n, nuclear: math.sqrt(max(1.0, m / n)),
    "moonlight": lambda m, n, nuclear: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n, nuclear: math.sqrt(m / n),
    "none": lambda m, n, nuclear: 1.0,
}


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


def decay_and_step(weights: list[Tensor], steps: list[Tensor], decay: float, cautious: bool) -> None:
    """w = (1 - decay) w + step, in place; ``cautious`` decays only the entries that the step also shrinks."""
    if decay and cautious:
        for w, step in zip(weights, steps, strict=True):
            w.addcmul_(w, (w * step < 0).to(w.dtype), value=-decay)
    elif decay:
        torch._foreach_mul_(weights, 1 - decay)
    torch._foreach_add_(weights, steps)


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
