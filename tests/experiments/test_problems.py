"""The three problems: printed formulas, closed-form gradients against autograd, the quadratic's closed-form optimum."""

import math

import pytest
import torch

from experiments.problems import Completion, Logistic, Quadratic, condition_number

F64 = torch.float64


def small(name: str):
    match name:
        case "quadratic":
            return Quadratic(3, (7, 4, 12, 9), F64)
        case "logistic":
            return Logistic(3, (6, 4, 1000, 5), batch=None, dtype=F64)
    return Completion(3, (15, 9, 2), F64)


def printed(name: str, problem) -> torch.Tensor:
    """The objective as the paper prints it, for autograd."""
    match name:
        case "quadratic":
            return (problem.A @ problem.X @ problem.B - problem.C).square().sum() / 2
        case "logistic":
            rows = [
                torch.log(1 + torch.exp(-c * (a @ problem.X @ problem.B))).sum()
                for a, c in zip(problem.A, problem.C, strict=True)
            ]
            return torch.stack(rows).sum()
    masked = problem.mask * (problem.X @ problem.Y.mT - problem.target)
    return masked.square().sum() / problem.mask.square().sum()


@pytest.mark.parametrize("name", ["quadratic", "logistic", "completion"])
def test_losses_and_gradients_are_those_of_the_printed_objective(name):
    problem = small(name)
    objective = printed(name, problem)
    assert problem.loss() == pytest.approx(objective.item(), rel=1e-12)
    expected = torch.autograd.grad(objective, list(problem.params.values()))
    problem.gradients()
    for p, gradient in zip(problem.params.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["quadratic", "logistic", "completion"])
def test_gradients_agree_with_central_differences_of_the_loss(name):
    problem = small(name)
    problem.gradients()
    width = 1e-5
    for p in problem.params.values():
        for place in ((0, 0), (2, 1), (p.shape[0] - 1, p.shape[1] - 1)):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    p[place] += sign * width
                    sides.append(problem.loss())
                    p[place] -= sign * width
            slope = (sides[0] - sides[1]) / (2 * width)
            assert float(p.grad[place]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_the_quadratics_minimizer_has_no_gradient_and_its_optimum_is_the_loss_there():
    problem = small("quadratic")
    start = problem.loss()
    with torch.no_grad():
        problem.X.copy_(problem.minimizer)
    problem.gradients()
    assert float(problem.X.grad.norm()) < 1e-10
    assert problem.gap() < 1e-20
    assert problem.optimum == pytest.approx(float(problem.residual().square().sum()) / 2, rel=1e-12)
    assert 0 < problem.optimum < start


def test_the_quadratics_gap_is_the_loss_above_the_optimum():
    problem = small("quadratic")
    direct = float(problem.residual().square().sum()) / 2 - problem.optimum
    assert problem.gap() == pytest.approx(direct, rel=1e-10)


def test_smoothness_and_convexity_are_the_extreme_eigenvalues_of_the_hessian():
    problem = small("quadratic")
    hessian = torch.kron(problem.B @ problem.B.mT, problem.A.mT @ problem.A)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert problem.smoothness == pytest.approx(float(eigenvalues[-1]), rel=1e-10)
    assert problem.convexity == pytest.approx(float(eigenvalues[0]), rel=1e-10)


def test_one_full_newton_step_lands_on_the_minimizer():
    problem = small("quadratic")
    problem.gradients()
    reached = problem.X.detach() - problem.newton(problem.X.grad)
    torch.testing.assert_close(reached, problem.minimizer, rtol=1e-10, atol=1e-12)


def test_labels_are_zero_or_one_and_a_zero_label_costs_log_two():
    problem = small("logistic")
    assert set(problem.C.unique().tolist()) == {0.0, 1.0}
    # P(N(0, 1) > 0.5)
    assert float(problem.C.mean()) == pytest.approx(0.3085, abs=0.03)
    problem.C.zero_()
    assert problem.loss() == pytest.approx(problem.C.numel() * math.log(2), rel=1e-12)


def test_minibatch_gradients_average_to_the_full_one_by_the_share_of_rows():
    full, part = (Logistic(0, (5, 3, 1000, 4), batch, F64) for batch in (None, 200))
    full.gradients()
    total = torch.zeros_like(full.X)
    for _ in range(2000):
        part.gradients()
        total += part.X.grad
    error = (total / 2000 * (1000 / 200) - full.X.grad).norm() / full.X.grad.norm()
    assert error < 0.02


def test_sizes_and_distributions_are_those_of_the_appendix():
    problem = Completion(0)
    assert (problem.X.shape, problem.Y.shape, problem.mask.shape) == ((500, 5), (250, 5), (500, 250))
    assert float(problem.mask.mean()) == pytest.approx(0.3, abs=0.01)
    assert int(torch.linalg.matrix_rank(problem.target)) == 5
    quadratic = Quadratic(0)
    assert (quadratic.X.shape, quadratic.A.shape) == ((500, 100), (1000, 500))
    assert (quadratic.B.shape, quadratic.C.shape) == ((100, 250), (1000, 250))
    assert float(quadratic.X.detach().abs().max()) <= 1
    assert float(quadratic.X.detach().mean().abs()) < 0.02
    assert float(quadratic.A.std()) == pytest.approx(1, abs=0.01)


def test_a_seed_fixes_the_data_and_another_changes_it():
    one, same, other = Completion(1), Completion(1), Completion(2)
    assert torch.equal(one.target, same.target)
    assert torch.equal(one.X, same.X)
    assert not torch.equal(one.target, other.target)


def test_condition_number_and_nuclear_norm_of_a_known_spectrum():
    kappa, nuclear = condition_number(torch.diag(torch.tensor([8.0, 2.0, 0.5])))
    assert (kappa, nuclear) == (pytest.approx(16), pytest.approx(10.5))
    assert condition_number(torch.zeros(3, 2))[0] == math.inf
