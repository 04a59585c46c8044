"""From a tall matrix to a square one and to bounds on its singular values: what the rational methods start from."""

from __future__ import annotations

import torch
from torch import Tensor

POWER_STEPS = 8


def to_square(A: Tensor) -> tuple[Tensor | None, Tensor]:
    """(Q, R) of A (…, m, n), m ≥ n, so that polar(A) = Q·polar(R); Q is None where A is nearly square already."""
    m, n = A.shape[-2:]
    if m <= n + n // 8:
        return None, A
    Q, R = torch.linalg.qr(A)
    return Q, R


def largest_singular_value(A: Tensor) -> Tensor:
    """Upper estimate (…) of ‖A‖₂: power iteration on AᵀA, raised by a tenth, never above ‖A‖_F.

    The iteration approaches ‖A‖₂ from below; the tenth covers what eight steps leave. Where even that falls short the
    Halley and Zolotarev steps still converge, their argument being a little above 1.
    """
    frobenius = torch.linalg.matrix_norm(A)
    v = A.abs().sum(-2, keepdim=True).mT + torch.finfo(A.dtype).tiny
    for _ in range(POWER_STEPS):
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        v = A.mT @ (A @ v)
    estimate = torch.linalg.vector_norm(v, dim=(-2, -1)).sqrt()
    return torch.minimum(1.1 * estimate, frobenius)


def smallest_singular_value(R: Tensor) -> Tensor:
    """Lower estimate (…) of σ_min of a triangular R (…, n, n): inverse iteration, halved; 0 for a singular R."""
    v = torch.ones(*R.shape[:-1], 1, dtype=R.dtype, device=R.device)
    for _ in range(POWER_STEPS):
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        v = torch.linalg.solve_triangular(R.mT, v, upper=False)
        v = torch.linalg.solve_triangular(R, v, upper=True)
    growth = torch.linalg.vector_norm(v, dim=(-2, -1))
    return 0.5 * torch.nan_to_num(growth, nan=torch.inf, posinf=torch.inf).rsqrt()
