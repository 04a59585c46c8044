"""Figures 1-4 and D.1-D.11 of Lau, Long, Su (2025), drawn from curves: median and range over seeds.

If the paper has one figure per seed (1 and D.1, 3 and D.4, 4 and D.6, D.7 and D.8), one figure here shows all seeds.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments.curves import Curve, Curves
from experiments.methods import METHODS, Method

LABELS = {
    "height": {"quadratic": "f(X) − f*", "logistic": "f(X)", "completion": "f(X, Y)"},
    "condition_residual": {"quadratic": "κ₂ of the residual"},
    "condition_gradient": dict.fromkeys(METHODS, "κ₂ of the gradient"),
    "nuclear_norm": dict.fromkeys(METHODS, "nuclear norm of the gradient"),
}
# The axis ends at this multiple of the highest value of the runs that did not diverge.
HEADROOM = 2.0


@dataclass(frozen=True)
class Figure:
    """Which quantities a figure shows side by side, for the rows of which table, and which rows it leaves out."""

    name: str
    problem: str
    table: str
    panels: tuple[str, ...]
    without: tuple[str, ...] = ()

    def methods(self) -> list[Method]:
        rows = [m for m in METHODS[self.problem] if m.table == self.table]
        return [m for m in rows if not m.name.startswith(self.without or ("\0",))]


_BOTH = ("height", "condition_gradient")
_THREE = ("height", "condition_residual", "condition_gradient")
_NUCLEAR = ("nuclear_norm",)
FIGURES = (
    Figure("figure_1_and_D.1", "quadratic", "D.1", _THREE),
    Figure("figure_2", "quadratic", "D.1", _NUCLEAR),
    Figure("figure_D.2", "quadratic", "D.2", _THREE),
    Figure("figure_D.3", "quadratic", "D.2", _NUCLEAR),
    Figure("figure_3_and_D.4", "logistic", "D.3", (*_BOTH, "nuclear_norm")),
    Figure("figure_D.5", "logistic", "D.4", (*_BOTH, "nuclear_norm")),
    Figure("figure_4_and_D.6", "completion", "D.5", _BOTH),
    Figure("figure_D.7_and_D.8", "completion", "D.5", _BOTH, without=("Adam", "AltGD")),
    Figure("figure_D.9", "completion", "D.5", _NUCLEAR),
    Figure("figure_D.10", "completion", "D.6", _BOTH),
    Figure("figure_D.11", "completion", "D.6", _NUCLEAR),
)


def draw(problem: str, curves: Curves, folder: Path) -> list[Path]:
    """Writes the problem's figures as PNG into ``folder`` and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for figure in (f for f in FIGURES if f.problem == problem):
        methods = figure.methods()
        width = 5.2 * len(figure.panels)
        canvas, axes = plt.subplots(
            1, len(figure.panels), figsize=(width, 4.4), squeeze=False, layout="constrained"
        )
        for axis, quantity in zip(axes[0], figure.panels, strict=True):
            for number, method in enumerate(methods):
                steps, low, middle, high = spread(curves.by_method[method.name], quantity)
                style = ":" if method.why else "--" if method.decay < 1 else "-"
                colour = plt.get_cmap("tab20")(number % 20)
                label = method.name if method.why else f"{method.name}, {method.rate}"
                axis.plot(steps, middle, style, color=colour, label=label, linewidth=1.4)
                axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set_yscale("log")
            axis.set_ylim(top=_ceiling(curves, methods, quantity))
            axis.set_xlabel("step")
            axis.set_title(LABELS[quantity][problem])
            axis.grid(alpha=0.25)
        canvas.legend(
            *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
        )
        path = folder / f"{figure.name}.png"
        canvas.savefig(path, dpi=130)
        plt.close(canvas)
        paths.append(path)
    return paths


def spread(curves: list[Curve], quantity: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """(steps, least, median, largest over seeds), up to the end of the shortest run; NaN if a value is not finite."""
    length = min(len(curve.steps) for curve in curves)
    columns = list(zip(*(getattr(curve, quantity)[:length] for curve in curves), strict=True))
    rows = [
        [f(column) if all(map(math.isfinite, column)) else math.nan for column in columns]
        for f in (min, statistics.median, max)
    ]
    return curves[0].steps[:length], rows[0], rows[1], rows[2]


def _ceiling(curves: Curves, methods: list[Method], quantity: str) -> float | None:
    """The upper limit of the axis: above the highest value of the runs that did not diverge."""
    calm = [
        value
        for method in methods
        for curve in curves.by_method[method.name]
        if curve.diverged_at is None
        for value in getattr(curve, quantity)
        if math.isfinite(value)
    ]
    return HEADROOM * max(calm) if calm else None
