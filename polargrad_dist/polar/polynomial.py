"""Odd matrix polynomials: only products, so fast in bf16 on a GPU; their schedule limits accuracy, not rounding.

Newton–Schulz (algorithm A.2 of the PolarGrad paper, and any quintic schedule such as Muon's) and Polar Express
(Amsel, Persson, Musco and Gower 2025, arXiv:2505.16932), whose coefficients are computed here for any interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..compiled import constant_result
from ..errors import PolarError
from .oracle import Options, Oracle, inner_product, inverse_scale, largest_entry, orthogonality

Coefficients = Sequence[tuple[float, float, float]]

CUBIC = (1.5, -0.5, 0.0)
MUON = (3.4445, -4.7750, 2.0315)
# The limit of the minimax quintics as their interval shrinks to the point 1.
PADE_QUINTIC = (1.875, -1.25, 0.375)
# A step with a wider interval than this stretches its small end less than it could, so that later steps can:
# the published choice, the ratio ℓ/u at which the centred quintic still has a positive minimum at its lower end.
CUSHION = 0.02407327424182761
HALF_SAFETY = 1.01
DEFAULT_STEPS = 5
# A matrix whose norm lies between this and its inverse is normalized without prior scaling, in every dtype.
LEAST_NORM = 1e-3
# The largest power of two in fp16.
FP16_SCALE = 2.0**15
# From this many elements per matrix, a CPU multiplies the matrices of a batch faster one by one.
LARGE = 1 << 16
# Block size of symmetric products on a CPU: blocks below the diagonal are copied, not multiplied.
BLOCK_COLUMNS = 256


def newton_schulz(A: Tensor, options: Options) -> Oracle:
    """A.2 with a schedule of quintics: Muon's constants by default, "cubic", or one (a, b, c) per step."""
    steps = options.steps or DEFAULT_STEPS
    match options.coefficients:
        case None | "muon":
            schedule: Coefficients = [MUON] * steps
        case "cubic":
            schedule = [CUBIC] * steps
        case str(name):
            raise PolarError(
                f"coefficients are {name!r}, expected 'muon', 'cubic' or a sequence of (a, b, c)"
            )
        case list(rows) | tuple(rows):
            if options.steps not in (None, len(rows)) or any(len(row) != 3 for row in rows):
                raise PolarError(
                    f"coefficients are {rows}, expected one (a, b, c) for each of {options.steps} steps"
                )
            schedule = rows
        case other:
            raise PolarError(
                f"coefficients are a {type(other).__name__}, expected 'muon', 'cubic' or a sequence of (a, b, c)"
            )
    return _polynomial(A, schedule, 1.0, options)


def polar_express(A: Tensor, options: Options) -> Oracle:
    """Minimax quintics for the interval [lower, 1]; half types use the safety factor 1.01."""
    half = A.dtype in (torch.bfloat16, torch.float16)
    safety = HALF_SAFETY if half else 1.0
    schedule = polar_express_coefficients(options.lower, options.steps or DEFAULT_STEPS, safety)
    return _polynomial(A, schedule, 1.0 if half else 1.001, options)


def _polynomial(A: Tensor, schedule: Coefficients, margin: float, options: Options) -> Oracle:
    X, norm = A, _frobenius(A) if may_look(options) else None
    if norm is None or not bool(((norm > LEAST_NORM) & (norm < 1 / LEAST_NORM)).all()):
        scale = inverse_scale(largest_entry(A))
        # The scale of entries below 2^-16 is beyond fp16's range; as much of it as fits is enough for the norm.
        scale = scale.clamp_max(FP16_SCALE) if A.dtype == torch.float16 else scale
        X = A * scale.to(A.dtype)
        norm = _frobenius(X)
    U = run_polynomials(X * torch.where(norm > 0, 1 / (margin * norm), 0.0).to(A.dtype), schedule)
    residual = orthogonality(U) if options.info else None
    nuclear_norm = inner_product(A, U, torch.float32)
    return Oracle(U.to(options.out_dtype), nuclear_norm, len(schedule), residual=residual)


def may_look(options: Options) -> bool:
    """Whether norms may be read: they are on the host, or the caller waits anyway; and nothing is being compiled."""
    return options.may_wait and not torch.compiler.is_compiling()


def _frobenius(A: Tensor) -> Tensor:
    """‖A‖_F (B, 1, 1) of A (B, m, n) in at least fp32, rounded up; its squares may leave the range of the dtype."""
    # Norms over two dimensions, or of a transposed view, are slow.
    flat = (A if A.is_contiguous() else A.mT).flatten(1)
    # In A's own dtype, several times faster than in a wider one; the possible rounding error is added.
    norm = torch.linalg.vector_norm(flat, dim=1).to(torch.promote_types(A.dtype, torch.float32))
    return norm[:, None, None] * (1 + torch.finfo(A.dtype).eps)


def run_polynomials(X: Tensor, schedule: Coefficients) -> Tensor:
    """X ← aX + bX(XᵀX) + cX(XᵀX)² for each (a, b, c); X (B, m, n), m ≥ n, spectral norm within the schedule's interval."""
    # torch.compile does not trace products that are written into a block of a matrix.
    blocks = X.device.type == "cpu" and not torch.compiler.is_compiling()
    if blocks and X[0].numel() >= LARGE and len(schedule):
        if len(X) == 1:
            return _run_by_blocks(X[0], schedule).unsqueeze(0)
        out = torch.empty_like(X)
        for matrix, place in zip(X, out, strict=True):
            place.copy_(_run_by_blocks(matrix, schedule))
        return out
    for a, b, c in schedule:
        S = X.mT @ X
        W = torch.baddbmm(S, S, S, beta=b, alpha=c) if c else b * S
        X = torch.baddbmm(X, X, W, beta=a)
    return X


def _run_by_blocks(X: Tensor, schedule: Coefficients) -> Tensor:
    """`run_polynomials` of one matrix; a wide one, given transposed, keeps its memory layout, which saves copies."""
    wide = X.mT.is_contiguous()
    Y = X.mT if wide else X
    # One is read while the other is written.
    spare = [torch.empty_like(Y) for _ in schedule[:2]]
    for i, (a, b, c) in enumerate(schedule):
        S = _symmetric_product(Y, Y.mT) if wide else _symmetric_product(Y.mT, Y)
        W = _symmetric_product(S, S, add=S, beta=b, alpha=c) if c else b * S
        Y = torch.addmm(Y, *((W, Y) if wide else (Y, W)), beta=a, out=spare[i % 2])
    return Y.mT if wide else Y


def _symmetric_product(
    left: Tensor, right: Tensor, *, add: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """left·right, or beta·add + alpha·left·right, known to be symmetric (n, n): blocks below the diagonal are copied."""
    n, inner = left.shape
    # In half types, dividing into blocks costs what it saves, unless the matrix is large or long.
    whole = left.element_size() < 4 and (n <= 2 * BLOCK_COLUMNS or (n <= 4 * BLOCK_COLUMNS and inner < 2 * n))
    if whole:
        return left @ right if add is None else torch.addmm(add, left, right, beta=beta, alpha=alpha)
    out = left.new_empty(n, n)
    # With beta = 0 it is not read.
    add = out if add is None else add
    for j in range(0, n, BLOCK_COLUMNS):
        end = j + BLOCK_COLUMNS
        block = out[j:end, j:]
        torch.addmm(add[j:end, j:], left[j:end], right[:, j:], beta=beta, alpha=alpha, out=block)
        out[end:, j:end] = block[:, BLOCK_COLUMNS:].mT
    return out


def minimax_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic ax + bx³ + cx⁵ closest to 1 on [low, high] in the maximum norm, by Remez exchange.

    Its error equioscillates at both ends and at its two inner extrema, which solve p'(x) = 0 and are found in closed form.
    """
    if not 0 < low <= high:
        raise ValueError(f"the interval is [{low}, {high}], expected 0 < low <= high")
    # The four points merge and the system below becomes singular.
    if low / high > 1 - 5e-6:
        a, b, c = PADE_QUINTIC
        return a / high, b / high**3, c / high**5
    inner = [low + (high - low) / 4, high - (high - low) / 4]
    error = math.inf
    for _ in range(100):
        signs = (1.0, -1.0, 1.0, -1.0)
        points = zip((low, *inner, high), signs, strict=True)
        a, b, c, level = _solve([[x, x**3, x**5, sign, 1.0] for x, sign in points])
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
        if abs(level - error) < 1e-15:
            break
        error = level
    return a, b, c


def _solve(rows: list[list[float]]) -> list[float]:
    """Solves a small linear system, each row its coefficients and right side, in plain floats: torch may be on a GPU."""
    size = len(rows)
    for k in range(size):
        pivot = max(range(k, size), key=lambda i: abs(rows[i][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for row in rows[k + 1 :]:
            factor = row[k] / rows[k][k]
            row[k:] = [x - factor * y for x, y in zip(row[k:], rows[k][k:], strict=True)]
    x = [0.0] * size
    for k in reversed(range(size)):
        known = sum(rows[k][j] * x[j] for j in range(k + 1, size))
        x[k] = (rows[k][size] - known) / rows[k][k]
    return x


# The result is constant: a compiled caller need not trace the exchange.
@constant_result
def polar_express_coefficients(
    lower: float, steps: int, safety: float = 1.0, cushion: float = CUSHION
) -> tuple[tuple[float, float, float], ...]:
    """Minimax schedule of `steps` quintics that move singular values in [lower, 1] towards 1.

    Each step is the best quintic for the interval that the previous steps leave, centred so that both of its
    ends are equally far from 1. `safety` > 1 shrinks the argument of every step except the last: in bf16 a
    singular value may be rounded to above the interval, where the polynomials grow fast.
    """
    return _composition(lower, steps, safety, cushion)


@lru_cache(maxsize=64)
def _composition(
    lower: float, steps: int, safety: float, cushion: float
) -> tuple[tuple[float, float, float], ...]:
    if not 0 < lower < 1 or steps < 1:
        raise ValueError(f"lower is {lower} and steps {steps}, expected 0 < lower < 1 and steps >= 1")
    low, high = lower, 1.0
    schedule: list[tuple[float, float, float]] = []
    for _ in range(steps):
        a, b, c = minimax_quintic(max(low, cushion * high), high)
        at_low, at_high = (x * (a + x * x * (b + x * x * c)) for x in (low, high))
        centre = 2 / (at_low + at_high)
        schedule.append((a * centre, b * centre, c * centre))
        low = at_low * centre
        high = 2 - low
    shrunk = [(a / safety, b / safety**3, c / safety**5) for a, b, c in schedule[:-1]]
    return (*shrunk, schedule[-1])
