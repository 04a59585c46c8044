"""What a method costs on a matrix, by device, to choose one and to balance matrices over ranks: only ratios matter.

CPU: flops of an fp32 product, fitted to timings of `python -m benchmarks.polar` within about a third. GPU: the same unit
on a data-centre card, from published rates and the structure of the algorithms, **not measured**: fp64 products run at the
speed of fp32 ones, factorizations at a small fraction of it, and every kernel launch costs as much as a small product.
`make bench-gpu` measures the times that these numbers estimate.
"""

from __future__ import annotations

import torch

from ..errors import PolarError
from .gram import fast_fp64
from .oracle import GPU_CHUNK_ELEMENTS
from .root import PROBES, root_schedule
from .spectral import STRICT

METHODS = ("svd", "gram", "qdwh", "zolo", "newton", "newton_schulz", "polar_express")
# A launch takes 5 µs; in that time a GPU does this many flops of an fp32 product, at about 40 TFLOP/s.
LAUNCH = 2e8
# Cost of the polynomials' half-precision products relative to fp32.
HALF_SPEED = 10.0
# An n×n factorization in units of n³ product flops; during its panels a GPU is mostly idle.
GPU_QR, GPU_CHOLESKY, GPU_SVD = 30.0, 8.0, 1200.0


def choose_method(shape: tuple[int, ...], device: torch.device | str = "cpu", *, lower: float = 1e-4) -> str:
    """What `auto` runs on an m×n matrix: "svd" or "gram" (or "qdwh" on a GPU without fast fp64).

    CPU: measured by `python -m benchmarks.polar`; svd wins on nearly square matrices in default mode, gram elsewhere.
    GPU: derived, not measured: there gram consists of matrix products only.
    """
    m, n = max(shape[-2:]), min(shape[-2:])
    device = torch.device(device)
    if device.type == "cpu":
        return "svd" if lower >= STRICT and m < 2 * n else "gram"
    return "gram" if fast_fp64(device) or lower < STRICT else "qdwh"


def cost(
    shape: tuple[int, ...], method: str = "auto", steps: int | None = None, *, device_type: str = "cpu"
) -> float:
    """Work of one call on an m×n matrix, in flops of an fp32 product on that device.

    Args:
        shape: (…, m, n); leading dimensions do not count.
        method: as for `polar`; on a GPU "auto" is gram.
        steps: for qdwh and the polynomials.
        device_type: "cpu" or a GPU's. Costs on different devices are not comparable.

    Raises:
        PolarError: an unknown method.
    """
    m, n = max(shape[-2:]), min(shape[-2:])
    if method != "auto" and method not in METHODS:
        raise PolarError(f"method is {method!r}, expected auto or one of: {', '.join(METHODS)}")
    if n == 0:
        return 0.0
    if device_type != "cpu":
        return _gpu_cost(m, n, "gram" if method == "auto" else method, steps)
    return _cpu_cost(m, n, choose_method((m, n)) if method == "auto" else method, steps)


def root_cost(n: int, method: str = "gram", steps: int | None = None, *, device_type: str = "cpu") -> float:
    """Work at the owner of a matrix sharded by rows, in the unit of `cost`: the root of its n×n Gram matrix.

    method "gram" (or "auto") is `inverse_sqrt`, "qdwh" with its steps `gram_qdwh`.
    """
    square = 2.0 * n**3
    if method == "qdwh":
        factorized = (steps or 2) * (GPU_CHOLESKY * n**3 if device_type != "cpu" else 2 * square)
        return factorized + ((steps or 2) * 4 + 3) * square * (1 if device_type != "cpu" else 2)
    if device_type == "cpu":
        return 12 * square
    products = 4 * len(root_schedule(STRICT)) - 2
    return products * square + (3 * products + 2 * PROBES) * LAUNCH


def _cpu_cost(m: int, n: int, method: str, steps: int | None) -> float:
    """fp64 flops count double; factorizations count by their measured speed."""
    product, square = 2.0 * m * n * n, 2.0 * n**3
    tall_qr = 3 * product if m > n + n // 8 else 0.0
    match method:
        case "svd":
            return 15 * square + 4 * (product - square) + product
        case "gram":
            return 2.2 * product + 12 * square
        case "qdwh":
            return tall_qr + (6 * (steps or 5)) * square
        case "zolo":
            return tall_qr + 40 * square
        case "newton":
            return tall_qr + 30 * square
        case _:
            return (steps or 5) * (2 * product + square)


def _gpu_cost(m: int, n: int, method: str, steps: int | None) -> float:
    product, square, cube = 2.0 * m * n * n, 2.0 * n**3, float(n**3)
    tall_qr = product + GPU_QR * cube if m > n else 0.0
    match method:
        case "svd":
            return product + GPU_SVD * cube
        case "gram":
            chunks = -(-m * n // GPU_CHUNK_ELEMENTS)
            return 2 * product + root_cost(n, device_type="cuda") + 8 * chunks * LAUNCH
        case "qdwh":
            return tall_qr + (steps or 5) * (GPU_QR * cube + 3 * square) + 60 * LAUNCH
        case "zolo":
            return tall_qr + 8 * GPU_QR * cube + 8 * GPU_CHOLESKY * cube + 60 * LAUNCH
        case "newton":
            return tall_qr + 9 * GPU_CHOLESKY * cube + 60 * LAUNCH
        case _:
            return (steps or 5) * ((2 * product + square) / HALF_SPEED + 3 * LAUNCH)
