"""The two products of the Gram method, S = AᵀA and U = A·S^(-1/2), which serve a matrix sharded by rows as well.

S is summed in fp64 whatever the dtype of A (an fp32 Gram matrix loses every direction below σ/σ_max = 1e-2), in row
chunks and only in its upper block triangle. The root between them is `root.py`'s. The nuclear norm is known before the
last product, so that product can be added straight into a parameter and U need never exist. Knows nothing of ranks: to
use several, sum S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .oracle import inverse_scale, largest_entry, row_chunks, without_tf32

BLOCK_COLUMNS = 192


@torch.no_grad()
def gram_matrix(rows: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """S = AᵀA in fp64, exactly symmetric.

    Args:
        rows: (…, m, n) of any floating dtype; m may be 0. A rank that holds some rows of A gets its summand of S.
        scale: multiplies A first, broadcast against it (fp64 entries beyond 1e±150 would leave the range of S).
    """
    *batch, _, n = rows.shape
    S = rows.new_zeros(*batch, n, n, dtype=torch.float64)
    # Blocks pay on a CPU, where they halve the work; a GPU prefers one large product.
    width = BLOCK_COLUMNS if rows.device.type == "cpu" else max(n, 1)
    for chunk in row_chunks(rows):
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
            1e-7·σ_max/σ: right for the default `lower`, not below it. On a GPU with fast fp64 it is used anyway.
        dtype: of the result when `out` is not given; that of the rows by default.
    """
    work = torch.float64 if precise or multiplies_in_fp64(rows) else torch.float32
    if not (isinstance(scale, float) and scale == 1.0):
        X = X.to(torch.float64) * scale
    up: Tensor | None = None
    if work == torch.float32:
        down, up = _range_of_fp32(X)
        X = X * down
    # Most of a well-conditioned X is its diagonal. Added last, it rounds once; inside the product, every later
    # term of the sum would round at its size, which costs a digit.
    diagonal = X.diagonal(dim1=-2, dim2=-1)[..., None, :].to(work)
    rest = X.to(work, copy=True)
    rest.diagonal(dim1=-2, dim2=-1).zero_()
    target = torch.empty_like(rows, dtype=dtype) if out is None else out
    for chunk in row_chunks(rows):
        A = rows[..., chunk, :].to(work)
        if up is not None:
            A = A * up
        with without_tf32(rows.device):
            product = (A @ rest).addcmul_(A, diagonal)
        if out is None:
            target[..., chunk, :] = product
        else:
            target[..., chunk, :] += product
    return target


def _range_of_fp32(X: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two (d, 1/d) of shape (…, 1, 1) such that X·d (…, n, n) suits fp32; 1 where X does as it is.

    X holds reciprocals of singular values, times a learning rate: outside fp32's range for denormal A, say. Nothing is
    read back to find out.
    """
    if X.numel() == 0:
        one = X.new_ones(())
        return one, one.float()
    peak = largest_entry(X)
    scale = inverse_scale(peak).double().clamp(2.0**-126, 2.0**126)
    scale = torch.where((peak > 2.0**-50) & (peak < 2.0**50), 1.0, scale)
    return scale, scale.reciprocal().float()


def multiplies_in_fp64(rows: Tensor) -> bool:
    """Whether a product with these rows is in fp64 anyway: fp64 data, or a GPU where it costs the same."""
    return rows.dtype == torch.float64 or fast_fp64(rows.device)


def fast_fp64(device: torch.device) -> bool:
    """Whether fp64 products run at about the speed of fp32 ones: data-centre GPUs (A100, H100, H200, B200)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in {(8, 0), (9, 0), (10, 0)}
