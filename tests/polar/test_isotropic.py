"""The isotropic curvature model (slides) for growth other than quartic, by a numerical minimizer over spectra.

min over Q of −⟨G, Q⟩ + E H(‖Qu‖), u uniform on the circle: Q shares G's singular vectors, so for two singular values it is
a problem in two numbers, convex, whose expectation is an integral over one angle.
"""

from collections.abc import Callable

import pytest
import torch

SIGMA = torch.tensor([1.0, 0.6], dtype=torch.float64)
ANGLES = (torch.arange(256, dtype=torch.float64) + 0.5) * torch.pi / 512
COS2, SIN2 = ANGLES.cos().square(), ANGLES.sin().square()


def best_spectrum(H: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The minimizing singular values (2,), by a grid that closes in on its best point."""
    centre, half = torch.full((2,), 4.0, dtype=torch.float64), 4.0
    for _ in range(40):
        axis = torch.linspace(-half, half, 17, dtype=torch.float64)
        grid = (centre + torch.cartesian_prod(axis, axis)).clamp_min(0)
        radius = (grid[:, :1] ** 2 * COS2 + grid[:, 1:] ** 2 * SIN2).sqrt()
        values = H(radius).mean(1) - grid @ SIGMA
        centre, half = grid[values.argmin()], half * 0.7
    return centre


def ratio(H: Callable[[torch.Tensor], torch.Tensor]) -> float:
    s = best_spectrum(H)
    return float(s[0] / s[1])


def kinked(slope: float, beyond: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """H(r) with H' = slope below r = 1 and more by `beyond` above."""
    return lambda r: slope * r + beyond * (r - 1).clamp_min(0)


def test_quadratic_growth_leaves_the_spectrum_as_it_is():
    assert ratio(lambda r: r**2) == pytest.approx(1 / 0.6, rel=1e-4)


@pytest.mark.parametrize("power", [2.5, 3, 4, 8])
def test_faster_growth_makes_it_more_homogeneous_but_not_flat(power):
    assert 1.01 < ratio(lambda r: r**power) < 1 / 0.6 - 0.01


def test_the_faster_the_growth_the_more_homogeneous():
    ratios = [ratio(lambda r, p=p: r**p) for p in (2, 3, 4, 8)]
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("power", [1.8, 1.5])
def test_slower_growth_makes_it_more_heterogeneous(power):
    assert ratio(lambda r: r**power) > 1 / 0.6 + 0.01


def test_a_wide_kink_makes_orthogonalization_optimal():
    s = best_spectrum(kinked(0.05, 20.0))
    torch.testing.assert_close(s, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-4)


def test_a_narrow_kink_does_not():
    narrow = kinked(0.4, 0.2)
    s = best_spectrum(lambda r: narrow(r) + 0.3 * r**2)
    assert s[0] / s[1] > 1.05


def test_a_kink_rounded_off_is_no_kink():
    def rounded(r: torch.Tensor) -> torch.Tensor:
        return 0.05 * r + 20.0 * torch.nn.functional.softplus((r - 1) * 10) / 10

    assert 1.001 < ratio(rounded) < 1 / 0.6
