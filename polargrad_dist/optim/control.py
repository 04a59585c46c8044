"""How long a step is if that depends on norms of weights or on other matrices, as functions of sums over matrices.

"The benchmark" is the one that `matrix` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def lengths(group: Mapping[str, Any], sums: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of each matrix's step, and then of its new weights: (grow, shrink), fp64 (matrices,).

    ``sums`` (matrices, 3) are |W|^2, <W, S> and |S|^2 of weights and steps, ``shared`` (0-d) the role's sum_k s_k |M_k|_nuc.

    - scale "nuclear_shared": S shared^alpha. Here, on hidden matrices of a small model, 3.94 nats became 3.69.
    - floor f: |S| is at least lr f |W|. The benchmark: NorMuon without decay, f = 0.35, lr 0.0375, 3,250 (3.2771, n = 8).
    - control "hyperball": W <- |W| normalize(W + lr |W| S/|S|), so that |W| keeps its initial value (Wen 2026). The
      benchmark: Muon 3,250 (3.2786, n = 10) with lr 0.018, linear to zero over the whole run.
    """
    weight, step = sums[:, 0].sqrt(), sums[:, 2].sqrt()
    grow = torch.ones_like(step)
    if group["scale"] == "nuclear_shared":
        grow = grow * shared ** group["alpha"]
    if group["floor"]:
        target = group["floor"] * group["lr"] * weight
        grow = torch.where((step > 0) & (grow * step < target), target / step, grow)
    if group["control"] != "hyperball":
        return grow, torch.ones_like(grow)
    grow = torch.where(step > 0, group["lr"] * weight / step, grow)
    after = (sums[:, 0] + 2 * grow * sums[:, 1] + grow.square() * sums[:, 2]).sqrt()
    return grow, torch.where(after > 0, weight / after, 1.0)


def per_matrix(x: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Sums of x (items, slices, rows, columns) over this rank's part of each of ``count`` matrices, fp64.

    ``index``, broadcast against x, says which matrix each element belongs to; None for one matrix per item.
    """
    if index is None:
        return x.sum((1, 2, 3), dtype=torch.float64)
    across = [dim for dim in (2, 3) if index.shape[dim] == 1]
    part = (x.sum(across, keepdim=True, dtype=torch.float64) if across else x.double()).reshape(-1)
    which = torch.arange(max(1, count), device=x.device)
    # A product, not index_add: index_add on a GPU adds in any order, and a run must resume bit for bit.
    return (index.to(x.device).reshape(1, -1) == which[:, None]).double() @ part
