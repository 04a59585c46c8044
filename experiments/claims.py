"""The claims of sections 5.1-5.3 and D.1-D.3 of Lau, Long, Su (2025) as comparisons of curves, and expected orders.

A verdict is "agrees" only if the comparison holds for every seed; each comes with the figures behind it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from experiments.curves import Curves

POLAR, POLAR_DECAY, POLAR_EXACT = "PolarGrad (QDWH)", "PolarGrad (QDWH; lr ↓)", "PolarGrad (ZOLO-PD)"
EXACT_OURS, EXACT_EDGE = "PolarGrad (ZOLO-PD), 3.2e-8", "PolarGrad (exact), 4e-8"
MUON, MUON_QDWH, MUON_ZOLO, MUON_DECAY = "Muon (NS)", "Muon (QDWH)", "Muon (ZOLO-PD)", "Muon (QDWH; lr ↓)"
SGD, SGD_DECAY = "PolarSGD (QDWH)", "PolarSGD (QDWH; lr ↓)"
SGD_OURS, SGD_DECAY_OURS = "PolarSGD (QDWH), 1e-6", "PolarSGD (QDWH; lr ↓), 1e-6"
ADAM, ADAM_DECAY = "Adam", "Adam (lr ↓)"


@dataclass(frozen=True)
class Side:
    """One quantity of one method at one step."""

    method: str
    step: int
    quantity: str = "height"

    def values(self, curves: Curves) -> list[float]:
        return curves.at(self.method, self.step, self.quantity)

    def text(self, curves: Curves) -> str:
        values = self.values(curves)
        return (
            f"{self.method} @{self.step}: {statistics.median(values):.2g} "
            f"({min(values):.2g} to {max(values):.2g})"
        )


@dataclass(frozen=True)
class Claim:
    """For each pair and seed, ``less`` is below ``factor`` x ``more`` (or below a number)."""

    problem: str
    source: str
    text: str
    pairs: tuple[tuple[Side, Side | float], ...]
    factor: float = 1.0
    above: bool = False

    @property
    def needs(self) -> int:
        """The number of steps that a run needs for a verdict."""
        return max(side.step for pair in self.pairs for side in pair if isinstance(side, Side))

    def verdict(self, curves: Curves) -> tuple[str, str]:
        """("agrees", "differs" or "not run", the figures)."""
        if curves.last_step < self.needs:
            return "not run", f"needs {self.needs} steps, this run has {curves.last_step}"
        holds, figures = True, dict[str, None]()
        for less, more in self.pairs:
            left = less.values(curves)
            right = more.values(curves) if isinstance(more, Side) else [more] * len(left)
            below = all(a < self.factor * b for a, b in zip(left, right, strict=True))
            over = all(a > self.factor * b for a, b in zip(left, right, strict=True))
            holds = holds and (over if self.above else below)
            figures |= {side.text(curves): None for side in (less, more) if isinstance(side, Side)}
        return ("agrees" if holds else "differs"), "; ".join(figures)


def _versus(
    less: tuple[str, ...], more: tuple[str, ...], step: int, quantity: str = "height"
) -> tuple[tuple[Side, Side | float], ...]:
    return tuple((Side(a, step, quantity), Side(b, step, quantity)) for a in less for b in more)


def _growth(method: str, late: int, quantity: str) -> tuple[tuple[Side, Side | float], ...]:
    return ((Side(method, late, quantity), Side(method, 0, quantity)),)


_Q, _L, _C = "quadratic", "logistic", "completion"
_KAPPA, _NUCLEAR, _RESIDUAL = "condition_gradient", "nuclear_norm", "condition_residual"
CLAIMS = (
    Claim(_Q, "orders", "4e-8, truncated QDWH: gap below 100", ((Side(POLAR, 1000), 100.0),)),
    Claim(_Q, "orders", "3e-8, exact factor: gap below 40", ((Side(POLAR_EXACT, 1000), 40.0),)),
    Claim(_Q, "orders", "the same at 3.2e-8", ((Side(EXACT_OURS, 1000), 40.0),)),
    Claim(_Q, "orders", "4e-8, exact factor: diverges", ((Side(EXACT_EDGE, 300), 1e15),), above=True),
    Claim(_Q, "orders", "Muon at constant 0.1: floor above 1e4",
          tuple((Side(m, 1000), 1e4) for m in (MUON, MUON_QDWH, MUON_ZOLO)), above=True),
    Claim(_Q, "orders", "Adam ends between PolarGrad at 4e-8 and Muon",
          (*_versus((ADAM,), (MUON,), 1000), *_versus((POLAR,), (ADAM,), 1000))),
    Claim(_Q, "orders", "4.75e-8 decayed: fp32 floor (below 1e-5) within 300", ((Side(POLAR_DECAY, 300), 1e-5),)),
    Claim(_Q, "5.1 (i)", "better polar factors make Muon faster: early gap",
          _versus((MUON_QDWH, MUON_ZOLO), (MUON,), 100)),
    Claim(_Q, "5.1 (i)", "better polar factors make Muon better: final gap",
          _versus((MUON_QDWH, MUON_ZOLO), (MUON,), 1000)),
    Claim(_Q, "5.1 (ii)", "PolarGrad is ahead of Muon and Adam early",
          _versus((POLAR, POLAR_EXACT), (MUON_QDWH, MUON_ZOLO, ADAM), 50)),
    Claim(_Q, "5.1 (ii)", "PolarGrad is comparable to Newton early (gap within 3x)",
          _versus((POLAR, POLAR_EXACT), ("Newton",), 10), factor=3.0),
    Claim(_Q, "5.1 (iii)", "Muon stops falling without decay: last 500 steps gain under 20 %",
          ((Side(MUON_QDWH, 1000), Side(MUON_QDWH, 500)),), factor=0.8, above=True),
    Claim(_Q, "5.1 (iii)", "Muon ends lower with decay", _versus((MUON_DECAY,), (MUON_QDWH,), 1000)),
    Claim(_Q, "5.1 (iv)", "κ of the residual falls with the gap: lower for PolarGrad than for Muon at the end",
          _versus((POLAR, EXACT_OURS), (MUON_QDWH, MUON_ZOLO), 1000, _RESIDUAL)),
    Claim(_Q, "5.1 (v)", "Adam's κ of the gradient grows: over 10x from start to end",
          _growth(ADAM, 1000, _KAPPA), factor=10.0, above=True),
    Claim(_Q, "5.1 (v)", "Adam's κ of the gradient ends above PolarGrad's and Muon's",
          _versus((POLAR, POLAR_EXACT, MUON_QDWH), (ADAM,), 1000, _KAPPA)),
    Claim(_Q, "5.1 (v)", "κ of the gradient grows in Adam alone: under 10x in PolarGrad and Muon",
          tuple(pair for m in (POLAR, POLAR_EXACT, MUON_QDWH) for pair in _growth(m, 1000, _KAPPA)), factor=10.0),
    Claim(_Q, "figure 2", "gradient nuclear norms order as gaps do: PolarGrad below Muon",
          _versus((POLAR, POLAR_EXACT), (MUON, MUON_QDWH, MUON_ZOLO), 1000, _NUCLEAR)),
    Claim(_Q, "D.1.1", "momentum is faster than no momentum",
          _versus(("PolarGradM (polar-first)", "PolarGradM (momentum-first)"), (POLAR,), 300)),
    Claim(_Q, "D.1.1", "momentum is slower than no momentum with decay",
          _versus((POLAR_DECAY,), ("PolarGradM (polar-first)", "PolarGradM (momentum-first)"), 300)),
    Claim(_Q, "D.1.1", "decay makes momentum no faster (before the fp32 floor)",
          (*_versus(("PolarGradM (polar-first)",), ("PolarGradM (polar-first; lr ↓)",), 300),
           *_versus(("PolarGradM (momentum-first)",), ("PolarGradM (momentum-first; lr ↓)",), 300))),
    Claim(_L, "5.2 (i)", "PolarSGD is ahead of Muon and Adam early, rates as printed",
          _versus((SGD,), (MUON, MUON_QDWH, ADAM), 100)),
    Claim(_L, "5.2 (i)", "the same at 1e-6", _versus((SGD_OURS,), (MUON, MUON_QDWH, ADAM), 100)),
    Claim(_L, "5.2 (ii)", "decay lowers the loss at 600 steps: PolarSGD, Muon, Adam",
          (*_versus((SGD_DECAY,), (SGD,), 600), *_versus((MUON_DECAY,), (MUON_QDWH,), 600),
           *_versus((ADAM_DECAY,), (ADAM,), 600))),
    Claim(_L, "5.2 (iv)", "Muon's gradient nuclear norm rises before it falls",
          ((Side(MUON_QDWH, 50, _NUCLEAR), Side(MUON_QDWH, 0, _NUCLEAR)),), above=True),
    Claim(_L, "D.2.1", "momentum gains little: losses at 600 steps within 20 % of PolarSGD's",
          _versus(("PolarSGDM (polar-first)", "PolarSGDM (momentum-first)"), (SGD,), 600), factor=0.8, above=True),
    Claim(_C, "orders", "PolarGrad reaches 1e-12", ((Side(POLAR, 1000), 1e-12),)),
    Claim(_C, "orders", "PolarGrad with decay reaches 1e-12", ((Side(POLAR_DECAY, 1000), 1e-12),)),
    Claim(_C, "orders", "Muon stays above 1e-4",
          tuple((Side(m, 1000), 1e-4) for m in (MUON, MUON_QDWH, MUON_DECAY)), above=True),
    Claim(_C, "5.3 (i)", "PolarGrad is ahead of Muon and Adam", _versus((POLAR,), (MUON, MUON_QDWH, ADAM), 100)),
    Claim(_C, "5.3 (i)", "PolarGrad is slower than AltGD", _versus(("AltGD",), (POLAR,), 100)),
    Claim(_C, "5.3 (ii)", "Muon stops above 1e-4 even with decay", ((Side(MUON_DECAY, 1000), 1e-4),), above=True),
    Claim(_C, "5.3 (iii)", "Adam's κ of the gradient ends above 10x that with decay",
          _versus((ADAM,), (ADAM_DECAY,), 1000, _KAPPA), factor=10.0, above=True),
    Claim(_C, "D.3", "PolarGrad and AltGD: nuclear norm under 1 % of its start within 20 steps",
          ((Side(POLAR, 20, _NUCLEAR), Side(POLAR, 0, _NUCLEAR)), (Side("AltGD", 20, _NUCLEAR), Side("AltGD", 0, _NUCLEAR))),
          factor=0.01),
    Claim(_C, "D.3", "Muon's nuclear norm is under 1 % of its start at 150 steps",
          _growth(MUON_QDWH, 150, _NUCLEAR), factor=0.01),
    Claim(_C, "D.3.1", "momentum is no faster than PolarGrad",
          _versus((POLAR,), ("PolarGradM (polar-first)", "PolarGradM (momentum-first)"), 100)),
)  # fmt: skip


def finite(value: float) -> str:
    """Formats a figure for a table; a run that diverged has none."""
    return f"{value:.3g}" if math.isfinite(value) else "diverged"


def table(problem: str, curves: Curves, describe: Callable[[str], tuple[str, str]]) -> str:
    """Every method's final gap (loss on the logistic problem): median, least and largest over seeds.

    ``describe`` gives a method's printed table and learning rate.
    """
    head = f"  {'table':7}{'method':36}{'rate':>9}{'median':>11}{'least':>11}{'largest':>11}"
    lines = [f"{problem}, step {curves.last_step}", head]
    for method in curves.by_method:
        values = curves.at(method, curves.last_step)
        shown = "".join(
            f"{finite(value):>11}" for value in (statistics.median(values), min(values), max(values))
        )
        where, rate = describe(method)
        lines.append(f"  {where:7}{method:36}{rate:>9}{shown}")
    return "\n".join(lines)


def verdicts(problem: str, curves: Curves) -> list[dict[str, str]]:
    """Every claim about a problem, with its verdict and figures."""
    rows = []
    for claim in (c for c in CLAIMS if c.problem == problem):
        verdict, figures = claim.verdict(curves)
        rows.append({"source": claim.source, "claim": claim.text, "verdict": verdict, "figures": figures})
    return rows
