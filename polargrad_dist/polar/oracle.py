"""The input and output of every method, and shared arithmetic: safe scaling, ⟨A, U⟩, ‖UᵀU − I‖."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

# One fp64 chunk of A: large enough for an efficient product, small compared with any matrix worth chunking. On a GPU each
# chunk adds a few launches, so only what would take a large part of its memory is divided.
CHUNK_ELEMENTS = {"cpu": 1 << 18}
GPU_CHUNK_ELEMENTS = 1 << 24


class Options(NamedTuple):
    """`polar`'s arguments for the methods; may_wait says whether numbers may be read back from the device."""

    steps: int | None
    lower: float
    out_dtype: torch.dtype
    info: bool
    coefficients: str | Sequence[tuple[float, float, float]] | None
    may_wait: bool
    root: str


class Oracle(NamedTuple):
    """A method's result for A (B, m, n), m ≥ n: U in out_dtype, the nuclear norm (B,) in fp64, and its by-products."""

    U: Tensor
    nuclear_norm: Tensor
    steps: int | None = None
    sigma_max: Tensor | None = None
    sigma_min: Tensor | None = None
    residual: Tensor | None = None


def rows_at_once(rows: Tensor) -> int:
    """How many rows of (…, m, n) are processed at a time: about 2^18 elements of a matrix, 2^24 on a GPU."""
    return max(256, CHUNK_ELEMENTS.get(rows.device.type, GPU_CHUNK_ELEMENTS) // max(rows.shape[-1], 1))


def row_chunks(rows: Tensor) -> list[slice]:
    """Slices that divide the m rows of (…, m, n) into such chunks."""
    m, size = rows.shape[-2], rows_at_once(rows)
    return [slice(start, min(start + size, m)) for start in range(0, m, size)]


def is_finite(x: Tensor) -> Tensor:
    """isfinite for a few numbers, in two operations; torch's takes four."""
    return (x - x) == 0


def largest_entry(A: Tensor) -> Tensor:
    """max |a_ij| of A (…, m, n) as (…, 1, 1), without copying A; NaN and Inf pass through."""
    return torch.maximum(A.amax((-2, -1), keepdim=True), -A.amin((-2, -1), keepdim=True))


def inverse_scale(peak: Tensor) -> Tensor:
    """A power of two in fp32 or fp64 that brings the entry `peak` into [1/2, 1); 1 for a zero, NaN or Inf peak.

    A power of two, so scaling is exact; limited to the dtype's range, so denormals are scaled up as far as possible.
    """
    peak = peak if peak.dtype == torch.float64 else peak.float()
    mantissa, _ = torch.frexp(peak)
    bound = 2.0 ** (1000 if peak.dtype == torch.float64 else 126)
    scale = (mantissa / peak).clamp(1 / bound, bound)
    return torch.where((peak > 0) & is_finite(peak), scale, 1.0)


def working_copy(A: Tensor) -> tuple[Tensor, Tensor]:
    """(scaled A in fp32 or fp64, the scale (B, 1, 1)): half types are computed in fp32."""
    scale = inverse_scale(largest_entry(A))
    return A.to(scale.dtype) * scale, scale


def inner_product(A: Tensor, U: Tensor, within: torch.dtype = torch.float64) -> Tensor:
    """⟨A, U⟩ (B,) of two (B, m, n): sums in `within` over a row chunk, in fp64 over the chunks.

    Products are in at least fp32, but in bf16 for two bf16 matrices: their rounding errors are independent, so the sum is
    accurate to five digits.
    """
    both = torch.promote_types(A.dtype, U.dtype)
    work = both if both == torch.bfloat16 else torch.promote_types(both, torch.float32)
    total = torch.zeros(A.shape[:-2], dtype=torch.float64, device=A.device)
    for chunk in row_chunks(A):
        products = A[..., chunk, :].to(work) * U[..., chunk, :]
        total = total + products.sum((-2, -1), dtype=torch.promote_types(within, work))
    return total


def orthogonality(U: Tensor) -> Tensor:
    """‖UᵀU − I‖_F/√n (B,) of U (B, m, n)."""
    n = U.shape[-1]
    work = U if U.dtype == torch.float64 else U.float()
    eye = torch.eye(n, dtype=work.dtype, device=work.device)
    return torch.linalg.matrix_norm(work.mT @ work - eye) / max(n, 1) ** 0.5


def missing_share(kept: Tensor) -> Tensor:
    """`orthogonality` of a partial isometry that keeps these directions (B, n): the root of the share it leaves out."""
    return (~kept).double().mean(-1).sqrt()


def probe(like: Tensor) -> Tensor:
    """A vector (n, 1) to start an iteration on matrices (…, n, n) from: as good as random, and the same on every rank."""
    index = torch.arange(1, like.shape[-1] + 1, dtype=like.dtype, device=like.device)
    return torch.cos(index * index)[:, None]


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in their factors' dtype inside, also where a training loop calls `polar` within autocast."""
    off = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if off else nullcontext()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Full fp32 products inside: neither autocast nor TF32, which a trainer may have enabled and keeps only three digits."""
    with without_autocast(device), without_tf32(device):
        yield


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
