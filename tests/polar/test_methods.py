"""The numbers behind the methods: schedules, coefficients, bounds, against published tables and independent formulas."""

import itertools

import numpy as np
import pytest
import torch

from polargrad_dist.polar import polar, polar_express_coefficients
from polargrad_dist.polar.newton import newton_scaling
from polargrad_dist.polar.polynomial import MUON, minimax_quintic
from polargrad_dist.polar.qdwh import halley_schedule, halley_weights
from polargrad_dist.polar.rational import largest_singular_value, smallest_singular_value
from polargrad_dist.polar.zolo import tangent_amplitude, zolo_schedule, zolotarev

from .spectra import gaussian, log_spaced

# Amsel, Persson, Musco and Gower 2025 (arXiv:2505.16932), the published table for ℓ = 1e-3, before its safety factor.
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]

# Table A.1 of the PolarGrad paper: iterations for each condition number, per order r = 1 … 8.
CONDITIONS = [1.001, 1.01, 1.1, 1.2, 1.5, 2, 10, 1e2, 1e3, 1e5, 1e7, 1e16]
ITERATIONS = {
    1: [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6],
    2: [1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4],
    3: [1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3],
    4: [1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3],
    5: [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3],
    6: [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3],
    7: [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3],
    8: [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2],
}


def test_polar_express_coefficients_match_the_published_table():
    np.testing.assert_allclose(polar_express_coefficients(1e-3, 5), PUBLISHED, rtol=0, atol=1e-6)


def test_the_safety_factor_shrinks_the_argument_of_all_steps_but_the_last():
    plain, safe = polar_express_coefficients(1e-3, 5), polar_express_coefficients(1e-3, 5, 1.01)
    assert safe[-1] == plain[-1]
    for (a, b, c), (sa, sb, sc) in zip(plain[:-1], safe[:-1], strict=True):
        np.testing.assert_allclose([sa * 1.01, sb * 1.01**3, sc * 1.01**5], [a, b, c], rtol=1e-14)


@pytest.mark.parametrize("interval", [(0.01, 1.0), (0.3, 1.7), (0.9, 1.1), (0.99999, 1.00001)])
def test_the_minimax_quintic_equioscillates_four_times(interval):
    a, b, c = minimax_quintic(*interval)
    x = np.linspace(*interval, 200001)
    error = a * x + b * x**3 + c * x**5 - 1
    worst = np.abs(error).max()
    peaks = error[np.abs(error) > worst * 0.999 - 1e-14]
    signs = [sign for sign, _ in itertools.groupby(peaks > 0)]
    assert len(signs) >= 4 or worst < 1e-14


@pytest.mark.parametrize(
    ("lower", "steps", "reached"), [(1e-3, 5, 0.13), (1e-3, 8, 1e-4), (1e-4, 9, 1e-2), (0.3, 3, 1e-4)]
)
def test_a_schedule_takes_its_whole_interval_to_one(lower, steps, reached):
    x = np.geomspace(lower, 1, 100001)
    for a, b, c in polar_express_coefficients(lower, steps):
        x = a * x + b * x**3 + c * x**5
    assert np.abs(x - 1).max() < reached


def test_halley_weights_are_halleys_at_one_and_best_on_the_interval():
    np.testing.assert_allclose(halley_weights(1.0), (3, 1, 3))
    for low in (1e-16, 1e-8, 1e-3, 0.3):
        a, b, c = halley_weights(low)
        x = np.geomspace(low, 1, 100001)
        y = x * (a + b * x**2) / (1 + c * x**2)
        assert y.max() <= 1 + 1e-12
        # The worst point is the lower end: nothing between falls below it
        assert abs(y.min() - y[0]) <= 1e-12


def test_no_method_takes_more_steps_than_table_a1_allows():
    for k, condition in enumerate(CONDITIONS):
        assert len(halley_schedule(1 / condition, 1e-15)) <= ITERATIONS[1][k]
        schedule = zolo_schedule(1 / condition, 1e-15)
        order = len(schedule[0][0])
        assert len(schedule) <= ITERATIONS[order][k]
        # Byers and Xu
        assert len(newton_scaling(1 / condition, 1e-15)) <= 9


@pytest.mark.parametrize(("condition", "qdwh", "zolo"), [(1.5, 3, 1), (1e2, 5, 2), (1e14, 6, 2)])
def test_estimated_bounds_cost_at_most_one_step(condition, qdwh, zolo):
    a = log_spaced(150, 100, condition)
    assert polar(a, method="qdwh", lower=0, info=True).info.steps <= qdwh
    assert polar(a, method="zolo", lower=0, info=True).info.steps <= zolo + (condition < 2)


@pytest.mark.parametrize("low", [1e-16, 1e-8, 1e-3, 0.5])
@pytest.mark.parametrize("order", [1, 3, 8])
def test_the_zolotarev_function_stays_within_its_bounds_and_touches_them(order, low):
    poles, residues, factor, at_low = zolotarev(order, low)
    x = np.geomspace(low, 1, 200001)
    y = factor * x * (1 + sum(a / (x**2 + c) for a, c in zip(residues, poles, strict=True)))
    # Of the sum above, not of the coefficients
    slack = 1e-9 if low < 1e-12 else 1e-12
    assert y.max() <= 1 + slack
    assert y.min() >= at_low - slack
    middle = (1 + at_low) / 2
    crossings = np.count_nonzero(np.diff(np.sign(y - middle)))
    assert crossings == 2 * order + 1 or 1 - at_low < 1e-12


@pytest.mark.parametrize("complementary", [0.9, 0.3, 1e-2])
def test_tangent_amplitude_agrees_with_scipy(complementary):
    special = pytest.importorskip("scipy.special")
    for fraction in (0.05, 0.4, 0.5, 0.9):
        sn, cn, _, _ = special.ellipj(fraction * special.ellipkm1(complementary**2), 1 - complementary**2)
        assert abs(tangent_amplitude(fraction, complementary) / (sn / cn) - 1) < 1e-11


@pytest.mark.parametrize("complementary", [1e-4, 1e-10, 1e-16])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.45])
def test_tangent_amplitude_keeps_its_digits_where_the_modulus_rounds_to_one(complementary, fraction):
    product = tangent_amplitude(fraction, complementary) * tangent_amplitude(1 - fraction, complementary)
    # sc(K - u) = 1/(k'·sc(u))
    assert abs(product * complementary - 1) < 1e-12
    assert abs(tangent_amplitude(0.5, complementary) * complementary**0.5 - 1) < 1e-13


def test_a_schedule_of_quintics_is_run_as_given():
    a = gaussian(64, 32)
    sigma, norm = torch.linalg.svdvals(a), a.norm()
    schedule = [MUON, (1.875, -1.25, 0.375), (1.5, -0.5, 0.0)]
    x = sigma / norm
    for p, q, r in schedule:
        x = p * x + q * x**3 + r * x**5
    found = polar(a, method="newton_schulz", coefficients=schedule)
    torch.testing.assert_close(
        torch.linalg.svdvals(found.U).sort().values, x.sort().values, rtol=0, atol=1e-12
    )


def test_the_bounds_enclose_the_spectrum():
    for condition in (2, 1e3, 1e8):
        a = torch.stack([log_spaced(80, 80, condition, seed) for seed in range(6)])
        R = torch.linalg.qr(a, mode="r").R
        high, low = largest_singular_value(a), smallest_singular_value(R)
        assert (high >= 1 - 1e-3).all()
        assert (high <= 1.11).all()
        assert (low <= 1.001 / condition).all()
        assert (low >= 0.3 / condition).all()
