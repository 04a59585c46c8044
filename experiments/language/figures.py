"""Pictures of the language-model experiments: medians over seeds, with the range as a band."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.language.runner import Curves

SMOOTHING = 0.8


def draw(title: str, embed: str, head: str, curves: dict[str, list[Curves]], path: Path) -> None:
    """Training and validation loss, condition number and nuclear norm of the gradients of two parameters, in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    _panel(
        axes[0, 0],
        "training loss (smoothed)",
        {n: [_smooth(r.train) for r in runs] for n, runs in curves.items()},
    )
    _panel(axes[1, 0], "validation loss", {n: [r.validation for r in runs] for n, runs in curves.items()})
    for column, (where, parameter) in enumerate((("embedding", embed), ("head", head)), 1):
        for row, (figure_name, label) in enumerate(
            (
                ("condition", f"condition number of the {where}'s gradient"),
                ("nuclear_norm", f"its nuclear norm, {where}"),
            )
        ):
            key = f"{parameter}/gradient/{figure_name}"
            _panel(
                axes[row, column],
                label,
                {n: [r.diagnostics.get(key, []) for r in runs] for n, runs in curves.items()},
                logarithmic=True,
            )
    axes[0, 0].legend(fontsize=8)
    seeds = len(next(iter(curves.values())))
    figure.suptitle(f"{title}, {seeds} seeds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_race(title: str, racers: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    """Validation loss by step of every racer, each a list of runs' curves, in one SVG for light and dark pages.

    A dotted line marks the first racer's mean final loss. The axis starts below most of the initial drop, and leaves out
    diverged runs.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text stays text, and the same picture gives the same file.
    plt.rcParams["svg.fonttype"], plt.rcParams["svg.hashsalt"] = (
        "none",
        "race",
    )
    figure, axis = plt.subplots(figsize=(7.2, 4.2), constrained_layout=True)
    _panel(axis, f"{title}: validation loss, nats per token", racers)
    ends = [run[-1][1] for runs in racers.values() for run in runs if run and math.isfinite(run[-1][1])]
    first = next(iter(racers.values()))
    if ends:
        axis.set_ylim(min(ends) - 0.05, max(ends) + 1.0)
    if all(first):
        target = statistics.fmean(run[-1][1] for run in first)
        axis.axhline(target, linestyle=":", linewidth=1, color="#808080")
    axis.legend(fontsize=8, framealpha=0.0, labelcolor="#808080")
    axis.title.set_color("#808080")
    axis.xaxis.label.set_color("#808080")
    axis.tick_params(colors="#808080")
    for spine in axis.spines.values():
        spine.set_color("#808080")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def _panel(
    axis: Any, title: str, lines: dict[str, list[list[tuple[int, float]]]], logarithmic: bool = False
) -> None:
    for name, runs in lines.items():
        # If the head starts at zero, the embedding's first gradient is zero too.
        if logarithmic:
            runs = [[(step, value) for step, value in run if value > 0] for run in runs]
        runs = [dict(run) for run in runs if run]  # type: ignore[misc]
        if not runs:
            axis.plot([], [], label=f"{name} (diverged)")
            continue
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        values = [[run[step] for run in runs] for step in steps]  # type: ignore[call-overload]
        (line,) = axis.plot(steps, [statistics.median(v) for v in values], label=name)
        axis.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15
        )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if logarithmic:
        axis.set_yscale("log")


def _smooth(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    out: list[tuple[int, float]] = []
    for step, value in curve:
        out.append((step, value if not out else SMOOTHING * out[-1][1] + (1 - SMOOTHING) * value))
    return out
