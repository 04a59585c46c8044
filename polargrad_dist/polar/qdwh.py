"""QDWH, the QR-based dynamically weighted Halley iteration (Nakatsukasa, Bai and Gygi 2010; algorithm A.3).

Works on square matrices (`reduce.py` makes them so). Two modes: to convergence from a lower bound on the singular
values, and cut off after a given number of steps from ℓ₀ = eps, the operator behind the paper's learning rates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .oracle import Options, Oracle, inner_product, orthogonality, working_copy
from .reduce import largest_singular_value, smallest_singular_value, to_square

# Above this c a Cholesky step would lose digits; the QR step is backward stable for any c (section 4 of the paper).
LARGEST_CHOLESKY_C = 100.0


def qdwh(A: Tensor, options: Options) -> Oracle:
    """Without `steps`: to rounding, from estimated bounds. With `steps`: that many, from α = ‖A‖_F and ℓ₀ = eps."""
    X, scale = working_copy(A)
    Q, R = to_square(X)
    eps = torch.finfo(X.dtype).eps
    low, sigma_min = eps, None
    if options.steps is not None:
        alpha = torch.linalg.matrix_norm(R)
        schedule = halley_schedule(eps, 0.0, options.steps)
    else:
        alpha = largest_singular_value(R)
        low = max(options.lower, eps / 2)
        if options.may_wait:
            sigma_min = smallest_singular_value(torch.linalg.qr(R, mode="r").R if Q is None else R)
            low = max(low, min(0.9, float((sigma_min / alpha).nan_to_num(0.0).min())))
        schedule = halley_schedule(low, 4 * eps)
    U = run_qdwh(R / torch.where(alpha > 0, alpha, 1.0)[:, None, None], schedule)
    U = U if Q is None else Q @ U
    back = 1 / scale[:, 0, 0].double()
    return Oracle(
        U.to(options.out_dtype),
        inner_product(A, U),
        steps=len(schedule),
        sigma_max=alpha * back,
        sigma_min=None if sigma_min is None else sigma_min * back,
        residual=orthogonality(U) if options.info else None,
    )


def halley_weights(low: float) -> tuple[float, float, float]:
    """(a, b, c) of the Halley step x(a + bx²)/(1 + cx²) that is best on [low, 1]."""
    low = min(low, 1.0)
    gamma = (4 * (1 - low**2) / low**4) ** (1 / 3)
    root = math.sqrt(1 + gamma)
    a = root + 0.5 * math.sqrt(8 - 4 * gamma + 8 * (2 - low**2) / (low**2 * root))
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def halley_schedule(
    low: float, tolerance: float, steps: int | None = None
) -> list[tuple[float, float, float]]:
    """Weights of the steps from [low, 1] until the interval is within `tolerance` of 1, or of exactly `steps` steps."""
    schedule: list[tuple[float, float, float]] = []
    while (1 - low > tolerance) if steps is None else (len(schedule) < steps):
        a, b, c = halley_weights(low)
        schedule.append((a, b, c))
        low = min(1.0, low * (a + b * low**2) / (1 + c * low**2))
    return schedule


def halley_step(X: Tensor, a: float, b: float, c: float) -> Tensor:
    """One step on X (…, m, n): by QR of (√c·X; I) while c is large, then by the Cholesky factor of I + cXᵀX."""
    m, n = X.shape[-2:]
    eye = torch.eye(n, dtype=X.dtype, device=X.device)
    if c > LARGEST_CHOLESKY_C:
        stacked = torch.cat([math.sqrt(c) * X, eye.expand(*X.shape[:-2], n, n)], dim=-2)
        Q = torch.linalg.qr(stacked).Q
        return (b / c) * X + ((a - b / c) / math.sqrt(c)) * (Q[..., :m, :] @ Q[..., m:, :].mT)
    L = torch.linalg.cholesky_ex(eye + c * (X.mT @ X)).L
    return (b / c) * X + (a - b / c) * torch.cholesky_solve(X.mT, L).mT


def run_qdwh(X: Tensor, schedule: list[tuple[float, float, float]]) -> Tensor:
    """All steps on X (…, n, n) with singular values in [low, 1]."""
    for a, b, c in schedule:
        X = halley_step(X, a, b, c)
    return X
