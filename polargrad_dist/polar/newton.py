"""Scaled Newton (algorithm A.1): X ← (μX + (μX)⁻ᵀ)/2, the classical method, with the scaling of Byers and Xu (2008)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .oracle import Options, Oracle
from .rational import Bounds, on_square


def newton(A: Tensor, options: Options) -> Oracle:
    """Iterates to rounding, from bounds on the singular values; on the factor R of (A; δI) unless these show full rank.

    Inverting null directions would make them noise of size 1. With the damping δ = lower/4·σ_max a gain is σ/√(σ² + δ²).
    """
    return on_square(A, options, _run)


def _run(X: Tensor, bounds: Bounds) -> tuple[Tensor, int]:
    if bounds.full_rank:
        return _iterate(X, newton_scaling(bounds.low, bounds.tolerance))
    n = X.shape[-1]
    delta = max(bounds.lower / 4, bounds.tolerance**2)
    eye = torch.eye(n, dtype=X.dtype, device=X.device).expand_as(X)
    Q, R = torch.linalg.qr(torch.cat([X, delta * eye], dim=-2))
    U, steps = _iterate(R, newton_scaling(max(bounds.lower / 4, bounds.tolerance), bounds.tolerance))
    return Q[..., :n, :] @ U, steps


def _iterate(X: Tensor, scaling: list[float]) -> tuple[Tensor, int]:
    for scale in scaling:
        X = (scale * X + torch.linalg.inv_ex(X).inverse.mT / scale) / 2
    return X, len(scaling)


def newton_scaling(low: float, tolerance: float) -> list[float]:
    """μ of each step for singular values in [low, 1]: each centres the interval that the previous step leaves."""
    scaling: list[float] = []
    high = 1.0
    while high - low > tolerance:
        scaling.append(1 / math.sqrt(low * high))
        spread = math.sqrt(high / low)
        low, high = 1.0, (spread + 1 / spread) / 2
    return scaling
