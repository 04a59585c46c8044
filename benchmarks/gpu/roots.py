"""Section 4: cost of a Gram matrix's root by eigendecomposition, products, truncated QDWH and SVD; DGEMM's rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.measure import Line, Setting, fp64_peak, seconds
from polargrad_dist.polar import gram_matrix, gram_qdwh, inverse_sqrt, norm_bound, norm_parts

SECTION = "roots"
GOAL_SIZES, SMALL_SIZES = (768, 1024), (32, 48)
SPEEDUP = 8.0
# From this size on, one round of each and no batch of nine.
LARGE = 1536


def run(setting: Setting) -> list[Line]:
    """Seconds of each root at each size and batch, and the speedup of products over eigh."""
    lines = []
    for n in sizes(setting):
        lines.append(dgemm(n, setting))
        for batch in batches(n, setting):
            lines += at_size(n, batch, setting)
    return lines


def sizes(setting: Setting) -> tuple[int, ...]:
    return SMALL_SIZES if setting.reduced else (*GOAL_SIZES, LARGE, 4096)


def batches(n: int, setting: Setting) -> tuple[int, ...]:
    """The batch sizes for matrices of a size."""
    if setting.reduced:
        return 1, 5
    return (1, 5, 9) if n < LARGE else (1, 5) if n < 4096 else (1,)


def dgemm(n: int, setting: Setting) -> Line:
    """The rate of an fp64 product of n×n matrices."""
    a = torch.randn(n, n, dtype=torch.float64, device=setting.device)
    rate = 2.0 * n**3 / seconds(lambda: a @ a, setting, rounds=10)
    best = fp64_peak(setting.device)
    goal = (
        {}
        if best is None
        else setting.goal("> 50 % of the published rate from n = 1024 on", rate > 0.5 * best or n < 1024)
    )
    return Line(SECTION, f"{n}", "fp64 product", rate / 1e12, "TFLOP/s", **goal)


def at_size(n: int, batch: int, setting: Setting) -> list[Line]:
    A = torch.randn(batch, 2 * n, n, device=setting.device)
    S, alpha = gram_matrix(A), norm_bound(*norm_parts(A))
    A32 = A[:, :n].contiguous()
    methods: dict[str, Callable[[], Any]] = {
        "eigh": lambda: inverse_sqrt(S, root="eigh"),
        "products": lambda: inverse_sqrt(S, root="products"),
        "truncated QDWH on S": lambda: gram_qdwh(S, alpha, 2),
        "fp32 SVD of A": lambda: torch.linalg.svd(A32, full_matrices=False),
    }
    if n >= 4096:
        # It would take minutes.
        del methods["fp32 SVD of A"]
    rounds = 5 if n < LARGE else 1
    times = {name: seconds(call, setting, rounds, warm=1) for name, call in methods.items()}
    case = f"{batch} x {n}"
    lines = [Line(SECTION, case, name, 1e3 * time, "ms") for name, time in times.items()]
    faster = times["eigh"] / times["products"]
    goal = setting.goal(f">= {SPEEDUP:g}", faster >= SPEEDUP) if n in GOAL_SIZES else {}
    return [*lines, Line(SECTION, case, "products faster than eigh", faster, "times", **goal)]
