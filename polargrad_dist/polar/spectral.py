"""The two methods that are exact to rounding above `lower`: `svd`, LAPACK's, and `gram`, a root of AᵀA in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import apply_rows, gram_matrix, multiplies_in_fp64
from .oracle import Options, Oracle, inner_product, missing_share, working_copy
from .root import inverse_sqrt

# A `lower` below this needs directions that fp32 products do not resolve.
STRICT = 1e-4


def svd(A: Tensor, options: Options) -> Oracle:
    """U = Σ u_i v_iᵀ over σ_i > lower·σ_max."""
    X, scale = working_copy(A)
    P, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    kept = sigma > max(options.lower, torch.finfo(sigma.dtype).eps) * sigma[:, :1]
    U = (P * kept[:, None, :]) @ Vh
    back = 1 / scale[:, 0].double()
    sigma = sigma.double()
    # LAPACK's fp32 singular values have a common error of 1e-7. ⟨A, U⟩ does not, to first order, except for the
    # lengths of the computed singular vectors, which are cheap to compute.
    lengths = ((P * P).sum(-2, dtype=torch.float64) * (Vh * Vh).sum(-1, dtype=torch.float64)).sqrt()
    # A singular value below a few eps·σ_max is rounding, and there may be many of them.
    left_out = sigma * (sigma > 4 * torch.finfo(X.dtype).eps * sigma[:, :1])
    nuclear_norm = inner_product(X, U) + torch.where(kept, sigma * (1 - lengths), left_out).sum(-1)
    return Oracle(
        U.to(options.out_dtype),
        nuclear_norm * back[:, 0],
        sigma_max=sigma[:, 0] * back[:, 0],
        sigma_min=sigma[:, -1] * back[:, 0],
        residual=missing_share(kept),
    )


def gram(A: Tensor, options: Options) -> Oracle:
    """U = A·S^(-1/2). The last product is fp64 in strict mode, and if it is cheap compared with the root of S."""
    scale = None
    # The squares of narrower dtypes stay within fp64's range.
    if A.dtype == torch.float64:
        A, scale = working_copy(A)
    found = inverse_sqrt(gram_matrix(A), lower=options.lower, root=options.root)
    X = found.X
    precise = options.lower < STRICT or A.shape[1] < 4 * A.shape[2] or multiplies_in_fp64(A.dtype, A.device)
    U = apply_rows(A, X, precise=precise, dtype=options.out_dtype)
    back = 1.0 if scale is None else 1 / scale[:, 0, 0]
    return Oracle(
        U,
        found.nuclear_norm * back,
        sigma_max=found.sigma_max * back,
        sigma_min=found.sigma_min * back,
        residual=found.residual,
    )
