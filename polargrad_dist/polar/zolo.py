"""ZOLO-PD (Nakatsukasa and Freund 2016; algorithm A.4): two steps of Zolotarev's best rational approximation to sign.

One step of order r is r independent factorizations, so a batch of them fills a device that QDWH would leave idle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .oracle import Options, Oracle
from .rational import Bounds, on_square

# Two steps of order 8 reach rounding from any fp64 condition number (table A.1).
LARGEST_ORDER = 8


def zolo(A: Tensor, options: Options) -> Oracle:
    """Iterates to rounding, from bounds on the singular values: one step for σ_min ≥ σ_max/2, else two."""
    return on_square(A, options, _run)


def _run(X: Tensor, bounds: Bounds) -> tuple[Tensor, int]:
    schedule = zolo_schedule(bounds.low, bounds.tolerance)
    for number, (poles, residues, factor) in enumerate(schedule):
        # The first of two steps works on the whole condition number and needs QR; after it Cholesky loses no accuracy.
        step = _qr_sum if number < len(schedule) - 1 else _cholesky_sum
        X = factor * (X + step(X, poles, residues))
    return X, len(schedule)


def _qr_sum(X: Tensor, poles: list[float], residues: list[float]) -> Tensor:
    """Σ_j a_j·X(XᵀX + c_j I)⁻¹ from the QR factors of (X; √c_j I), in one batch."""
    n = X.shape[-1]
    roots = _on_device([math.sqrt(c) for c in poles], X)
    weights = _on_device([a / math.sqrt(c) for a, c in zip(residues, poles, strict=True)], X)
    eye = torch.eye(n, dtype=X.dtype, device=X.device)
    shape = (*X.shape[:-2], len(poles), n, n)
    stacked = torch.cat([X[..., None, :, :].expand(shape), (roots * eye).expand(shape)], dim=-2)
    Q = torch.linalg.qr(stacked).Q
    return (weights * (Q[..., :n, :] @ Q[..., n:, :].mT)).sum(-3)


def _on_device(numbers: list[float], like: Tensor) -> Tensor:
    """(len, 1, 1) on the device of `like`, with each number as a kernel argument: copying a list would wait for a GPU."""
    return torch.stack([like.new_full((1, 1), x) for x in numbers])


def _cholesky_sum(X: Tensor, poles: list[float], residues: list[float]) -> Tensor:
    """The same from the Cholesky factors of XᵀX + c_j I."""
    S = X.mT @ X
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    total = torch.zeros_like(X)
    for pole, residue in zip(poles, residues, strict=True):
        L = torch.linalg.cholesky_ex(S + pole * eye).L
        total = total + residue * torch.cholesky_solve(X.mT, L).mT
    return total


def zolo_schedule(low: float, tolerance: float) -> list[tuple[list[float], list[float], float]]:
    """(poles, residues, factor) of each step from [low, 1], at the smallest order that gets within `tolerance` of 1."""
    count = 1 if low >= 0.5 else 2
    for order in range(1, LARGEST_ORDER + 1):
        schedule, reached = [], low
        for _ in range(count):
            poles, residues, factor, reached = zolotarev(order, reached)
            schedule.append((poles, residues, factor))
        if 1 - reached <= tolerance:
            break
    return schedule


def zolotarev(order: int, low: float) -> tuple[list[float], list[float], float, float]:
    """The best type (2r+1, 2r) approximation to 1 on [low, 1], scaled to be 1 at 1, and its value at `low`.

    Z(x) = M·x·Π (x² + c_2j)/(x² + c_{2j−1}) = M·x·(1 + Σ a_j/(x² + c_{2j−1})), c_i = ℓ²·sc²(iK′/(2r+1); ℓ′).
    The second half of the c_i follows from the first by c_i·c_{2r+1−i} = ℓ².
    """
    low = min(low, 1.0)
    first = [(low * tangent_amplitude(i / (2 * order + 1), low)) ** 2 for i in range(1, order + 1)]
    c = first + [low**2 / x for x in reversed(first)]
    odd, even = c[0::2], c[1::2]
    residues = [
        -math.prod(p - z for z in even) / math.prod(p - q for q in odd if q != p) if low < 1 else 0.0
        for p in odd
    ]
    factor = math.prod((1 + p) / (1 + z) for p, z in zip(odd, even, strict=True))
    at_low = factor * low * math.prod((low**2 + z) / (low**2 + p) for p, z in zip(odd, even, strict=True))
    return odd, residues, factor, min(at_low, 1.0)


def tangent_amplitude(fraction: float, complementary: float) -> float:
    """sc(fraction·K) = sn/cn for the modulus √(1 − complementary²), 0 < fraction < 1.

    Gauss's transformation run downwards on cn/sn itself (Bulirsch 1965): only positive numbers are added and
    multiplied, so the result keeps full relative accuracy for moduli that round to 1, where the usual library
    function, given the modulus, cannot.
    """
    means: list[tuple[float, float]] = []
    a, b = 1.0, complementary
    while True:
        means.append((a, b))
        if abs(a - b) <= 1e-8 * a:
            break
        a, b = (a + b) / 2, math.sqrt(a * b)
    angle = fraction * math.pi / 2
    ratio = 1 / math.tan(angle)
    cotangent, dn = (a + b) / 2 * ratio, 1.0
    for a, b in reversed(means):
        ratio *= cotangent
        cotangent *= dn
        dn = (b + ratio) / (a + ratio)
        ratio = cotangent / a
    return 1 / cotangent
