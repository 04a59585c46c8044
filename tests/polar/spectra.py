"""Matrices with known spectra, and what an fp64 SVD says about them: the reference of every test here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Exact(NamedTuple):
    """U (partial isometry over σ > cut·σ_max), V (columns), sigma descending, all fp64, of a tall or wide matrix."""

    U: Tensor
    V: Tensor
    sigma: Tensor


def exact(a: Tensor, cut: float = 0.0) -> Exact:
    P, sigma, Vh = torch.linalg.svd(a.double(), full_matrices=False)
    kept = (sigma > cut * sigma[0]).double()
    return Exact((P * kept) @ Vh, Vh.mT, sigma)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(m: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """An fp64 m×n matrix with these singular values and random singular vectors."""
    n = len(sigma)
    P, _ = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64, generator=generator(seed)))
    V, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator(seed + 1)))
    return (P * sigma) @ V.mT


def log_spaced(m: int, n: int, condition: float, seed: int = 0) -> Tensor:
    exponents = torch.linspace(0, 1, n, dtype=torch.float64)
    return with_spectrum(m, condition**-exponents, seed)


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=generator(seed))


def families(m: int, n: int) -> dict[str, Tensor]:
    """The fp32 matrices a gradient may look like."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    few_rows = gaussian(m, n, 4)
    few_rows[n // 2 :] = 0
    found = {
        "gaussian": gaussian(m, n, 1),
        "condition 1e2": log_spaced(m, n, 1e2),
        "condition 1e4": log_spaced(m, n, 1e4),
        "condition 1e6": log_spaced(m, n, 1e6),
        "1/i spectrum": with_spectrum(m, 1 / i),
        "rank n/4": gaussian(m, n // 4, 2) @ gaussian(n // 4, n, 3),
        "n/2 non-zero rows": few_rows,
        "column graded": gaussian(m, n, 5) * 10 ** -(3 * (i - 1) / (n - 1)),
        "bf16 rounded": gaussian(m, n, 6).bfloat16().double(),
    }
    return {name: a.float() for name, a in found.items()}


def direction_error(U: Tensor, reference: Exact) -> float:
    """‖U − U*‖_F/√n."""
    return float((U.double() - reference.U).norm()) / min(U.shape) ** 0.5


def orthogonality_error(U: Tensor) -> float:
    """‖UᵀU − I‖_F/√n of a tall U."""
    U = U.double()
    n = U.shape[-1]
    return float((U.mT @ U - torch.eye(n, dtype=torch.float64)).norm()) / n**0.5
