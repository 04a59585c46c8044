"""Theorems 4.1 and 4.3 of Lau, Long, Su (2025), null-gradient consistency (4.2), and Armijo steps of Muon (slides)."""

import itertools
import math

import pytest
import torch

from experiments.problems import Quadratic
from polargrad_dist import Muon, PolarGrad, PolarGradM
from polargrad_dist.polar import polar

F64 = torch.float64
# m, n, p, q: rank 6, condition of the Hessian about 35
SIZE = (12, 6, 60, 40)
RANK = 6
EXACT = dict(oracle="svd", lower=1e-12)


def spectrum(problem: Quadratic) -> torch.Tensor:
    problem.gradients()
    return torch.linalg.svdvals(problem.X.grad)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_polargrad_step_keeps_both_bounds_of_theorem_4_1(seed):
    problem = Quadratic(seed, SIZE, F64)
    L, kappa_h = problem.smoothness, problem.smoothness / problem.convexity
    optimizer = PolarGrad([problem.X], 0.0, **EXACT)
    start = gap = problem.gap()
    steps = 0
    while gap > 1e-18 * start:
        sigma = spectrum(problem)
        r = int(torch.linalg.matrix_rank(problem.X.grad))
        optimizer.param_groups[0]["lr"] = 1 / (L * r)
        optimizer.step()
        after = problem.gap()
        kappa_g = float(sigma[0] / sigma[r - 1])
        rounding = 1e-10 * gap
        assert after <= (1 - 1 / (r**2 * kappa_h)) * gap + rounding
        assert after <= (1 - 1 / (kappa_g**2 * kappa_h)) * gap + rounding
        # (B.3), from which both follow and which is far tighter than they are.
        assert after <= gap - float(sigma.sum()) ** 2 / (2 * L * r) + rounding
        gap, steps = after, steps + 1
        assert steps < 5000
    assert steps > 20


def sign_descent(seed: int, rate: float, steps: int) -> tuple[Quadratic, list[float]]:
    problem = Quadratic(seed, SIZE, F64)
    optimizer = PolarGrad([problem.X], rate, scale="none", **EXACT)
    gaps = [problem.gap()]
    for _ in range(steps):
        problem.gradients()
        optimizer.step()
        gaps.append(problem.gap())
    return problem, gaps


def test_sign_descent_obeys_the_recursion_of_theorem_4_3():
    rate = 0.02
    problem, gaps = sign_descent(0, rate, 400)
    for before, after in itertools.pairwise(gaps):
        bound = before - rate * math.sqrt(2 * problem.convexity * before)
        bound += problem.smoothness / 2 * rate**2 * RANK
        assert after <= bound + 1e-10 * before


def test_sign_descent_stops_at_a_floor_that_polargrad_falls_through():
    _, gaps = sign_descent(0, 0.02, 700)
    floor = min(gaps[-200:])
    # It did descend
    assert floor < 1e-2 * gaps[0]
    # And then no more
    assert floor > 0.5 * min(gaps[300:400])
    problem = Quadratic(0, SIZE, F64)
    optimizer = PolarGrad([problem.X], 1 / (problem.smoothness * RANK), **EXACT)
    for _ in range(700):
        problem.gradients()
        optimizer.step()
    assert problem.gap() < 1e-8 * floor


def test_the_floor_falls_with_the_square_of_the_rate():
    floors = [sum(sign_descent(0, rate, 800)[1][-300:]) / 300 for rate in (0.02, 0.01)]
    assert floors[0] / floors[1] == pytest.approx(4, rel=0.5)


def step_length(build, scale: float) -> float:
    """Frobenius norm of the first step on a fixed gradient times ``scale``."""
    X = torch.nn.Parameter(torch.zeros(8, 5, dtype=F64))
    X.grad = scale * torch.randn(8, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    build(X).step()
    return float(X.detach().norm())


POLARGRADS = {
    "plain": lambda X: PolarGrad([X], 0.1),
    "truncated QDWH": lambda X: PolarGrad([X], 0.1, oracle="qdwh", steps=2),
    "momentum-first": lambda X: PolarGradM([X], 0.1, oracle="qdwh", steps=2),
    "polar-first": lambda X: PolarGradM([X], 0.1, polar_first=True, oracle="qdwh", steps=2),
}


@pytest.mark.parametrize("name", POLARGRADS)
def test_polargrad_steps_vanish_in_proportion_to_the_gradient(name):
    whole = step_length(POLARGRADS[name], 1.0)
    for scale in (1e-3, 1e-6, 1e-12):
        assert step_length(POLARGRADS[name], scale) == pytest.approx(scale * whole, rel=1e-9)


@pytest.mark.parametrize("oracle", ["newton_schulz", "qdwh", "zolo"])
def test_muon_steps_do_not_vanish_with_the_gradient(oracle):
    def muon(X):
        return Muon([X], 0.1, oracle=oracle)

    whole = step_length(muon, 1.0)
    assert whole > 0.1
    assert step_length(muon, 1e-12) == pytest.approx(whole, rel=1e-6)


def test_backtracking_on_muon_finds_the_nuclear_norm_by_itself():
    """Slides, Armijo's condition f(X − αU) ≤ f(X) − cα‖G‖_nuc, halving α from the same start at every step."""
    c, largest = 0.5, 64.0
    problem = Quadratic(0, SIZE, F64)
    optimizer = Muon([problem.X], 0.0, beta=0.0, nesterov=False, scale="none", oracle="svd", lower=1e-12)
    # Half of what smoothness always admits
    low = (1 - c) / (problem.smoothness * RANK)
    # Strong convexity admits no more
    high = 2 * (1 - c) / (problem.convexity * RANK)
    alphas, ratios = [], []
    start = problem.gap()
    for _ in range(400):
        nuclear = float(spectrum(problem).sum())
        U, before, here = (
            polar(problem.X.grad, method="svd", lower=1e-12).U,
            problem.gap(),
            problem.X.detach(),
        )
        here, alpha = here.clone(), largest
        while True:
            with torch.no_grad():
                problem.X.copy_(here - alpha * U)
            if problem.gap() <= before - c * alpha * nuclear:
                break
            alpha /= 2
        with torch.no_grad():
            problem.X.copy_(here)
        problem.gradients()
        optimizer.param_groups[0]["lr"] = alpha
        optimizer.step()
        alphas.append(alpha)
        ratios.append(alpha / nuclear)
        if problem.gap() < 1e-16 * start:
            break
    assert problem.gap() < 1e-12 * start
    assert all(low <= ratio <= high for ratio in ratios)
    assert max(alphas) / min(alphas) > 1e5
    assert max(ratios) / min(ratios) < 30
