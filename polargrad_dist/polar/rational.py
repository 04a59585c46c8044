"""Shared by QDWH, ZOLO-PD and Newton: reduces a tall matrix to a square one and bounds its singular values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .oracle import Options, Oracle, inner_product, orthogonality, probe, working_copy

POWER_STEPS = 8


class Bounds(NamedTuple):
    """Singular values are in [low, 1], except for directions near `lower` or below it, unless full_rank is known.

    An iteration has converged when they are within `tolerance` of 1.
    """

    low: float
    lower: float
    full_rank: bool
    tolerance: float


def on_square(A: Tensor, options: Options, run: Callable[[Tensor, Bounds], tuple[Tensor, int]]) -> Oracle:
    """Scale A (B, m, n), reduce it to a square matrix with norm about 1, bound its spectrum, run, and go back.

    If numbers may be read back, the bound is the estimated σ_min/σ_max of the worst matrix in the batch (at least
    `lower`), which saves steps; otherwise, on a GPU that must not wait, it is `lower` itself.
    """
    X, scale = working_copy(A)
    Q, R = to_square(X)
    alpha = largest_singular_value(R)
    eps = torch.finfo(X.dtype).eps
    # Twice, so that directions far below `lower` (rounding of an fp32 null direction: 1e-6) get a gain below 1e-2.
    low = floor = max(min(2 * options.lower, 0.5), eps / 4)
    full_rank, sigma_min = False, None
    if options.may_wait:
        sigma_min = smallest_singular_value(torch.linalg.qr(R, mode="r").R if Q is None else R)
        nonzero = alpha > 0
        ratio = (sigma_min / alpha)[nonzero].tolist()
        full_rank = bool(nonzero.all()) and min(ratio) > floor
        low = max(floor, min([0.9, *ratio]))
    R = R / torch.where(alpha > 0, alpha, 1.0)[:, None, None]
    U, steps = run(R, Bounds(low, options.lower, full_rank, 4 * eps))
    U = U if Q is None else Q @ U
    back = 1 / scale[:, 0, 0].double()
    return Oracle(
        U.to(options.out_dtype),
        inner_product(A, U),
        steps=steps,
        sigma_max=alpha * back,
        sigma_min=None if sigma_min is None else sigma_min * back,
        residual=orthogonality(U) if options.info else None,
    )


def to_square(A: Tensor) -> tuple[Tensor | None, Tensor]:
    """(Q, R) of A (…, m, n), m ≥ n, so that polar(A) = Q·polar(R); (None, A) for a square A."""
    m, n = A.shape[-2:]
    if m == n:
        return None, A
    Q, R = torch.linalg.qr(A)
    return Q, R


def largest_singular_value(A: Tensor) -> Tensor:
    """Upper estimate (…) of ‖A‖₂: power iteration on AᵀA, raised by a tenth, never above ‖A‖_F.

    The iteration approaches ‖A‖₂ from below; the tenth covers the error that eight steps leave. If even that is too
    small, the methods still converge, with an argument slightly above 1. It must not start from a vector such as that of
    the column sums, which structured matrices have as a small singular vector.
    """
    frobenius = torch.linalg.matrix_norm(A)
    v = probe(A).expand(*A.shape[:-2], -1, -1)
    for _ in range(POWER_STEPS):
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
        v = A.mT @ (A @ v)
    estimate = torch.linalg.vector_norm(v, dim=(-2, -1)).sqrt()
    return torch.minimum(1.1 * estimate, frobenius)


def smallest_singular_value(R: Tensor) -> Tensor:
    """Lower estimate (…) of σ_min of a triangular R (…, n, n): inverse iteration, halved; 0 for a singular R."""
    v = probe(R).expand(*R.shape[:-2], -1, -1)
    for _ in range(POWER_STEPS):
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        v = torch.linalg.solve_triangular(R.mT, v, upper=False)
        v = torch.linalg.solve_triangular(R, v, upper=True)
    growth = torch.linalg.vector_norm(v, dim=(-2, -1))
    return 0.5 * torch.nan_to_num(growth, nan=torch.inf, posinf=torch.inf).rsqrt()
