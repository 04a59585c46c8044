"""What rules are composed of: momenta, scales, centring, row norms, the step's length against the weights, low bits.

Pure functions of tensors. Sources: algorithms C.1-C.4 of Lau, Long, Su (2025); Muon's scale sqrt(max(1, m/n))
of Jordan et al. (2024), 0.2 sqrt(max(m, n)) of Liu et al. (2025, "Moonlight"), sqrt(d_out/d_in) of Bernstein and
Newhouse (2024). "The benchmark" is modded-nanoGPT's optimization track; its figures are steps to a loss of 3.28, where
tuned Muon needs 3,250.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from polargrad_dist.polar.oracle import is_finite

Momentum = Callable[[Tensor, Tensor, float, bool], Tensor]
Scale = Callable[[int, int, Tensor, float], Tensor | float]


def ema(m: Tensor, grad: Tensor, beta: float, nesterov: bool) -> Tensor:
    """M = beta M + (1 - beta) G, in place; returns M, or its look-ahead beta M + (1 - beta) G (C.2, Muon's order)."""
    m.lerp_(grad, 1 - beta)
    return grad.lerp(m, beta) if nesterov else m


def heavy_ball(m: Tensor, grad: Tensor, beta: float, nesterov: bool) -> Tensor:
    """M = beta M + G, in place; returns M, or G + beta M (C.4, Polyak's)."""
    m.mul_(beta).add_(grad)
    return grad.add(m, alpha=beta) if nesterov else m


MOMENTA: dict[str, Momentum] = {"momentum_first": ema, "heavy_ball": heavy_ball}


def muon_factor(m: int, n: int) -> float:
    """Muon's sqrt(max(1, m/n)) of an m x n matrix."""
    return math.sqrt(max(1.0, m / n))


# The factor of an m x n direction whose matrix has the given nuclear norm, taken to the power alpha: 1 is PolarGrad, 0 the
# direction alone (NVIDIA's Emerging-Optimizers has the same exponent; no figure is published). "nuclear_shared" gives s_l of
# lr s_l (sum_k s_k |M_k|_nuc)^alpha, whose sum, over all matrices of a role, `lengths` multiplies in: steepest descent under
# the largest of |W_l| / s_l, whose dual norm is that sum (Bernstein and Newhouse 2024, "Modular duality").
SCALES: dict[str, Scale] = {
    "nuclear": lambda m, n, nuclear, alpha: nuclear if alpha == 1 else nuclear**alpha,
    "nuclear_relative": lambda m, n, nuclear, alpha: nuclear if alpha == 1 else nuclear**alpha,
    "nuclear_shared": lambda m, n, nuclear, alpha: muon_factor(m, n),
    "muon": lambda m, n, nuclear, alpha: muon_factor(m, n),
    "moonlight": lambda m, n, nuclear, alpha: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n, nuclear, alpha: math.sqrt(m / n),
    "none": lambda m, n, nuclear, alpha: 1.0,
}


REFERENCE_STEPS = 100


def relative(scale: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """PolarGrad's scale over its own mean of the matrix's first `REFERENCE_STEPS` steps, and what has been seen.

    ``scale`` is (k,), ``seen`` (k, 2) the mean and the number of steps in it. Step t has weight t in the mean, because the
    first gradients say least; until the mean is complete the quotient is at most 1. The learning rate is then the length of a
    typical early step, on any model, batch and vocabulary, and steps shrink with the gradient as PolarGrad's do.
    """
    mean, steps = seen.to(scale).unbind(-1)
    learning = steps < REFERENCE_STEPS
    mean = torch.where(learning, mean + (scale - mean) * (2 / (steps + 2)), mean)
    quotient = torch.where(mean > 0, scale / mean, 0.0)
    quotient = torch.where(learning, quotient.clamp_max(1.0), quotient)
    return quotient, torch.stack([mean, steps + learning.to(steps)], -1).to(seen)


def centred(A: Tensor, transposed: bool) -> Tensor:
    """Rows (k, m, n) less their mean row; of transposed matrices columns less their mean column.

    A - 1 (1'A)/m: a vector added to every row of a head moves no probability, so that the mean row of its gradient is
    noise. Before the oracle, and after it again where rounding or truncation brought a mean back. Source: ``center_rows`` of
    NVIDIA's Emerging-Optimizers, for embeddings, heads and routers; no figure is published.
    """
    return A - A.mean(-1 if transposed else -2, keepdim=True)


def rows_normalized(D: Tensor, energy: Tensor, beta: float, transposed: bool) -> tuple[Tensor, Tensor]:
    """NorMuon: v = beta v + (1 - beta) mean_j D_ij^2; D_ij / sqrt(v_i), brought back to D's Frobenius norm; and v.

    D is (k, m, n) and v (k, m), of transposed matrices (k, n). Source: Li et al. (2025), "NorMuon". The benchmark: 3,250
    steps (3.2789, n = 20) at lr 0.035 and weight decay 0.025, where Muon needed 3,325 with the same.
    """
    X, dim = D.to(energy.dtype), -2 if transposed else -1
    energy = torch.lerp(energy, X.square().mean(dim), 1 - beta)
    scaled = X / (energy.unsqueeze(dim).sqrt() + 1e-10)
    norms = [torch.linalg.matrix_norm(x) for x in (X, scaled)]
    return (scaled * (norms[0] / norms[1].clamp_min(1e-10))[:, None, None]).to(D.dtype), energy


def lengths(group: Mapping[str, Any], sums: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """What each matrix's step is multiplied by, and its new weights after that: (grow, shrink), fp64 (matrices,).

    ``sums`` (matrices, 3) are |W|^2, <W, S> and |S|^2 of weights and steps, ``shared`` (0-d) the role's sum_k s_k |M_k|_nuc.

    - scale "nuclear_shared": S shared^alpha. Here, on hidden matrices of a small model, 3.94 nats became 3.69.
    - floor f: |S| is lr f |W| at least. The benchmark: NorMuon without decay, f = 0.35, lr 0.0375, 3,250 (3.2771, n = 8).
    - control "hyperball": W <- |W| normalize(W + lr |W| S/|S|), so that |W| stays what it is at the start (Wen 2026). The
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
