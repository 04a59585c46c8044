"""Inputs at the edge of what a matrix can be: empty, zero, thin, huge, tiny, orthogonal, not finite."""

import pytest
import torch

from polargrad_dist.errors import PolarError
from polargrad_dist.polar import polar

from .spectra import direction_error, exact, gaussian

METHODS = ["auto", "svd", "gram", "qdwh", "zolo", "newton", "newton_schulz", "polar_express"]
EXACT_METHODS = METHODS[:6]


@pytest.mark.parametrize("method", METHODS)
def test_zero_gives_zero(method):
    found = polar(torch.zeros(3, 20, 8), method=method, hermitian=True, info=True)
    assert found.U.count_nonzero() == 0
    assert found.H.count_nonzero() == 0
    assert found.nuclear_norm.count_nonzero() == 0


@pytest.mark.parametrize("method", EXACT_METHODS)
def test_zero_rows_and_columns_stay_zero(method):
    a = gaussian(60, 24).float()
    a[10:20], a[:, 5] = 0, 0
    found = polar(a, method=method)
    assert found.U[10:20].abs().max() <= (0 if method in ("auto", "gram") else 1e-7)
    assert found.U[:, 5].abs().max() <= 1e-6
    assert direction_error(found.U, exact(a, cut=1e-6)) <= 1e-5


@pytest.mark.parametrize("method", EXACT_METHODS)
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 1, 5)])
def test_a_vector_is_normalised(method, shape):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    norm = torch.linalg.vector_norm(a, dim=(-2, -1))
    found = polar(a, method=method)
    torch.testing.assert_close(found.U, a / norm[..., None, None], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.nuclear_norm, norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 8, 4), (3, 0, 4), (3, 4, 0), (0, 0)])
def test_nothing_in_nothing_out(method, shape):
    found = polar(torch.empty(shape), method=method, hermitian=True, info=True)
    assert found.U.shape == shape
    assert found.H.shape == (*shape[:-2], shape[-1], shape[-1])
    assert found.nuclear_norm.shape == shape[:-2]
    assert found.nuclear_norm.count_nonzero() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e30, 1e-30, 1e-37])
def test_the_scale_of_an_fp32_matrix_does_not_matter(method, size):
    a = gaussian(64, 24).float()
    U = polar(a, method=method).U
    scaled = polar(a * size, method=method, info=True)
    assert (scaled.U - U).norm() <= (2e-5 if method in EXACT_METHODS else 1e-3)
    nuclear = exact(a * size).sigma.sum()
    tolerance = 1e-5 if method in EXACT_METHODS else 0.3
    assert abs(scaled.nuclear_norm.double() / nuclear - 1) <= tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("check", [True, False])
def test_small_fp16_entries_are_used(method, check):
    a = torch.stack([gaussian(64, 24), 1e-6 * gaussian(64, 24)]).half()
    # By a power of two: no bit is lost.
    scale = torch.tensor([1.0, 2.0**16])
    expected = polar((a.float() * scale[:, None, None]).half(), method=method, lower=1e-3)
    found = polar(a, method=method, check=check, lower=1e-3)
    assert (found.U - expected.U).norm() <= 0.01
    torch.testing.assert_close(found.nuclear_norm * scale, expected.nuclear_norm, rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", EXACT_METHODS)
@pytest.mark.parametrize("shape", [(200, 24), (24, 24)])
def test_denormal_fp32_entries_are_used(method, shape):
    # Five digits survive
    a = gaussian(*shape).float() * 1e-40
    found = polar(a, method=method, lower=1e-3)
    assert found.U.isfinite().all()
    assert direction_error(found.U, exact(a)) <= 1e-5
    torch.testing.assert_close(found.nuclear_norm.double(), exact(a).sigma.sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", EXACT_METHODS)
@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_the_scale_of_an_fp64_matrix_does_not_matter(method, size):
    a = gaussian(64, 24)
    found = polar(a * size, method=method)
    assert direction_error(found.U, exact(a)) <= 1e-12
    torch.testing.assert_close(found.nuclear_norm / size, exact(a).sigma.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", EXACT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_orthogonal_matrix_comes_back_unchanged(method, dtype):
    q = torch.linalg.qr(gaussian(64, 64))[0].to(dtype)
    found = polar(q, method=method, hermitian=True)
    eps = torch.finfo(dtype).eps
    assert (found.U - q).abs().max() <= 16 * eps
    assert (found.H - torch.eye(64, dtype=dtype)).abs().max() <= 32 * eps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_in_and_out(method, dtype):
    a = gaussian(40, 16).to(dtype)
    found = polar(a, method=method, out_dtype=torch.float32, lower=1e-3)
    assert found.U.dtype == torch.float32
    assert found.nuclear_norm.dtype == torch.promote_types(dtype, torch.float32)
    assert polar(a, method=method, lower=1e-3).U.dtype == dtype
    if method in EXACT_METHODS:
        assert direction_error(found.U, exact(a)) <= 1e-6


def test_non_finite_matrices_are_named():
    a = torch.randn(2, 3, 8, 4)
    a[0, 1, 0, 0], a[1, 2, 7, 3] = float("nan"), float("-inf")
    with pytest.raises(PolarError, match=r"2 of 6 .*\(0, 1\), \(1, 2\)"):
        polar(a)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_matrices_pass_through_alone_when_asked(method, bad):
    a = torch.randn(2, 3, 8, 4)
    a[1, 2, 0, 0] = bad
    found = polar(a, method=method, check=False)
    assert found.U[1, 2].isnan().all()
    assert found.nuclear_norm[1, 2].isnan()
    finite = torch.ones(2, 3, dtype=torch.bool)
    finite[1, 2] = False
    assert found.U[finite].isfinite().all()
    torch.testing.assert_close(found.U[0], polar(a[0], method=method).U, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qr"}, "expected auto"),
        ({"method": "svd", "steps": 3}, "steps is 3"),
        ({"method": "qdwh", "steps": 0}, "steps is 0"),
        ({"lower": 1.0}, "lower is 1.0"),
        ({"method": "polar_express", "lower": 0}, "lower > 0"),
        ({"method": "newton_schulz", "coefficients": "nope"}, "nope"),
        (
            {"method": "newton_schulz", "coefficients": torch.ones(2, 3)},
            "coefficients are a Tensor, expected 'muon'",
        ),
        ({"method": "newton_schulz", "coefficients": [(1, 2, 3)], "steps": 2}, "2 steps"),
        ({"method": "gram", "coefficients": "cubic"}, "newton_schulz"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(options, message):
    with pytest.raises(PolarError, match=message):
        polar(torch.randn(4, 3), **options)


def test_integers_and_vectors_are_refused():
    for a in (torch.ones(4, 4, dtype=torch.int64), torch.ones(4), torch.ones(2, 2, dtype=torch.complex64)):
        with pytest.raises(PolarError, match="real floating"):
            polar(a)


@pytest.mark.parametrize("rows", [10, 100])
def test_a_row_sparse_matrix_with_nan_passes_through_when_asked(rows):
    a = torch.zeros(400, 8)
    a[:rows] = torch.randn(rows, 8)
    a[3, 3] = float("nan")
    found = polar(a, check=False)
    assert found.U.isnan().all()
    assert found.nuclear_norm.isnan()
