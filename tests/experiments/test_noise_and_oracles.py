"""Theorem 4.2, the second half of 4.3, their forms for inexact oracles, and modular duality, on a small quadratic in fp64.

The paper states the rates up to constants; each bound here is the inequality in its proof, with the constants written
out. An oracle enters by what was measured of its Ũ at that step: ⟨G, Ũ⟩ and ‖Ũ‖_F.
"""

import math

import pytest
import torch

from experiments.problems import Quadratic
from polargrad_dist.polar import polar, polar_express_coefficients

from .test_theory import RANK, SIZE

F64 = torch.float64
ORACLES = {
    "svd": dict(method="svd", lower=1e-12),
    "gram by products": dict(method="gram", root="products"),
    "qdwh": dict(method="qdwh", lower=0.0),
    "qdwh, 2 steps": dict(method="qdwh", steps=2),
    "zolo": dict(method="zolo", lower=0.0),
    "newton": dict(method="newton", lower=0.0),
    "Muon's quintic": dict(method="newton_schulz", steps=5),
    "cubic, 3 steps": dict(method="newton_schulz", coefficients="cubic", steps=3),
    "polar express, 4 steps": dict(method="polar_express", steps=4, lower=1e-2),
}
HALF = {"Muon's quintic", "polar express, 4 steps"}


def inexact(name: str, G: torch.Tensor) -> torch.Tensor:
    """Ũ of an oracle in the arithmetic it is meant for: bf16 for the polynomials, fp32 for the truncated QDWH."""
    dtype = torch.bfloat16 if name in HALF else torch.float32 if "2 steps" in name else F64
    return polar(G.to(dtype), **ORACLES[name]).U.double()


def gradient(problem: Quadratic, noise: float = 0.0, draw: torch.Generator | None = None) -> torch.Tensor:
    """The gradient plus noise Z with E‖Z‖_F² = noise²."""
    problem.gradients()
    G = problem.X.grad
    if noise:
        G = G + noise / math.sqrt(G.numel()) * torch.randn(G.shape, dtype=F64, generator=draw)
    return G


def move(problem: Quadratic, step: torch.Tensor) -> None:
    with torch.no_grad():
        problem.X.sub_(step)


@pytest.mark.parametrize("name", ORACLES)
def test_every_step_of_an_inexact_oracle_keeps_the_bound_of_its_measured_error(name):
    problem = Quadratic(0, SIZE, F64)
    L, mu = problem.smoothness, problem.convexity
    gaps = [problem.gap()]
    for _ in range(60):
        G = gradient(problem)
        U = inexact(name, G)
        inner, size = float((G * U).sum()), float(U.square().sum())
        nuclear = float(torch.linalg.svdvals(G).sum())
        missing = 1 - inner / nuclear
        assert missing < 0.4
        move(problem, inner / (L * size) * U)
        gaps.append(problem.gap())
        rate = (1 - missing) ** 2 * mu / (L * size)
        assert gaps[-1] <= (1 - rate) * gaps[-2] * (1 + 1e-9)
        # Before strong convexity is used, and tighter.
        assert gaps[-1] <= gaps[-2] - inner**2 / (2 * L * size) + 1e-9 * gaps[-2]
    assert gaps[-1] < 0.3 * gaps[0]


@pytest.mark.parametrize("name", ORACLES)
def test_sign_descent_with_an_inexact_oracle_finds_a_small_gradient(name):
    rate, steps = 0.02, 200
    problem = Quadratic(0, SIZE, F64)
    L, start = problem.smoothness, problem.gap()
    inner, sizes = [], []
    for _ in range(steps):
        before = problem.gap()
        G = gradient(problem)
        U = inexact(name, G)
        inner.append(float((G * U).sum()))
        sizes.append(float(U.square().sum()))
        move(problem, rate * U)
        assert problem.gap() <= before - rate * inner[-1] + L / 2 * rate**2 * sizes[-1] + 1e-9 * before
    assert min(inner) <= start / (rate * steps) + L * rate * max(sizes) / 2


@pytest.mark.parametrize("noise", [0.0, 30.0])
def test_sign_sgd_finds_a_gradient_within_the_bound_of_theorem_4_3(noise):
    rate, steps, seeds = 0.02, 200, 4
    norms = torch.zeros(steps, dtype=F64)
    for seed in range(seeds):
        problem, draw = Quadratic(0, SIZE, F64), torch.Generator().manual_seed(seed)
        start = problem.gap()
        for k in range(steps):
            norms[k] += gradient(problem).norm() / seeds
            move(problem, rate * inexact("svd", gradient(problem, noise, draw)))
    bound = start / (rate * steps) + problem.smoothness * rate * RANK / 2 + 2 * noise * math.sqrt(RANK)
    assert norms.min() <= bound
    assert norms.min() < 0.1 * norms[0]


def noisy_gaps(noise: float, oracle: str, steps: int = 700) -> list[float]:
    problem, draw = Quadratic(0, SIZE, F64), torch.Generator().manual_seed(1)
    rate = 0.9 / (problem.smoothness * RANK**2)
    gaps = [problem.gap()]
    for _ in range(steps):
        G = gradient(problem, noise, draw)
        U = inexact(oracle, G)
        move(problem, rate * (G * U).sum() * U)
        gaps.append(problem.gap())
    return gaps


@pytest.mark.parametrize("oracle", ["svd", "qdwh, 2 steps"])
def test_polar_sgd_falls_exponentially_to_a_floor_in_proportion_to_the_variance(oracle):
    small, large = noisy_gaps(2000.0, oracle), noisy_gaps(4000.0, oracle)
    clean = noisy_gaps(0.0, oracle, 300)
    rates = [math.log(clean[k] / clean[k + 100]) for k in (0, 100, 200)]
    # A constant part of the gap goes in every hundred steps
    assert min(rates) > 0.5
    floors = [sum(gaps[-400:]) / 400 for gaps in (small, large)]
    assert floors[0] < 1e-2 * small[0]
    assert floors[1] / floors[0] == pytest.approx(4, rel=0.35)


@pytest.mark.parametrize("shape", [(40, 10), (10, 40)])
def test_the_dual_direction_of_the_dimension_agnostic_norm_grows_with_the_output(shape):
    """‖W‖ = √(d_in/d_out)·‖W‖₂ (tutorial, 2.1) has the duality map √(d_out/d_in)·UVᵀ, not the inverse that 2.3 prints."""
    d_out, d_in = shape
    draw = torch.Generator().manual_seed(0)
    G = torch.randn(shape, dtype=F64, generator=draw)
    U = polar(G, method="svd").U

    def norm(W: torch.Tensor) -> float:
        return math.sqrt(d_in / d_out) * float(torch.linalg.matrix_norm(W, 2))

    best = math.sqrt(d_out / d_in) * U
    dual = math.sqrt(d_out / d_in) * float(torch.linalg.svdvals(G).sum())
    assert norm(best) == pytest.approx(1)
    assert float((G * best).sum()) == pytest.approx(dual)
    for _ in range(200):
        W = torch.randn(shape, dtype=F64, generator=draw) + G
        assert float((G * W).sum()) / norm(W) <= dual
    printed = math.sqrt(d_in / d_out) * U
    # Four times too short, or too long
    assert norm(printed) == pytest.approx(d_in / d_out)


def test_the_dual_of_the_largest_layer_norm_is_the_sum_of_nuclear_norms():
    draw = torch.Generator().manual_seed(0)
    layers = [torch.randn(shape, dtype=F64, generator=draw) for shape in ((8, 5), (5, 9), (4, 4))]
    total = sum(float(torch.linalg.svdvals(G).sum()) for G in layers)
    assert sum(float((G * polar(G, method="svd").U).sum()) for G in layers) == pytest.approx(total)
    for _ in range(200):
        W = [torch.randn(G.shape, dtype=F64, generator=draw) + G for G in layers]
        largest = max(float(torch.linalg.matrix_norm(x, 2)) for x in W)
        assert sum(float((G * x).sum()) for G, x in zip(layers, W, strict=True)) / largest <= total


def test_polar_express_needs_seven_steps_where_the_tutorial_says_three():
    def steps_needed(schedule_of) -> int:
        for steps in range(1, 60):
            x = torch.logspace(-3, 0, 4001, dtype=F64)
            for a, b, c in schedule_of(steps):
                x = x * (a + b * x**2 + c * x**4)
            if (1 - x.square()).abs().max() < 1e-4:
                return steps
        raise AssertionError("no schedule reaches 1e-4")

    assert steps_needed(lambda k: polar_express_coefficients(1e-3, k)) == 7
    # There: 7
    assert steps_needed(lambda k: [(1.5, -0.5, 0.0)] * k) > 20
