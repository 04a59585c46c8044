"""QDWH, the QR-based dynamically weighted Halley iteration (Nakatsukasa, Bai and Gygi 2010; algorithm A.3).

It works on square matrices (`rational.py` makes them square). There are two modes: to convergence from a lower bound on the
singular values, and truncated after `steps`, the operator for which the PolarGrad paper chose its learning rates. The paper
does not print its start; its authors' code has α = √(‖A‖₁·‖A‖_∞), ℓ₀ = the eps of the dtype, and one cubic Newton–Schulz
step after the Halley steps. Two steps give σ(U) in [0.74, 1] on the gradients of its quadratic problem. The truncated mode
also works on the Gram matrix, for matrices sharded by rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import PolarError
from .oracle import Options, Oracle, inner_product, orthogonality, row_chunks, working_copy
from .rational import Bounds, on_square, to_square
from .root import InverseSqrt, extreme_singular_values

# Above this c a Cholesky step would lose digits; the QR step is backward stable for any c (section 4 of the paper).
LARGEST_CHOLESKY_C = 100.0
# The shift of a Gram matrix's eigenvalues, in units of its rounding, eps·‖S‖_F. It affects directions below 1e-6·σ_max.
LIFT = 1e3


def qdwh(A: Tensor, options: Options) -> Oracle:
    """Without `steps`: to rounding, from estimated bounds. With `steps`: that many, then a cubic Newton–Schulz step."""
    if options.steps is None:
        return on_square(A, options, _run)
    return _truncated(A, options, options.steps)


def _run(X: Tensor, bounds: Bounds) -> tuple[Tensor, int]:
    schedule = halley_schedule(bounds.low, bounds.tolerance)
    return run_qdwh(X, schedule), len(schedule)


def _truncated(A: Tensor, options: Options, steps: int) -> Oracle:
    X, _ = working_copy(A)
    alpha = norm_bound(*norm_parts(X)).to(X.dtype)[:, None, None]
    Q, R = to_square(X)
    U = run_qdwh(R / torch.where(alpha > 0, alpha, 1.0), truncated_schedule(steps, X.dtype))
    U = 1.5 * U - 0.5 * (U @ (U.mT @ U))
    U = U if Q is None else Q @ U
    residual = orthogonality(U) if options.info else None
    return Oracle(U.to(options.out_dtype), inner_product(A, U), steps=steps, residual=residual)


def truncated_schedule(steps: int, dtype: torch.dtype) -> list[tuple[float, float, float]]:
    """Weights of `steps` Halley steps from ℓ₀ = the eps of a dtype."""
    return halley_schedule(torch.finfo(dtype).eps, 0.0, steps)


def norm_parts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows' part of the norms in `norm_bound`: column sums of |a_ij| (…, n) and the largest row sum (…), fp64.

    rows: (…, m, n) of any floating dtype; m may be 0. For a matrix sharded by rows, sum the first over the ranks and take
    the maximum of the second.
    """
    *batch, _, n = rows.shape
    columns = rows.new_zeros(*batch, n, dtype=torch.float64)
    largest = rows.new_zeros(batch, dtype=torch.float64)
    for chunk in row_chunks(rows):
        sizes = rows[..., chunk, :].abs().double()
        columns += sizes.sum(-2)
        largest = torch.maximum(largest, sizes.sum(-1).amax(-1))
    return columns, largest


def norm_bound(columns: Tensor, largest_row: Tensor) -> Tensor:
    """α (…) = √(‖A‖₁·‖A‖_∞) ≥ ‖A‖₂ from column sums of |a_ij| (…, n) and the largest row sum (…), both fp64."""
    return (columns.amax(-1) * largest_row).sqrt()


@torch.no_grad()
def gram_qdwh(S: Tensor, alpha: Tensor, steps: int, *, dtype: torch.dtype = torch.float32) -> InverseSqrt:
    """Truncated QDWH of A from S = AᵀA alone: X (…, n, n) with A·X = `polar(A, method="qdwh", steps=steps).U`.

    A tall matrix sharded by rows is then neither gathered nor QR-factorized: each Halley step acts on S through a Cholesky
    factor, in fp64, where even c = 1e9 of the first step loses no digit of fp32. It agrees with the QR form to 1e-5 on
    matrices of full rank. On null directions the QR form amplifies the rounding of its fp32 QR to gains of up to 1; this
    form damps them.

    Args:
        S: (…, n, n) fp64, the sum of `gram_matrix` over all rows.
        alpha: (…) fp64, `norm_bound` of A.
        steps: number of Halley steps; a cubic Newton–Schulz step follows.
        dtype: its eps is ℓ₀; fp32 for fp32 and narrower data.

    Returns:
        InverseSqrt: X is not symmetric to rounding, and must not be symmetrized. The error in its rows of null
        directions does not affect A·X, because A's rows are orthogonal to them; averaged into its columns it does (gains
        of 1.15 occurred). nuclear_norm is ⟨A, A·X⟩, low by a few percent like U itself; sigma_max and sigma_min are
        estimates as in `inverse_sqrt` by products, and there is no spectrum. S = 0 gives zeros, a non-finite S gives NaN;
        nothing is read back.

    Raises:
        PolarError: for fp64, whose eps as ℓ₀ (c = 1e21) would need more digits than S has.
    """
    if dtype == torch.float64:
        raise PolarError(
            "gram_qdwh was given float64, expected fp32 or a narrower dtype: the Gram matrix has only half its digits, so "
            "use polar(method='qdwh', steps=…) on the whole matrix"
        )
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    unit = torch.where(alpha > 0, alpha, 1.0)[..., None, None]
    R, X = S / unit / unit, eye / unit
    # Steps amplify the rounding of S, which may make a zero eigenvalue negative, as much as a singular value.
    # With eigenvalues shifted above it, each stays positive, and every gain stays at most 1.
    R = R + LIFT * torch.finfo(R.dtype).eps * torch.linalg.matrix_norm(R)[..., None, None] * eye
    for a, b, c in truncated_schedule(steps, torch.promote_types(dtype, torch.float32)):
        L = torch.linalg.cholesky_ex(eye + c * R).L
        H = (b / c) * eye + (a - b / c) * torch.cholesky_inverse(L)
        X = X @ H
        R = H @ R @ H
        R = (R + R.mT) / 2
    X = X @ (1.5 * eye - 0.5 * R)
    X = torch.where((alpha == 0)[..., None, None], 0.0, X)
    missing = X.mT @ S @ X - eye
    largest, smallest = extreme_singular_values(S, X)
    unseen = S.new_empty(*S.shape[:-2], 0)
    return InverseSqrt(
        X,
        (S * X).sum((-2, -1)),
        largest,
        smallest,
        unseen,
        unseen.bool(),
        missing.square().sum((-2, -1)).sqrt() / math.sqrt(S.shape[-1]),
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
    """Runs all steps on X (…, n, n) with singular values in [low, 1]."""
    for a, b, c in schedule:
        X = halley_step(X, a, b, c)
    return X
