"""The orders of magnitude of sections 5.1 and 5.3 on the paper's sizes, one seed. About two minutes on one core."""

import pytest

from experiments.curves import Curve, follow
from experiments.methods import METHODS
from experiments.problems import PROBLEMS

pytestmark = pytest.mark.slow
SEED = 0


def curve(problem: str, name: str, steps: int = 1000) -> Curve:
    method = next(m for m in METHODS[problem] if m.name == name)
    return follow(PROBLEMS[problem](SEED), method, SEED, steps, every=50)


def test_truncated_polargrad_converges_at_its_printed_rate_where_the_exact_factor_diverges():
    truncated = curve("quadratic", "PolarGrad (QDWH)")
    assert truncated.gap[-1] < 100
    # And still falling
    assert truncated.gap[-1] < 0.5 * truncated.at(500)
    assert curve("quadratic", "PolarGrad (exact), 4e-8").diverged_at is not None


def test_exact_polargrad_converges_at_its_printed_rate_and_further_at_the_edge_of_stability():
    assert curve("quadratic", "PolarGrad (ZOLO-PD)").gap[-1] < 300
    assert curve("quadratic", "PolarGrad (ZOLO-PD), 3.2e-8").gap[-1] < 40


def test_muon_stops_at_a_floor_orders_above_polargrad_and_adam():
    muon, adam = curve("quadratic", "Muon (NS)"), curve("quadratic", "Adam")
    # The authors' own run
    assert muon.gap[-1] == pytest.approx(7.6e4, rel=0.1)
    assert muon.gap[-1] > 0.5 * muon.at(500)
    assert 1 < adam.gap[-1] < 1e4


def test_decayed_polargrad_nears_the_fp32_floor_within_300_steps():
    found = curve("quadratic", "PolarGrad (QDWH; lr ↓)", 300)
    assert found.gap[0] > 1e9
    assert found.gap[-1] < 1e-4


def test_completion_is_solved_by_polargrad_and_not_by_muon():
    assert curve("completion", "PolarGrad (QDWH)").gap[-1] < 1e-12
    # The rate runs out at about 1e-11
    assert curve("completion", "PolarGrad (QDWH; lr ↓)").gap[-1] < 1e-10
    for name in ("Muon (NS)", "Muon (QDWH)"):
        assert 1e-4 < curve("completion", name).gap[-1] < 1e-2
    assert curve("completion", "Muon (QDWH; lr ↓)").gap[-1] > 1e-6
