"""`polar`: one call for every method. Checks, scaling, orientation, the choice that `auto` makes, and the result.

Knows tensors only: no optimizer, no process group. Conventions follow scipy.linalg.polar (side="right").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import PolarError
from .cost import choose_method
from .newton import newton
from .oracle import Options, Oracle, full_precision, is_finite, largest_entry, without_autocast
from .polynomial import newton_schulz, polar_express
from .qdwh import qdwh
from .root import choose_root
from .rows import CompressedRows, compress_rows, expand_rows
from .spectral import gram, svd
from .zolo import zolo

ORACLES = {
    "svd": svd,
    "gram": gram,
    "qdwh": qdwh,
    "zolo": zolo,
    "newton": newton,
    "newton_schulz": newton_schulz,
    "polar_express": polar_express,
}
POLYNOMIALS = ("newton_schulz", "polar_express")
TAKES_STEPS = ("qdwh", *POLYNOMIALS)


class PolarInfo(NamedTuple):
    """Facts about the computation. Tensors have the batch shape (…); None if the method does not compute them.

    sigma_max and sigma_min are exact for svd and gram; for qdwh, zolo and newton they are the estimates that they start
    from, which may be off by a factor of two. residual is ‖UᵀU − I‖_F/√min(m, n): 0 for orthonormal columns, √(share of
    null directions) for a partial isometry.
    """

    method: str
    steps: int | None
    sigma_max: Tensor | None
    sigma_min: Tensor | None
    residual: Tensor | None


class Polar(NamedTuple):
    """U (…, m, n), H (…, n, n) or None, nuclear_norm (…) = ⟨A, U⟩ in at least fp32, info or None."""

    U: Tensor
    H: Tensor | None
    nuclear_norm: Tensor
    info: PolarInfo | None


@torch.no_grad()
def polar(
    a: Tensor,
    *,
    method: str = "auto",
    steps: int | None = None,
    lower: float = 1e-4,
    hermitian: bool = False,
    out_dtype: torch.dtype | None = None,
    info: bool = False,
    check: bool = True,
    coefficients: str | Sequence[tuple[float, float, float]] | None = None,
    root: str = "auto",
) -> Polar:
    """The polar decomposition A = U·H of a batch of matrices. Not differentiable: nothing is recorded for autograd.

    Args:
        a: (…, m, n) in fp64, fp32, bf16 or fp16, tall or wide. Half types are computed in fp32 (by the polynomial
            methods in their own type).
        method: "auto", "svd", "gram", "qdwh", "zolo", "newton", "newton_schulz" or "polar_express"; docs/polar.md
            says what each costs and gives.
        steps: inner steps. With steps, qdwh is truncated after that many from ℓ₀ = eps, plus a cubic Newton–Schulz step,
            as in the paper's tables; without, it runs to convergence. For newton_schulz and polar_express it defaults to 5,
            enough for training; with lower=1e-4 polar_express comes within 1e-4 of the factor in about 10. The other
            methods refuse it.
        lower: relative to σ_max. Below it a direction counts as null (svd, gram: gain 0) or is damped (qdwh, zolo,
            newton, polar_express: gain about σ/(lower·σ_max)). Use 1e-7 on fp32 to resolve all that the data hold;
            `auto` then works in fp64.
        hermitian: also return H, symmetric positive semidefinite, in at least fp32.
        out_dtype: dtype of U. Defaults to that of `a`.
        info: also return PolarInfo. Costs one Gram matrix of U for methods that do not compute the spectrum.
        check: raise on NaN or Inf, which reads one number back from the device. Without it, such a matrix becomes NaN,
            and no method waits for a GPU except svd, and gram with root="eigh": on a GPU these check their own success on
            the host.
        coefficients: for newton_schulz: "muon" (default), "cubic", or a sequence of (a, b, c), one per step.
        root: how gram computes S^(-1/2): "eigh", "products", or "auto" for products on a GPU and eigh on a CPU (see
            `inverse_sqrt`). With one of the first two, `auto` chooses gram.

    Returns:
        Polar. On rank-deficient input U is the partial isometry; a zero matrix gives U = 0. The nuclear norm of an
        approximate method is ⟨A, U⟩ of its own U.

    Raises:
        PolarError: a matrix has NaN or Inf entries (the error names its batch index), or an argument is invalid.
    """
    _validate(a, method, steps, lower, coefficients, out_dtype)
    if root != "auto" and method == "auto":
        method = "gram"
    root = _root_for(method, root, a.device)
    *batch, m, n = a.shape
    out_dtype = out_dtype or a.dtype
    tall = (a if m >= n else a.mT).reshape(math.prod(batch), max(m, n), min(m, n))
    if tall.numel() == 0:
        return _empty(a, method, hermitian, out_dtype, info)
    # In matrix products NaN stays within its matrix, and fills it; a factorization may fail on it.
    finite = is_finite(largest_entry(tall)) if check or method not in POLYNOMIALS else None
    if check and finite is not None:
        _require_finite(finite[:, 0, 0], a.shape[:-2])
    # H needs U in full precision, even if the caller wants half precision.
    dtype = torch.promote_types(out_dtype, torch.float32) if hermitian else out_dtype
    options = Options(steps, lower, dtype, info, coefficients, check or a.device.type == "cpu", root)
    sparse = _nonzero_rows(tall) if method == "auto" else None
    if method == "auto":
        method = choose_method(tall.shape if sparse is None else sparse.rows.shape, a.device, lower=lower)
    if sparse is not None and finite is not None and not check:
        sparse = sparse._replace(rows=torch.where(finite[0], sparse.rows, 0.0))
    whole = tall if check or finite is None or method == "gram" else torch.where(finite, tall, 0.0)
    with without_autocast(a.device) if method in POLYNOMIALS else full_precision(a.device):
        found = (
            ORACLES[method](whole, options) if sparse is None else _on_nonzero_rows(sparse, method, options)
        )
    if not check and finite is not None:
        found.U.masked_fill_(~finite, torch.nan)
        found.nuclear_norm.masked_fill_(~finite[:, 0, 0], torch.nan)
    U = (found.U if m >= n else found.U.mT).reshape(a.shape).to(out_dtype)
    H = None
    if hermitian:
        with full_precision(a.device):
            H = _hermitian_factor(tall, found.U, wide=m < n).reshape(*batch, n, n)
    norm = found.nuclear_norm.to(torch.promote_types(a.dtype, torch.float32)).reshape(batch)
    return Polar(U, H, norm, _details(found, method, batch) if info else None)


def _nonzero_rows(tall: Tensor) -> CompressedRows | None:
    """The non-zero rows of a single tall matrix on a CPU, if leaving out the zero rows at least halves the work."""
    count, m, n = tall.shape
    if count != 1 or tall.device.type != "cpu" or m < 4 * n:
        return None
    sparse = compress_rows(tall[0])
    return sparse if 0 < sparse.rows.shape[0] <= m // 2 else None


def _on_nonzero_rows(sparse: CompressedRows, method: str, options: Options) -> Oracle:
    """The oracle on the non-zero rows; the others stay zero in U. Fewer than n rows leave n - k null directions."""
    k, n = sparse.rows.shape
    found = ORACLES[method]((sparse.rows if k >= n else sparse.rows.mT)[None], options)
    U = found.U[0] if k >= n else found.U[0].mT
    if k < n:
        residual = None if found.residual is None else ((k * found.residual**2 + n - k) / n).sqrt()
        sigma_min = None if found.sigma_min is None else torch.zeros_like(found.sigma_min)
        found = found._replace(residual=residual, sigma_min=sigma_min)
    return found._replace(U=expand_rows(U, sparse.positions, sparse.m)[None])


def _hermitian_factor(tall: Tensor, U: Tensor, wide: bool) -> Tensor:
    """H = UᵀA, made symmetric, of each A (B, m, n), m ≥ n; for a wide matrix, given as A = its transpose, UHUᵀ of that."""
    dtype = torch.promote_types(tall.dtype, torch.float32)
    U = U.to(dtype)
    H = U.mT @ tall.to(dtype)
    H = (H + H.mT) / 2
    if wide:
        H = U @ H @ U.mT
        H = (H + H.mT) / 2
    return H


def _details(found: Oracle, method: str, batch: list[int]) -> PolarInfo:
    def shaped(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(batch)

    return PolarInfo(
        method, found.steps, shaped(found.sigma_max), shaped(found.sigma_min), shaped(found.residual)
    )


def _empty(a: Tensor, method: str, hermitian: bool, out_dtype: torch.dtype, info: bool) -> Polar:
    """No matrices, or matrices without entries: nothing to decompose, H = 0 and norm 0."""
    *batch, _, n = a.shape
    dtype = torch.promote_types(a.dtype, torch.float32)
    zeros = a.new_zeros(batch, dtype=dtype)
    H = a.new_zeros(*batch, n, n, dtype=dtype) if hermitian else None
    details = PolarInfo(method, 0, zeros, zeros, zeros) if info else None
    return Polar(torch.empty_like(a, dtype=out_dtype), H, zeros, details)


def _root_for(method: str, root: str, device: torch.device) -> str:
    if root != "auto" and method != "gram":
        raise PolarError(
            f"root is {root!r} with method {method!r}, expected no root: only gram and auto use it, so leave it out"
        )
    return choose_root(root, device)


def _validate(
    a: Tensor,
    method: str,
    steps: int | None,
    lower: float,
    coefficients: object,
    out_dtype: torch.dtype | None,
) -> None:
    if a.dim() < 2 or not a.is_floating_point():
        raise PolarError(
            f"polar was given {tuple(a.shape)} of {a.dtype}, expected a real floating tensor (…, m, n)"
        )
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise PolarError(f"out_dtype is {out_dtype}, expected a floating dtype")
    if method != "auto" and method not in ORACLES:
        raise PolarError(f"method is {method!r}, expected auto or one of: {', '.join(ORACLES)}")
    if not 0 <= lower < 1:
        raise PolarError(
            f"lower is {lower}, expected a number in [0, 1), relative to the largest singular value"
        )
    if steps is not None and (steps < 1 or method not in TAKES_STEPS):
        raise PolarError(
            f"steps is {steps} with method {method!r}, expected steps >= 1 and one of: {', '.join(TAKES_STEPS)}"
        )
    if method == "polar_express" and lower == 0:
        raise PolarError(
            "lower is 0 with method 'polar_express', expected lower > 0: it is optimal on [lower, 1]"
        )
    if coefficients is not None and method != "newton_schulz":
        raise PolarError(
            f"coefficients are set with method {method!r}, expected them only with 'newton_schulz'"
        )


def _require_finite(finite: Tensor, batch: torch.Size) -> None:
    if bool(finite.all()):
        return
    advice = "expected finite numbers: fix the input, or pass check=False to get NaN"
    if not batch:
        raise PolarError(f"the matrix holds NaN or Inf, {advice}")
    flat = (~finite).nonzero()[:, 0]
    places = [str(tuple(int(i) for i in torch.unravel_index(k, batch))) for k in flat[:8]]
    raise PolarError(
        f"{len(flat)} of {len(finite)} matrices hold NaN or Inf, at batch index {', '.join(places)}, {advice} "
        "for these matrices"
    )
