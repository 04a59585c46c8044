"""Every row of tables D.1-D.6 of Lau, Long, Su (2025) as data, and how an optimizer is built from it.

Rows that the paper does not print have a reason in ``why``. Polar optimizers are the library's and Adam is torch's; only
Newton's method and alternating gradient descent are implemented here. QDWH with 2 inner steps is the paper's truncated form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from experiments.problems import Problem, Quadratic
from polargrad_dist import Muon, PolarGrad, PolarGradM

Builder = Callable[[Problem, float], Optimizer]
# Steps between two decays of the learning rate, on all three problems.
DECAY_EVERY = 25


class Newton(Optimizer):
    """X ← X − lr·(AᵀA)⁻¹G(BBᵀ)⁻¹ on the quadratic problem, whose Hessian is constant."""

    def __init__(self, problem: Quadratic, lr: float):
        super().__init__([problem.X], {"lr": lr})
        self._direction = problem.newton

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self._direction(p.grad), alpha=group["lr"])


class AltGD(Optimizer):
    """Alternating gradient descent: a step in X, then one in Y with the gradient at the new X."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, gradients: Callable[[], None]):
        super().__init__(params, {"lr": lr})
        self._gradients = gradients

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for number, p in enumerate(group["params"]):
                if number:
                    self._gradients()
                assert isinstance(p.grad, Tensor)
                p.sub_(p.grad, alpha=group["lr"])


@dataclass(frozen=True)
class Method:
    """One optimizer on one problem.

    Args:
        name: as in the paper's table; an added row names what differs.
        table: the table that prints it, "D.1" to "D.6"; for an added row, the table that it extends.
        lr: base learning rate γ₀.
        build: builds the optimizer for a problem and that rate.
        decay: factor on the learning rate every 25 steps, 1 for none.
        why: reason for a row that the paper does not print, else empty.
    """

    name: str
    table: str
    lr: float
    build: Builder = field(compare=False)
    decay: float = 1.0
    why: str = ""

    @property
    def rate(self) -> str:
        """γ₀ as shown in tables and legends: 4e-8, not 4e-08."""
        return f"{self.lr:g}".replace("e-0", "e-")

    def optimizer(self, problem: Problem) -> tuple[Optimizer, StepLR]:
        """The optimizer of a problem's parameters, and the schedule to advance after each of its steps."""
        optimizer = self.build(problem, self.lr)
        return optimizer, StepLR(optimizer, DECAY_EVERY, self.decay)


def _matrices(problem: Problem) -> list[nn.Parameter]:
    return list(problem.params.values())


def _polargrad(oracle: str = "qdwh", steps: int | None = 2) -> Builder:
    return lambda problem, lr: PolarGrad(_matrices(problem), lr, oracle=oracle, steps=steps)


def _homogenized(problem: Problem, lr: float) -> Optimizer:
    return PolarGrad(_matrices(problem), lr, spectrum="homogenized")


def _polargradm(beta: float, *, polar_first: bool) -> Builder:
    return lambda problem, lr: PolarGradM(
        _matrices(problem), lr, polar_first=polar_first, beta=beta, oracle="qdwh", steps=2
    )


def _muon(oracle: str, steps: int | None) -> Builder:
    # The authors' Muon has no shape factor in these problems.
    return lambda problem, lr: Muon(_matrices(problem), lr, scale="none", oracle=oracle, steps=steps)


def _newton(problem: Problem, lr: float) -> Optimizer:
    assert isinstance(problem, Quadratic)
    return Newton(problem, lr)


def _adam(problem: Problem, lr: float) -> Optimizer:
    return Adam(_matrices(problem), lr)


def _altgd(problem: Problem, lr: float) -> Optimizer:
    return AltGD(_matrices(problem), lr, problem.gradients)


_POLAR_FIRST = _polargradm(0.95, polar_first=True)
_MOMENTUM_FIRST = _polargradm(0.9, polar_first=False)

_EDGE = "just below the largest stable rate of the exact factor; 3e-8 is 10 % below it"
_DIVERGES = "the printed rate of the truncated factor, used with the exact one"
_EARLY = "the printed rate starts slowly if batch gradients are sums over the batch"

_LARGEST = "AltGD's printed rate, with which the authors' code converges"

_HOMOGENIZED = "the isotropic curvature model's spectrum instead of the polar factor, at a suitable rate"

QUADRATIC = [
    Method("PolarGrad (QDWH)", "D.1", 4e-8, _polargrad()),
    Method("PolarGrad (ZOLO-PD)", "D.1", 3e-8, _polargrad("zolo", None)),
    Method("PolarGrad (QDWH; lr ↓)", "D.1", 4.75e-8, _polargrad(), 0.99),
    Method("Muon (NS)", "D.1", 0.1, _muon("newton_schulz", 5)),
    Method("Muon (QDWH)", "D.1", 0.1, _muon("qdwh", 2)),
    Method("Muon (ZOLO-PD)", "D.1", 0.1, _muon("zolo", None)),
    Method("Muon (QDWH; lr ↓)", "D.1", 0.05, _muon("qdwh", 2), 0.99),
    Method("Newton", "D.1", 0.25, _newton),
    Method("Adam", "D.1", 0.05, _adam),
    Method("Adam (lr ↓)", "D.1", 0.05, _adam, 0.99),
    Method("PolarGradM (polar-first)", "D.2", 4e-7, _POLAR_FIRST),
    Method("PolarGradM (polar-first; lr ↓)", "D.2", 5e-7, _POLAR_FIRST, 0.99),
    Method("PolarGradM (momentum-first)", "D.2", 2e-7, _MOMENTUM_FIRST),
    Method("PolarGradM (momentum-first; lr ↓)", "D.2", 2.5e-7, _MOMENTUM_FIRST, 0.99),
    Method("PolarGrad (ZOLO-PD), 3.2e-8", "D.1", 3.2e-8, _polargrad("zolo", None), why=_EDGE),
    Method("PolarGrad (exact), 4e-8", "D.1", 4e-8, _polargrad("svd", None), why=_DIVERGES),
    Method("homogenized, 6e-8", "D.1", 6e-8, _homogenized, why=_HOMOGENIZED),
]

LOGISTIC = [
    Method("PolarSGD (QDWH)", "D.3", 2.5e-7, _polargrad()),
    Method("PolarSGD (QDWH; lr ↓)", "D.3", 5e-7, _polargrad(), 0.95),
    Method("Muon (NS)", "D.3", 0.075, _muon("newton_schulz", 5)),
    Method("Muon (QDWH)", "D.3", 0.075, _muon("qdwh", 2)),
    Method("Muon (QDWH; lr ↓)", "D.3", 0.15, _muon("qdwh", 2), 0.95),
    Method("Adam", "D.3", 0.005, _adam),
    Method("Adam (lr ↓)", "D.3", 0.01, _adam, 0.95),
    Method("PolarSGDM (polar-first)", "D.4", 5e-7, _POLAR_FIRST),
    Method("PolarSGDM (polar-first; lr ↓)", "D.4", 5e-7, _POLAR_FIRST, 0.95),
    Method("PolarSGDM (momentum-first)", "D.4", 5e-7, _MOMENTUM_FIRST),
    Method("PolarSGDM (momentum-first; lr ↓)", "D.4", 5e-7, _MOMENTUM_FIRST, 0.95),
    Method("PolarSGD (QDWH), 1e-6", "D.3", 1e-6, _polargrad(), why=_EARLY),
    Method("PolarSGD (QDWH; lr ↓), 1e-6", "D.3", 1e-6, _polargrad(), 0.95, why=_EARLY),
    Method("homogenized, 1.2e-7", "D.3", 1.2e-7, _homogenized, why=_HOMOGENIZED),
]

COMPLETION = [
    Method("PolarGrad (QDWH)", "D.5", 15, _polargrad()),
    Method("PolarGrad (QDWH; lr ↓)", "D.5", 15, _polargrad(), 0.95),
    Method("Muon (NS)", "D.5", 0.25, _muon("newton_schulz", 5)),
    Method("Muon (QDWH)", "D.5", 0.25, _muon("qdwh", 2)),
    Method("Muon (QDWH; lr ↓)", "D.5", 0.25, _muon("qdwh", 2), 0.95),
    Method("Adam", "D.5", 0.05, _adam),
    Method("Adam (lr ↓)", "D.5", 0.05, _adam, 0.95),
    Method("AltGD", "D.5", 50, _altgd),
    Method("PolarGradM (polar-first)", "D.6", 15, _polargradm(0.5, polar_first=True)),
    Method("PolarGradM (polar-first; lr ↓)", "D.6", 15, _polargradm(0.5, polar_first=True), 0.95),
    Method("PolarGradM (momentum-first)", "D.6", 7.5, _polargradm(0.5, polar_first=False)),
    Method("PolarGradM (momentum-first; lr ↓)", "D.6", 7.5, _polargradm(0.5, polar_first=False), 0.95),
    Method("PolarGrad (QDWH), 50", "D.5", 50, _polargrad(), why=_LARGEST),
    Method("homogenized, 15", "D.5", 15, _homogenized, why=_HOMOGENIZED),
]

METHODS: dict[str, list[Method]] = {
    "quadratic": QUADRATIC,
    "logistic": LOGISTIC,
    "completion": COMPLETION,
}
