"""The two products of the Gram method, S = AᵀA and U = A·S^(-1/2), which also work for a matrix sharded by rows.

S is summed in fp64 whatever the dtype of A (an fp32 Gram matrix loses every direction below σ/σ_max = 1e-2), in row
chunks and only in its upper block triangle. `root.py` computes the root between them. The nuclear norm is known before the
last product, so that product can be added straight into a parameter and U is never stored. This file knows nothing about
ranks: to use several, sum S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .oracle import full_precision, inverse_scale, largest_entry, row_chunks

BLOCK_COLUMNS = 192


@torch.no_grad()
def gram_matrix(rows: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """S = AᵀA in fp64, exactly symmetric.

    Args:
        rows: (…, m, n) of any floating dtype; m may be 0. A rank with some rows of A gets its summand of S.
        scale: multiplies A first, broadcast against it (fp64 entries beyond 1e±150 would leave the range of S).
    """
    *batch, _, n = rows.shape
    S = rows.new_zeros(*batch, n, n, dtype=torch.float64)
    # Blocks halve the work on a CPU; a GPU prefers one large product.
    cpu = rows.device.type == "cpu"
    # Only half of S is summed, exactly; its transpose is added at the end.
    width, share = (BLOCK_COLUMNS, 1.0) if cpu else (max(n, 1), 0.5)
    for chunk in row_chunks(rows):
        C = rows[..., chunk, :].to(torch.float64)
        if scale is not None:
            C = C * scale
        for j in range(0, n, width):
            block = S[..., j : j + width, j:]
            left, right = C[..., j : j + width].mT, C[..., j:]
            if S.dim() == 2:
                block.addmm_(left, right, alpha=share)
            else:
                block.add_(left @ right, alpha=share)
    if not cpu:
        return S + S.mT
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
        scale: a number or a 0-d tensor, for example minus learning rate times nuclear norm.
        precise: multiply in fp64. Otherwise fp32 is used (fp64 for fp64 rows), whose error in a direction is about
            1e-7·σ_max/σ: enough for the default `lower`, not for smaller ones. A GPU with fast fp64 always uses fp64.
        dtype: dtype of the result if `out` is not given. Defaults to that of the rows.
    """
    if not (isinstance(scale, float) and scale == 1.0):
        X = X.to(torch.float64) * scale
    return RowFactor(X, rows.dtype, precise=precise).apply(rows, out=out, dtype=dtype)


class RowFactor:
    """The right factor X of `apply_rows`, prepared once for several blocks of rows of one dtype."""

    def __init__(self, X: Tensor, dtype: torch.dtype, *, precise: bool = False):
        """X: (…, n, n). dtype: dtype of the rows."""
        fp64 = precise or multiplies_in_fp64(dtype, X.device)
        self.work = torch.float64 if fp64 else torch.float32
        self.up: Tensor | None = None
        self.diagonal: Tensor | None = None
        if not fp64:
            down, self.up = _range_of_fp32(X)
            X = X * down
        self.rest = X.to(self.work, copy=not fp64)
        if not fp64:
            # Most of a well-conditioned X is its diagonal. Added last, it rounds only once; inside the product, every later
            # term of the sum would round at its size, which costs a digit.
            self.diagonal = X.diagonal(dim1=-2, dim2=-1)[..., None, :].to(self.work)
            self.rest.diagonal(dim1=-2, dim2=-1).zero_()

    def apply(self, rows: Tensor, *, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """rows·X (…, m, n) in ``dtype``, by default that of the rows; or, with `out`, added to it."""
        target = torch.empty_like(rows, dtype=dtype) if out is None else out
        for chunk in row_chunks(rows):
            A = rows[..., chunk, :].to(self.work)
            if self.up is not None:
                A = A * self.up
            with full_precision(rows.device):
                product = A @ self.rest
            if self.diagonal is not None:
                product.addcmul_(A, self.diagonal)
            if out is None:
                target[..., chunk, :] = product
            else:
                target[..., chunk, :] += product
        return target


def _range_of_fp32(X: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two (d, 1/d) of shape (…, 1, 1) such that X·d (…, n, n) fits fp32; 1 if X itself does.

    X holds reciprocals of singular values times a learning rate, which may be outside fp32's range, as for denormal A.
    Nothing is read back from the device.
    """
    if X.numel() == 0:
        one = X.new_ones(())
        return one, one.float()
    peak = largest_entry(X)
    scale = inverse_scale(peak).double().clamp(2.0**-126, 2.0**126)
    scale = torch.where((peak > 2.0**-50) & (peak < 2.0**50), 1.0, scale)
    return scale, scale.reciprocal().float()


def multiplies_in_fp64(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product with rows of this dtype is always in fp64: fp64 data, or a GPU where it costs the same."""
    return dtype == torch.float64 or fast_fp64(device)


def fast_fp64(device: torch.device) -> bool:
    """Whether fp64 products run at about the speed of fp32 ones: data-centre GPUs (A100, H100, H200, B200)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in {(8, 0), (9, 0), (10, 0)}
