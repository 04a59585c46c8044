"""Runs one optimizer on one problem with one seed and records the curves behind figures, tables and verdicts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from experiments.methods import Method
from experiments.problems import Problem, condition_number
from polargrad_dist.errors import PolarError

# A run has diverged at this multiple of its first loss.
DIVERGED = 1e6
QUANTITIES = ("loss", "gap", "condition_residual", "condition_gradient", "nuclear_norm")


@dataclass
class Curve:
    """Quantities at ``steps``: at step k, those of the iterate X_k before the step.

    ``gap`` is empty if the optimum is unknown, ``condition_residual`` if the paper shows none. With two parameters,
    ``condition_gradient`` is the larger condition number and ``nuclear_norm`` the sum. ``diverged_at`` is the step after
    which nothing is recorded, ``seconds`` is processor time.
    """

    problem: str
    method: str
    seed: int
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    condition_residual: list[float] = field(default_factory=list)
    condition_gradient: list[float] = field(default_factory=list)
    nuclear_norm: list[float] = field(default_factory=list)
    diverged_at: int | None = None
    seconds: float = 0.0

    @property
    def height(self) -> list[float]:
        """The gap if it is known, else the loss."""
        return self.gap or self.loss

    def at(self, step: int, quantity: str = "height") -> float:
        """The last value recorded up to a step; inf if the run had diverged by then."""
        if self.diverged_at is not None and self.diverged_at <= step:
            return math.inf
        last = max(i for i, recorded in enumerate(self.steps) if recorded <= step)
        return float(getattr(self, quantity)[last])

    def plain(self) -> dict[str, Any]:
        """JSON-able, with null for values that are not finite."""
        values = asdict(self)
        for name in QUANTITIES:
            values[name] = [x if math.isfinite(x) else None for x in values[name]]
        return values


class Curves:
    """All curves of one problem."""

    def __init__(self, curves: list[Curve]):
        self.by_method: dict[str, list[Curve]] = {}
        for curve in curves:
            self.by_method.setdefault(curve.method, []).append(curve)
        self.last_step = max(curve.steps[-1] for curve in curves)

    def at(self, method: str, step: int, quantity: str = "height") -> list[float]:
        """The value of every seed."""
        return [curve.at(step, quantity) for curve in self.by_method[method]]

    def median(self, method: str, step: int, quantity: str = "height") -> float:
        return statistics.median(self.at(method, step, quantity))


def follow(
    problem: Problem,
    method: Method,
    seed: int,
    steps: int,
    every: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Curve:
    """Runs ``steps`` steps and records every ``every``-th and the last; ``advance`` is told of steps done or skipped."""
    curve = Curve(problem.name, method.name, seed)
    optimizer, schedule = method.optimizer(problem)
    began = time.process_time()
    for step in range(steps + 1):
        problem.gradients()
        if step % every == 0 or step == steps:
            _record(curve, problem, step)
            if not curve.loss[-1] <= DIVERGED * curve.loss[0]:
                curve.diverged_at = step
                break
        if step == steps:
            break
        try:
            optimizer.step()
        # The gradient overflowed.
        except PolarError:
            curve.diverged_at = step
            break
        schedule.step()
        advance(1)
    if curve.diverged_at is not None:
        advance(steps - curve.diverged_at)
    curve.seconds = time.process_time() - began
    return curve


def _record(curve: Curve, problem: Problem, step: int) -> None:
    curve.steps.append(step)
    curve.loss.append(problem.loss())
    gap, residual = problem.gap(), problem.residual()
    if gap is not None:
        curve.gap.append(gap)
    grads = [p.grad for p in problem.params.values() if p.grad is not None]
    finite = all(bool(g.isfinite().all()) for g in grads)
    spectra = [condition_number(g) if finite else (math.inf, math.inf) for g in grads]
    curve.condition_gradient.append(max(kappa for kappa, _ in spectra))
    curve.nuclear_norm.append(sum(norm for _, norm in spectra))
    if residual is not None and problem.name == "quadratic":
        curve.condition_residual.append(condition_number(residual)[0] if finite else math.inf)
