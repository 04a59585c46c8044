"""QDWH, the QR-based dynamically weighted Halley iteration (Nakatsukasa, Bai and Gygi 2010; algorithm A.3).

Works on square matrices (`rational.py` makes them so). Two modes: to convergence from a lower bound on the singular
values, and cut off after a given number of steps from ℓ₀ = n·eps, the operator behind the paper's learning rates.
Which ℓ₀ its authors took is not printed; from this one, and neither from eps nor from an estimated σ_min, their rates do
what they report. Two steps leave σ(U) in about [0.78, 1] for n = 100.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .oracle import Options, Oracle, inner_product, orthogonality, working_copy
from .rational import Bounds, largest_singular_value, on_square, to_square

# Above this c a Cholesky step would lose digits; the QR step is backward stable for any c (section 4 of the paper).
LARGEST_CHOLESKY_C = 100.0


def qdwh(A: Tensor, options: Options) -> Oracle:
    """Without `steps`: to rounding, from estimated bounds. With `steps`: that many, from α ≳ ‖A‖₂ and ℓ₀ = n·eps."""
    if options.steps is None:
        return on_square(A, options, _run)
    return _truncated(A, options, options.steps)


def _run(X: Tensor, bounds: Bounds) -> tuple[Tensor, int]:
    schedule = halley_schedule(bounds.low, bounds.tolerance)
    return run_qdwh(X, schedule), len(schedule)


def _truncated(A: Tensor, options: Options, steps: int) -> Oracle:
    X, _ = working_copy(A)
    Q, R = to_square(X)
    alpha = largest_singular_value(R)[:, None, None]
    low = min(0.5, R.shape[-1] * torch.finfo(X.dtype).eps)
    U = run_qdwh(R / torch.where(alpha > 0, alpha, 1.0), halley_schedule(low, 0.0, steps))
    U = U if Q is None else Q @ U
    residual = orthogonality(U) if options.info else None
    return Oracle(U.to(options.out_dtype), inner_product(A, U), steps=steps, residual=residual)


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
