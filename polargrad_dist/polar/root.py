"""S^(-1/2) and tr S^(1/2) of a Gram matrix S = AᵀA, in fp64: by an eigendecomposition, or by matrix products alone.

The eigendecomposition is faster on a CPU and gives the whole spectrum. On a GPU it is slow and makes the host wait,
because it checks its own success; the products neither factorize nor report anything to the host. Their iteration is
the coupled form of X ← X·p(X S X) with the minimax quintics p of Polar Express (Amsel, Persson, Musco and Gower 2025,
arXiv:2505.16932): it carries X → S^(-1/2) and Y → S^(1/2) side by side (Higham 2008, section 6.7). The uncoupled form is
unstable: rounding makes X and S cease to commute, and at a condition number of 1e4 it overflows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..compiled import constant_result
from ..errors import PolarError
from .gram import gram_matrix
from .oracle import probe
from .polynomial import polar_express_coefficients
from .spectrum import homogenized_spectrum

ROOTS = ("auto", "eigh", "products")
# Squaring loses half the digits: below this σ/σ_max an fp64 Gram matrix has only rounding noise.
SMALLEST_LOWER = 1e-7
# Products converge down to this fraction of `lower`: directions that small still count in the nuclear norm.
REACH = 0.1
# Below this σ/σ_max the products' own rounding, about eps·(σ_max/σ)², affects the gains.
SMALLEST_REACH = 1e-6
CONVERGED = 1e-10
PROBES = 8


class InverseSqrt(NamedTuple):
    """What S = AᵀA says about A; every field fp64 (kept: bool), batched over leading dimensions.

    X (…, n, n) is S^(-1/2) with null directions left out or damped, nuclear_norm (…) is tr S^(1/2), sigma_max and
    sigma_min (…) are A's extreme singular values. sigma (…, n) are all singular values, ascending, and kept (…, n) marks
    those that X does not leave out; both are (…, 0) if the root was computed by products, which do not give the spectrum.
    residual (…) is ‖UᵀU − I‖_F/√n of U = A·X.
    """

    X: Tensor
    nuclear_norm: Tensor
    sigma_max: Tensor
    sigma_min: Tensor
    sigma: Tensor
    kept: Tensor
    residual: Tensor


def choose_root(root: str, device: torch.device, *, homogenized: bool = False) -> str:
    """What "auto" means: "products" on a GPU, "eigh" on a CPU and wherever the whole spectrum is needed.

    Raises PolarError for an unknown root, and for products if the homogenized factor is requested.
    """
    if root not in ROOTS:
        raise PolarError(f"root is {root!r}, expected one of: {', '.join(ROOTS)}")
    if root == "products" and homogenized:
        raise PolarError(
            "root is 'products' with the homogenized factor, expected 'eigh', which computes every singular value"
        )
    if root == "auto":
        return "eigh" if device.type == "cpu" or homogenized else "products"
    return root


@torch.no_grad()
def inverse_sqrt(
    S: Tensor, *, lower: float = 1e-4, homogenized: bool = False, root: str = "auto"
) -> InverseSqrt:
    """S^(-1/2) and the nuclear norm from a Gram matrix. A zero matrix gives zeros, a non-finite one NaN everywhere.

    By eigendecomposition ("eigh"), directions with σ/σ_max ≤ `lower` (at least 1e-7) count as null: X maps them to zero,
    so U is the partial isometry. By products they are damped, not cut off: down to `lower`/10 (at least 1e-6) the gain is
    1 up to rounding, about eps·(σ_max/σ)²; below that it falls in proportion to σ, and with the default it is at most
    0.06 at 1e-7·σ_max and 0.006 at 1e-8·σ_max. The nuclear norm counts all directions, damped ones by their gain.

    Args:
        S: (…, n, n) fp64, symmetric positive semidefinite.
        lower: relative threshold on the singular values of A, not of S.
        homogenized: X instead turns A into its homogenized factor, see `homogenize`. Needs "eigh".
        root: "eigh" waits for a GPU. "products" never does: a fixed number of fp64 products (42 of n×n matrices for
            the default `lower`), batched; sigma_max and sigma_min are then Rayleigh quotients after a few power
            iterations, so never outside the spectrum: σ_max to 5 % at worst, σ_min to a factor of two.
            "auto" uses products on a GPU and eigh on a CPU, where LAPACK is about 6 times faster.

    Raises:
        PolarError: an unknown root, or products with homogenized.
    """
    if choose_root(root, S.device, homogenized=homogenized) == "eigh":
        return _by_eigh(S, lower, homogenized)
    return _by_products(S, lower)


def _by_eigh(S: Tensor, lower: float, homogenized: bool) -> InverseSqrt:
    finite = S.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    S = torch.where(finite[..., None, None], S, 0.0)
    eigenvalues, V = _eigh_of_own(S)
    largest = eigenvalues[..., -1:].clamp_min(0.0)
    sigma = torch.where(eigenvalues > noise(largest), eigenvalues, 0.0).sqrt()
    kept = sigma > max(lower, SMALLEST_LOWER) * sigma[..., -1:]
    gains = torch.where(kept, sigma, 1.0).reciprocal() * kept
    lengths = kept.double()
    if homogenized:
        lengths = homogenized_spectrum(sigma, kept)
        gains = gains * lengths
    quarter = gains.sqrt()
    X = gram_matrix((V * quarter[..., None, :]).mT)
    X.masked_fill_(~finite[..., None, None], torch.nan)
    sigma.masked_fill_(~finite[..., None], torch.nan)
    residual = (lengths.square() - 1).square().mean(-1).sqrt()
    return InverseSqrt(X, sigma.sum(-1), sigma[..., -1], sigma[..., 0], sigma, kept, residual)


def noise(largest: Tensor) -> Tensor:
    """The rounding error of a zero eigenvalue, given the largest: below this, an eigenvalue is not a squared σ."""
    return 4 * torch.finfo(torch.float64).eps * largest


def _eigh_of_own(S: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of a matrix that may be overwritten."""
    if S.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.linalg.eigh(S)
    # LAPACK works in place, column by column: with the transpose as input and output, it saves one n×n matrix.
    eigenvalues = S.new_empty(S.shape[:-1])
    torch.linalg.eigh(S.mT, out=(eigenvalues, S.mT))
    return eigenvalues, S.mT


def _by_products(S: Tensor, lower: float) -> InverseSqrt:
    n = S.shape[-1]
    unit, square, top = unit_spectrum(S)
    Y, X = unit, None
    for a, b, c in root_schedule(lower):
        if X is None:
            P = torch.add(b * unit, square, alpha=c)
        else:
            R = X @ Y
            P = plus_square(R, b, c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        X = P if X is None else P @ X
        Y = Y @ P
    assert X is not None
    X = (X + X.mT) / 2
    largest, smallest = extreme_singular_values(unit, X, square)
    # The Gram matrix of U = A·X.
    missing = X @ Y
    missing.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    residual = missing.square().sum((-2, -1)).sqrt() / math.sqrt(n)
    back = torch.where(top == 0, 1.0, top).sqrt()
    X = (X / back[..., None, None]).masked_fill_((top == 0)[..., None, None], 0.0)
    unseen = S.new_empty(*S.shape[:-2], 0)
    return InverseSqrt(
        X,
        Y.diagonal(dim1=-2, dim2=-1).sum(-1) * back,
        largest * back,
        smallest * back,
        unseen,
        unseen.bool(),
        residual,
    )


def plus_square(R: Tensor, b: float, c: float) -> Tensor:
    """bR + cR² of R (…, n, n), in one call."""
    if R.dim() == 2:
        return torch.addmm(R, R, R, beta=b, alpha=c)
    flat = R.reshape(-1, *R.shape[-2:])
    return torch.baddbmm(flat, flat, flat, beta=b, alpha=c).view(R.shape)


def unit_spectrum(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R, R², t): S = t·R (…, n, n) with eigenvalues in [0, 1], the largest at least n^(-1/4); t (…) is 0 for S = 0."""
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)
    # Divide first: the square would leave fp64's range.
    R = S / torch.where(trace == 0, 1.0, trace)[..., None, None]
    R2 = R @ R
    bound = R2.square().sum((-2, -1)).pow(0.25) * (1 + 1e-12)
    unit = torch.where(bound == 0, 1.0, bound)[..., None, None]
    return R / unit, R2 / unit.square(), trace * bound


def extreme_singular_values(S: Tensor, X: Tensor, power: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(σ_max, σ_min) (…) of A, from S = AᵀA and X ≈ S^(-1/2) by power iterations on a power of S (S itself) and on X.

    Rayleigh quotients with S, so inside the spectrum up to rounding; 0 if σ_min² is below the rounding of σ_max².
    """
    # Both at once: half as many kernels.
    v = dominant_directions(torch.stack([S if power is None else power, X])).squeeze(-1).movedim(0, -1)
    largest, smallest = (v * (S @ v)).sum(-2).clamp_min(0.0).unbind(-1)
    smallest = torch.minimum(smallest, largest)
    # NaN stays NaN.
    smallest = torch.where(smallest <= noise(largest), 0.0, smallest)
    return largest.sqrt(), smallest.sqrt()


def dominant_directions(M: Tensor) -> Tensor:
    """An approximate eigenvector of the largest eigenvalue of a positive semidefinite M (…, n, n): (…, n, 1) of norm 1.

    That eigenvalue is between 1e-8 and 1e8, so the `PROBES` products need no scaling in between.
    """
    tiny = torch.finfo(M.dtype).tiny
    v = probe(M)
    for _ in range(PROBES):
        v = M @ v
    return v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(tiny)


@constant_result
def root_schedule(lower: float) -> tuple[tuple[float, float, float], ...]:
    """The fewest minimax quintics that bring every σ/σ_max ≥ lower/10 (at least 1e-6) to within 1e-10 of 1."""
    return _schedule(min(max(REACH * lower, SMALLEST_REACH), 0.5))


@lru_cache(maxsize=64)
def _schedule(reach: float) -> tuple[tuple[float, float, float], ...]:
    for steps in range(1, 32):
        schedule = polar_express_coefficients(reach, steps)
        x = reach
        for a, b, c in schedule:
            x *= a + x * x * (b + x * x * c)
        if abs(1 - x) <= CONVERGED:
            break
    return schedule
