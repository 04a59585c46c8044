"""The singular values of a homogenized factor: a function of those of the matrix alone (see `homogenize`)."""

from __future__ import annotations

import torch
from torch import Tensor

HALVINGS = 60


def homogenized_spectrum(sigma: Tensor, kept: Tensor) -> Tensor:
    """s (…, n) with s³ + D·s = λ·σ, D = ½Σs², scaled to Σs² = the number of kept directions, so that ‖Q‖_F = ‖U‖_F.

    The scale is free, since the model's constant only multiplies the step; this one lets learning rates carry over.

    Args:
        sigma: (…, n) fp64, singular values in any order.
        kept: (…, n) bool, those that are not null; the others get s = 0.
    """
    sigma = sigma * kept
    rank = kept.sum(-1, keepdim=True).to(sigma.dtype)
    D = rank.clamp_min(1.0) / 2
    size = torch.linalg.vector_norm(sigma, dim=-1, keepdim=True)
    unit = torch.where(size > 0, sigma / size, 0.0) * rank.sqrt()
    # D·s ≤ λ·σ ≤ 3D·s, because s_j² ≤ Σs² = 2D.
    low, high = D, 3 * D
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_long = _root(middle * unit, D).square().sum(-1, keepdim=True) > rank
        low, high = torch.where(too_long, low, middle), torch.where(too_long, middle, high)
    return _root((low + high) / 2 * unit, D)


def _root(q: Tensor, p: Tensor) -> Tensor:
    """The real root t of t³ + p·t = q for p > 0, q ≥ 0."""
    return 2 * (p / 3).sqrt() * (torch.asinh(1.5 * q / p * (3 / p).sqrt()) / 3).sinh()
