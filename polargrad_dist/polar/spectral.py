"""The two methods that see the spectrum: `svd`, LAPACK's, and `gram`, an eigendecomposition of AᵀA in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import apply_rows, gram_matrix, inverse_sqrt
from .oracle import Options, Oracle, inverse_scale, largest_entry, missing_share, working_copy

# A `lower` below this asks for directions that fp32 products do not resolve.
STRICT = 1e-4


def svd(A: Tensor, options: Options) -> Oracle:
    """U = Σ u_i v_iᵀ over σ_i > lower·σ_max."""
    X, scale = working_copy(A)
    P, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    kept = sigma > max(options.lower, torch.finfo(sigma.dtype).eps) * sigma[:, :1]
    U = (P * kept[:, None, :]) @ Vh
    sigma = sigma.double() / scale[:, 0].double()
    return Oracle(
        U.to(options.out_dtype),
        sigma.sum(-1),
        vectors=Vh.mT,
        sigma=sigma,
        sigma_max=sigma[:, 0],
        sigma_min=sigma[:, -1],
        residual=missing_share(kept),
    )


def gram(A: Tensor, options: Options) -> Oracle:
    """U = A·S^(-1/2); in strict mode (`lower` < 1e-4) the last product is fp64 too."""
    if A.dtype == torch.float64:
        scale = inverse_scale(largest_entry(A))
    else:  # the squares of anything narrower stay within fp64
        scale = torch.ones(A.shape[0], 1, 1, dtype=torch.float64, device=A.device)
    root = inverse_sqrt(
        gram_matrix(A, scale=scale if A.dtype == torch.float64 else None), lower=options.lower
    )
    back = 1 / scale[:, 0]
    return Oracle(
        apply_rows(A, root.X * scale, precise=options.lower < STRICT, dtype=options.out_dtype),
        root.nuclear_norm * back[:, 0],
        vectors=root.vectors,
        sigma=root.sigma * back,
        sigma_max=root.sigma_max * back[:, 0],
        sigma_min=root.sigma_min * back[:, 0],
        residual=missing_share(root.kept),
    )
