"""Spectrum homogenization: the best update of the isotropic curvature model, instead of the polar factor.

For a gradient G = UΣVᵀ and curvature that grows with the fourth power of the step, the model's best step is
Q = U·diag(s)·Vᵀ with s_j³ + D·s_j ∝ σ_j and D = ½Σs_i² (Su's isotropic curvature model, quartic case). Q keeps the
singular vectors and the order of the singular values; their ratios shrink, but not to one as in the polar factor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gram import apply_rows, gram_matrix
from .oracle import inverse_scale, largest_entry
from .root import inverse_sqrt


class Homogenized(NamedTuple):
    """Q (…, m, n) in the dtype of A; in fp64 (…) A's nuclear norm and extreme singular values, and ‖QᵀQ − I‖_F/√min(m, n)."""

    Q: Tensor
    nuclear_norm: Tensor
    sigma_max: Tensor
    sigma_min: Tensor
    residual: Tensor


@torch.no_grad()
def homogenize(a: Tensor, *, lower: float = 1e-4) -> Homogenized:
    """Q of each matrix of a batch (…, m, n), by the eigendecomposition of the smaller Gram matrix in fp64.

    Directions with σ/σ_max ≤ ``lower`` count as null and get gain 0. A non-finite matrix gives NaN and no error.
    """
    tall = a if a.shape[-2] >= a.shape[-1] else a.mT
    scale = inverse_scale(largest_entry(tall)).to(torch.float64)
    root = inverse_sqrt(gram_matrix(tall, scale=scale), lower=lower, homogenized=True)
    Q = apply_rows(tall, root.X * scale)
    inverse = scale[..., 0, 0].reciprocal()
    return Homogenized(
        Q if tall is a else Q.mT,
        root.nuclear_norm * inverse,
        root.sigma_max * inverse,
        root.sigma_min * inverse,
        root.residual,
    )
