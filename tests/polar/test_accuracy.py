"""How far each method is from the fp64 SVD, on spectra a gradient may have."""

import pytest
import torch

from polargrad_dist.polar import polar

from .spectra import direction_error, exact, families, gaussian, log_spaced, orthogonality_error

TALL = families(1024, 256)
SQUARE = families(160, 160)
EXACT_METHODS = ["svd", "gram", "qdwh", "zolo", "newton"]


@pytest.mark.parametrize("method", ["auto", "gram"])
@pytest.mark.parametrize("shape", [(4096, 256), (1024, 256), (384, 256)])
def test_gaussian_fp32_is_right_to_1e_7(method, shape):
    a = gaussian(*shape).float()
    U = polar(a, method=method).U
    tolerance = 1e-7 if shape[0] >= 2 * shape[1] or method == "gram" else 5e-6
    assert orthogonality_error(U) <= tolerance
    assert direction_error(U, exact(a)) <= tolerance


@pytest.mark.parametrize("method", EXACT_METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_matrices_with_the_vector_of_ones_as_a_singular_vector_are_no_exception(method, dtype, tolerance):
    # A Gram matrix squares the condition number.
    tolerance = max(tolerance, 1e-9) if method == "gram" else tolerance
    for n in (2, 3, 16, 64):
        for s in (0.01, 0.1, 0.5, 1.5, 10.0, 100.0):
            a = torch.eye(n, dtype=dtype) - torch.full((n, n), (1 - s) / n, dtype=dtype)
            found = polar(a, method=method, info=True)
            assert (torch.linalg.svdvals(found.U.double()) - 1).abs().max() <= tolerance, (n, s)
            assert 0.9 * max(1, s) <= found.info.sigma_max <= 1.11 * max(1, s), (n, s)


@pytest.mark.parametrize("method", ["svd", "gram", "qdwh", "zolo"])
@pytest.mark.parametrize("lower", [0.3, 0.5, 0.6])
def test_directions_above_a_large_lower_are_kept_whole(method, lower):
    U = polar(torch.diag(torch.tensor([1.0, 0.95, 0.618, 0.618])), method=method, lower=lower).U
    assert (torch.linalg.svdvals(U) - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("method", EXACT_METHODS)
def test_autocast_around_it_changes_nothing(method):
    a = gaussian(200, 100).float()
    expected = polar(a, method=method, hermitian=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = polar(a, method=method, hermitian=True)
    assert torch.equal(found.U, expected.U)
    assert torch.equal(found.H, expected.H)


@pytest.mark.parametrize("method", ["auto", "gram"])
@pytest.mark.parametrize("shape", [(1024, 256), (256, 256), (256, 1024)])
@pytest.mark.parametrize(("condition", "tolerance"), [(1e2, 1e-7), (1e4, 1e-6), (1e6, 6e-3)])
def test_strict_mode_resolves_ill_conditioned_fp32_matrices(method, shape, condition, tolerance):
    a = log_spaced(max(shape), min(shape), condition).float()
    a = a if shape[0] >= shape[1] else a.mT
    assert direction_error(polar(a, method=method, lower=1e-7).U, exact(a)) <= tolerance


@pytest.mark.parametrize("lower", [1e-4, 1e-7])
@pytest.mark.parametrize("method", ["auto", "gram", "svd"])
@pytest.mark.parametrize("family", TALL)
def test_nuclear_norm_is_right_to_1e_7_whatever_the_spectrum(family, method, lower):
    for a in (TALL[family], SQUARE[family]):
        nuclear = exact(a).sigma.sum()
        assert abs(polar(a, method=method, lower=lower).nuclear_norm.double() / nuclear - 1) <= 1e-7


@pytest.mark.parametrize("method", ["auto", *EXACT_METHODS])
@pytest.mark.parametrize("family", TALL)
def test_default_mode_turns_what_matters_and_leaves_out_the_null_directions(family, method):
    for a in (TALL[family], SQUARE[family]):
        U, V, sigma = exact(a)
        found = polar(a, method=method).U.double()
        matters = sigma >= 1e-3 * sigma[0]
        error = ((found - U) @ V[:, matters]).norm(dim=0)
        assert error.max() <= 1e-3
        gains = (found @ V).norm(dim=0)
        assert (gains[sigma <= 3e-7 * sigma[0]] <= 1e-2).all()
        assert gains.max() <= 1 + 1e-4


@pytest.mark.parametrize("method", EXACT_METHODS)
def test_a_rank_deficient_matrix_gives_the_partial_isometry(method):
    a = TALL["rank n/4"]
    reference = exact(a, cut=1e-5)
    found = polar(a, method=method).U.double()
    null = reference.V[:, reference.sigma <= 1e-5 * reference.sigma[0]]
    assert null.shape[1] == 192
    assert (found @ null).norm(dim=0).max() <= 1e-2
    assert ((found - reference.U) @ reference.V[:, :64]).norm(dim=0).max() <= (
        1e-5 if method in ("svd", "gram") else 2e-4
    )


@pytest.mark.parametrize("method", ["qdwh", "zolo"])
@pytest.mark.parametrize("condition", [1.5, 1e2, 1e8, 1e12, 1e14])
@pytest.mark.parametrize("m", [96, 200])
def test_qdwh_and_zolo_are_backward_stable_in_fp64(method, condition, m):
    a = log_spaced(m, 96, condition)
    found = polar(a, method=method, lower=0, hermitian=True)
    assert (a - found.U @ found.H).norm() / a.norm() <= 1e-14
    assert orthogonality_error(found.U) <= 1e-14
    assert torch.linalg.eigvalsh(found.H).min() > -1e-15


@pytest.mark.parametrize("condition", [1.5, 1e2, 1e8, 1e12])
def test_newton_is_backward_stable_in_fp64(condition):
    a = log_spaced(120, 96, condition)
    found = polar(a, method="newton", lower=0, hermitian=True)
    assert (a - found.U @ found.H).norm() / a.norm() <= 1e-13
    assert orthogonality_error(found.U) <= 1e-13


def test_polar_express_reaches_the_accuracy_its_schedule_promises():
    a = log_spaced(512, 128, 1e2).float()
    errors = [
        direction_error(polar(a, method="polar_express", steps=k, lower=1e-3).U, exact(a)) for k in (5, 8)
    ]
    assert 1e-3 < errors[0] < 0.1
    assert errors[1] < 1e-4


def test_the_cubic_newton_schulz_converges_and_muons_quintic_stays_biased():
    a = gaussian(512, 128).float()
    reference = exact(a)
    cubic = polar(a, method="newton_schulz", coefficients="cubic", steps=14)
    assert direction_error(cubic.U, reference) < 1e-6
    muon = polar(a, method="newton_schulz")
    gains = torch.linalg.svdvals(muon.U.double())
    assert 0.6 < gains.min() < 0.8
    assert 1.1 < gains.max() < 1.3
    # The sum that scales a step is low by percents
    assert muon.nuclear_norm / reference.sigma.sum() < 0.99
    assert abs(cubic.nuclear_norm / reference.sigma.sum() - 1) < 1e-6


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
def test_bf16_polynomials_stay_bounded(method):
    a = log_spaced(512, 128, 1e3).bfloat16()
    found = polar(a, method=method, steps=6, lower=1e-3)
    assert found.U.dtype == torch.bfloat16
    assert found.nuclear_norm.dtype == torch.float32
    assert torch.linalg.svdvals(found.U.double()).max() < 1.3


@pytest.mark.parametrize(("condition", "reached"), [(1e2, 0.04), (1e3, 0.2)])
def test_polar_express_in_bf16_halves_the_error_of_muons_quintic(condition, reached):
    a = log_spaced(512, 128, condition).bfloat16()
    reference = exact(a)
    error = direction_error(polar(a, method="polar_express", steps=6, lower=1e-3).U, reference)
    # bf16 itself ends there: two more steps gain nothing
    assert error <= reached
    assert error <= 0.5 * direction_error(polar(a, method="newton_schulz").U, reference)
