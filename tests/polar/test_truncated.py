"""QDWH cut off after a few steps, as the paper's authors run it, on the matrix and on its Gram matrix."""

import math

import pytest
import torch

from experiments.problems import Quadratic
from polargrad_dist.errors import PolarError
from polargrad_dist.polar import apply_rows, gram_matrix, gram_qdwh, norm_bound, norm_parts, polar
from polargrad_dist.polar.qdwh import halley_weights

from .spectra import exact, gaussian, log_spaced
from .test_root import CASES, WAITS, OpCount

FULL_RANK = [
    "gaussian",
    "condition 1e2",
    "1/i spectrum",
    "column graded",
    "zero rows",
    "Zipf rows",
    "bf16 rounded",
]
DEFICIENT = ["rank n/4", "fewer rows than columns", "n/2 non-zero rows"]


def by_hand(sigma: torch.Tensor, alpha: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """What the operator makes of singular values, one by one."""
    x, low = sigma / alpha, torch.finfo(dtype).eps
    for _ in range(steps):
        a, b, c = halley_weights(low)
        x = x * (a + b * x**2) / (1 + c * x**2)
        low = low * (a + b * low**2) / (1 + c * low**2)
    return 1.5 * x - 0.5 * x**3


def on_gram(a: torch.Tensor, steps: int, parts: int = 1):
    """(U, what `gram_qdwh` says) of a matrix cut by rows into parts."""
    pieces = a.tensor_split(parts)
    columns, rows = zip(*(norm_parts(piece) for piece in pieces), strict=True)
    alpha = norm_bound(torch.stack(columns).sum(0), torch.stack(rows).amax(0))
    found = gram_qdwh(sum(gram_matrix(piece) for piece in pieces), alpha, steps)
    return torch.cat([apply_rows(piece, found.X, precise=True) for piece in pieces]), found


@pytest.mark.parametrize("shape", [(200, 100), (100, 100), (60, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_run_the_authors_operator(steps, dtype, shape):
    a = gaussian(*shape).to(dtype)
    norms = [torch.linalg.matrix_norm(a.double(), p) for p in (1, math.inf)]
    alpha = (norms[0] * norms[1]).sqrt()
    sigma = torch.linalg.svdvals(a.double())
    expected = by_hand(sigma, alpha, steps, dtype)
    found = polar(a, method="qdwh", steps=steps)
    gains = torch.linalg.svdvals(found.U.double())
    torch.testing.assert_close(gains.sort().values, expected.sort().values, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.nuclear_norm.double(), (sigma * expected).sum(), rtol=1e-5, atol=0)


def test_two_steps_on_the_quadratics_first_gradient_do_what_the_authors_do():
    problem = Quadratic(0)
    problem.gradients()
    found = polar(problem.X.grad, method="qdwh", steps=2)
    gains = torch.linalg.svdvals(found.U.double())
    # Theirs, on their draw: 0.735
    assert gains.min() == pytest.approx(0.744, abs=2e-3)
    assert gains.max() == pytest.approx(1, abs=1e-3)
    nuclear = torch.linalg.svdvals(problem.X.grad.double()).sum()
    # Theirs: 0.882
    assert float(found.nuclear_norm / nuclear) == pytest.approx(0.890, abs=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("case", FULL_RANK)
def test_the_gram_form_equals_it_on_full_rank(case, steps):
    a = CASES[case]
    U, found = on_gram(a, steps, parts=3)
    whole = polar(a, method="qdwh", steps=steps)
    assert (U - whole.U).norm() / math.sqrt(a.shape[1]) <= 1e-5
    assert abs(found.nuclear_norm / whole.nuclear_norm.double() - 1) <= 1e-6
    gains = torch.linalg.svdvals(U.double())
    residual = (gains.square() - 1).square().mean().sqrt()
    torch.testing.assert_close(found.residual, residual, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("condition", [1e3, 1e4])
def test_the_gram_form_is_nearer_to_the_exact_operator_than_the_fp32_qr_form(condition):
    a = log_spaced(600, 100, condition).float()
    P, sigma, Vh = torch.linalg.svd(a.double(), full_matrices=False)
    gains = by_hand(sigma, norm_bound(*norm_parts(a)), 2, torch.float32)
    best = (P * gains) @ Vh
    U, _ = on_gram(a, 2)
    error = float((U - best).norm()) / 10
    assert error <= 3e-7 * max(1, condition / 1e3) ** 2
    assert error < float((polar(a, method="qdwh", steps=2).U - best).norm()) / 10


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("case", DEFICIENT)
def test_null_directions_are_damped_and_no_gain_exceeds_one(case, steps):
    a = CASES[case]
    reference = exact(a)
    U, _ = on_gram(a, steps)
    null = reference.sigma <= 3e-7 * reference.sigma[0]
    assert null.sum() >= 100
    assert torch.linalg.svdvals(U.double()).max() <= 1 + 1e-6
    assert (U.double() @ reference.V[:, null]).norm(dim=0).max() <= 0.02
    kept = reference.V[:, reference.sigma > 1e-5 * reference.sigma[0]]
    whole = polar(a, method="qdwh", steps=steps).U
    assert ((U - whole).double() @ kept).norm() / 16 <= 1e-5


def test_zero_gives_zeros_nan_stays_alone_and_nothing_is_read_back():
    a = torch.stack([gaussian(60, 24).float(), torch.zeros(60, 24), gaussian(60, 24, 1).float()])
    a[2, 0, 0] = float("nan")
    with OpCount() as ops:
        found = gram_qdwh(gram_matrix(a), norm_bound(*norm_parts(a)), 2)
    assert not set(WAITS) & set(ops.counts)
    assert found.X[1].count_nonzero() == 0
    assert float(found.nuclear_norm[1]) == 0
    assert found.X[2].isnan().all()
    alone = gram_qdwh(gram_matrix(a[0]), norm_bound(*norm_parts(a[0])), 2)
    torch.testing.assert_close(found.X[0], alone.X)
    sigma = exact(a[0]).sigma
    assert 0.9 * sigma[0] <= found.sigma_max[0] <= sigma[0] * (1 + 1e-9)
    assert sigma[-1] * (1 - 1e-6) <= found.sigma_min[0] <= 2 * sigma[-1]


def test_a_rank_without_rows_has_its_part_in_the_norms():
    columns, largest = norm_parts(torch.empty(2, 0, 5))
    assert columns.shape == (2, 5)
    assert largest.tolist() == [0, 0]


def test_fp64_is_refused_on_the_gram_matrix():
    with pytest.raises(PolarError, match="half its digits"):
        gram_qdwh(gram_matrix(gaussian(9, 4)), torch.ones(()), 2, dtype=torch.float64)
