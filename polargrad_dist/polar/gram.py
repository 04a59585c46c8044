"""The Gram method: U = A·S^(-1/2) with S = AᵀA, in three pieces that also serve a matrix sharded by rows.

S is summed in fp64 whatever the dtype of A (an fp32 Gram matrix loses every direction below σ/σ_max = 1e-2), in row
chunks and only in its upper block triangle. The nuclear norm tr S^(1/2) is known before the last product, so that
product can be added straight into a parameter and U need never exist. Knows nothing of ranks: to use several, sum S.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .oracle import row_chunks, without_tf32
from .spectrum import homogenized_spectrum

# Squaring costs half the digits: below this σ/σ_max an fp64 Gram matrix holds rounding noise.
SMALLEST_LOWER = 1e-7
BLOCK_COLUMNS = 192


class InverseSqrt(NamedTuple):
    """What S = AᵀA says about A; every field fp64 (kept: bool), batched over leading dimensions.

    X (…, n, n) is S^(-1/2) with the null directions left out, nuclear_norm (…) is tr S^(1/2), sigma_max and sigma_min (…) are
    the extreme ones of A's singular values sigma (…, n), ascending; kept (…, n) marks those that X does not leave out.
    """

    X: Tensor
    nuclear_norm: Tensor
    sigma_max: Tensor
    sigma_min: Tensor
    sigma: Tensor
    kept: Tensor


@torch.no_grad()
def gram_matrix(rows: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """S = AᵀA in fp64, exactly symmetric.

    Args:
        rows: (…, m, n) of any floating dtype; m may be 0. A rank that holds some rows of A gets its summand of S.
        scale: multiplies A first, broadcast against it (fp64 entries beyond 1e±150 would leave the range of S).
    """
    *batch, m, n = rows.shape
    S = rows.new_zeros(*batch, n, n, dtype=torch.float64)
    # Blocks pay on a CPU, where they halve the work; a GPU prefers one large product.
    width = BLOCK_COLUMNS if rows.device.type == "cpu" else max(n, 1)
    for chunk in row_chunks(m, n):
        C = rows[..., chunk, :].to(torch.float64)
        if scale is not None:
            C = C * scale
        for j in range(0, n, width):
            block = S[..., j : j + width, j:]
            left, right = C[..., j : j + width].mT, C[..., j:]
            if S.dim() == 2:
                block.addmm_(left, right)
            else:
                block.add_(left @ right)
    for j in range(0, n, width):
        square = S[..., j : j + width, j : j + width]
        square.copy_(square.triu() + square.triu(1).mT)
        S[..., j + width :, j : j + width] = S[..., j : j + width, j + width :].mT
    return S


def inverse_sqrt(S: Tensor, *, lower: float = 1e-4, homogenized: bool = False) -> InverseSqrt:
    """S^(-1/2) and the nuclear norm from a Gram matrix, by an eigendecomposition in fp64.

    Directions with σ/σ_max ≤ `lower` (at least 1e-7) count as null: X maps them to zero, so U is the partial isometry.
    The nuclear norm counts all of them. A non-finite S gives NaN everywhere, without an error and without a
    synchronisation with the device.

    Args:
        S: (…, n, n) fp64, symmetric positive semidefinite.
        lower: relative threshold on the singular values of A, not of S.
        homogenized: X is instead what turns A into its homogenized factor, see `homogenize`.
    """
    finite = S.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    S = torch.where(finite[..., None, None], S, 0.0)
    eigenvalues, V = _eigh_of_own(S)
    largest = eigenvalues[..., -1:].clamp_min(0.0)
    # What rounding left of a zero eigenvalue is not a singular value.
    noise = 4 * torch.finfo(torch.float64).eps * largest
    sigma = torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt()
    kept = sigma > max(lower, SMALLEST_LOWER) * sigma[..., -1:]
    gains = torch.where(kept, sigma, 1.0).reciprocal() * kept
    if homogenized:
        gains = gains * homogenized_spectrum(sigma, kept)
    quarter = gains.sqrt()
    X = gram_matrix((V * quarter[..., None, :]).mT)
    X.masked_fill_(~finite[..., None, None], torch.nan)
    sigma.masked_fill_(~finite[..., None], torch.nan)
    return InverseSqrt(X, sigma.sum(-1), sigma[..., -1], sigma[..., 0], sigma, kept)


def _eigh_of_own(S: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh, of a matrix that nobody else needs."""
    if S.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.linalg.eigh(S)
    # LAPACK works in place, column by column: with the transpose as input and output there is one n×n matrix less.
    eigenvalues = S.new_empty(S.shape[:-1])
    torch.linalg.eigh(S.mT, out=(eigenvalues, S.mT))
    return eigenvalues, S.mT


@torch.no_grad()
def apply_rows(
    rows: Tensor,
    X: Tensor,
    *,
    out: Tensor | None = None,
    scale: float | Tensor = 1.0,
    precise: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """scale·A·X for rows A, or, with `out`, out += scale·A·X: an update that never stores U.

    Args:
        rows: (…, m, n) of any floating dtype; m may be 0.
        X: (…, n, n), usually InverseSqrt.X.
        out: (…, m, n), added to in place and returned.
        scale: a number or a 0-d tensor (minus learning rate times nuclear norm, say).
        precise: multiply in fp64. Otherwise in fp32 (fp64 for fp64 rows), whose error in a direction is about
            1e-7·σ_max/σ: right for the default `lower`, not below it. On a GPU with fast fp64, and at scales
            that fp32 cannot hold, fp64 is used anyway.
        dtype: of the result when `out` is not given; that of the rows by default.
    """
    work = torch.float64 if precise or needs_fp64(rows, X) else torch.float32
    if not (isinstance(scale, float) and scale == 1.0):
        X = X.to(torch.float64) * scale
    # Most of a well-conditioned X is its diagonal. Added last, it rounds once; inside the product, every later
    # term of the sum would round at its size, which costs a digit.
    diagonal = X.diagonal(dim1=-2, dim2=-1)[..., None, :].to(work)
    rest = X.to(work, copy=True)
    rest.diagonal(dim1=-2, dim2=-1).zero_()
    target = torch.empty_like(rows, dtype=dtype) if out is None else out
    for chunk in row_chunks(*rows.shape[-2:]):
        A = rows[..., chunk, :].to(work)
        with without_tf32(rows.device):
            product = (A @ rest).addcmul_(A, diagonal)
        if out is None:
            target[..., chunk, :] = product
        else:
            target[..., chunk, :] += product
    return target


def needs_fp64(rows: Tensor, X: Tensor) -> bool:
    """Whether rows·X is a product in fp64 anyway: fp64 data, a GPU where it costs the same, a scale beyond fp32's."""
    if rows.dtype == torch.float64:
        return True
    if rows.device.type != "cpu":
        return fast_fp64(rows.device)
    peak = float(X.abs().amax()) if X.numel() else 0.0
    return not (peak == 0 or 1e-15 < peak < 1e15)


def fast_fp64(device: torch.device) -> bool:
    """Whether fp64 products run at about the speed of fp32 ones: data-centre GPUs (A100, H100, H200, B200)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in {(8, 0), (9, 0), (10, 0)}
