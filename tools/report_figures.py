"""Which curves a report shows: the series of the runs as figures made of panels, before anything is drawn.

A colour is a run everywhere, except in the shares of time, where it is a phase. Curves are thinned to what a screen can
show, keeping each stretch's lowest and highest value, so a spike of one step stays visible among 100,000.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tools.report_runs import Array, RunRecords, printable

WIDE, NARROW = 1500, 300  # points of a curve in a large and in a small panel
GREY = -1  # the colour of what is no run

Style = Literal["line", "raw", "smooth", "dashed", "points"]


@dataclass
class Curve:
    """Points of one run in one panel. ``colour`` is the number of the run, or of the phase in an area."""

    colour: int
    x: Array
    y: Array
    style: Style = "line"


@dataclass
class Panel:
    """One pair of axes. ``marks``: (colour, positions along x) of skipped steps; ``areas``: layers with their names."""

    title: str
    curves: list[Curve] = field(default_factory=list)
    log: bool = False
    zero: bool = False
    x_label: str = "step"
    marks: list[tuple[int, Array]] = field(default_factory=list)
    areas: list[tuple[str, Curve]] = field(default_factory=list)

    @property
    def filled(self) -> bool:
        return bool(self.curves or self.areas)


@dataclass
class Figure:
    """Panels that are drawn as one picture, in rows of ``columns``; ``note`` says how to read them.

    ``aligned``: an empty panel keeps its place, so that one quantity stays in one column over several figures.
    """

    name: str
    title: str
    panels: list[Panel]
    columns: int
    height: float = 1.9
    note: str = ""
    aligned: bool = False

    def layers(self) -> dict[str, int]:
        """The colours of the areas by their names, for a legend."""
        return {name: layer.colour for panel in self.panels for name, layer in panel.areas}


@dataclass
class Section:
    """A part of the page; without figures it says ``missing``."""

    anchor: str
    title: str
    text: str
    figures: list[Figure]
    missing: str


def sections(runs: list[RunRecords], parameters: list[str]) -> list[Section]:
    """All figures of a report; ``parameters`` are those whose conditioning is shown."""
    return [
        Section(
            "loss",
            "Loss",
            "Cross-entropy in nats per token. Skipped steps are the crosses at the lower edge.",
            present([loss_figure(runs)]),
            "no loss was recorded",
        ),
        Section(
            "learning-rates",
            "Learning rates",
            "The rate of each role's parameter group.",
            present([per_role("learning-rates", "Learning rate", runs, "lr")]),
            "no learning rate was recorded",
        ),
        Section(
            "gradient-norm",
            "Gradient norm",
            "Global norm before clipping.",
            present([gradient_figure(runs)]),
            "no gradient norm was recorded",
        ),
        Section(
            "conditioning",
            "Conditioning of single parameters",
            "κ is the ratio of the largest to the smallest singular value, of the gradient G and of the momentum M. The "
            "residual is the update's distance from orthogonality, the cosine that between it and the exact polar factor.",
            present([conditioning_figure(name, i, runs) for i, name in enumerate(parameters)]),
            "no diagnostics of single parameters were recorded",
        ),
        Section(
            "polar",
            "Polar decomposition by role",
            "The role's mean nuclear norm, its largest condition number and residual, and the seconds in the oracle on the "
            "busiest rank.",
            present([polar_figure(role, i, runs) for i, role in enumerate(every_name(runs, "polar"))]),
            "no figures of the polar decomposition were recorded (trainer.logging.stats_every)",
        ),
        Section(
            "throughput",
            "Throughput, memory and time",
            "Rates of the whole run over all ranks, and the share of time that each phase of a step took.",
            present([throughput_figure(runs), share_figure(runs)]),
            "no rates were recorded",
        ),
    ]


def present(figures: list[Figure]) -> list[Figure]:
    """The figures that have something to show, without the empty panels of those that are not aligned."""
    for figure in figures:
        figure.panels = [panel for panel in figure.panels if panel.filled or figure.aligned]
    return [figure for figure in figures if any(panel.filled for panel in figure.panels)]


def every_name(runs: list[RunRecords], *prefix: str) -> list[str]:
    """The keys below a path in any of the runs, those of the first run first."""
    return list(dict.fromkeys(name for run in runs for name in run.names(*prefix)))


def curves(runs: list[RunRecords], *path: str, style: Style = "line", points: int = NARROW) -> list[Curve]:
    """A series of each run that has it, thinned."""
    found = [(i, *run.curve(*path)) for i, run in enumerate(runs)]
    return [Curve(i, *thin(steps, values, points), style=style) for i, steps, values in found if steps.size]


def loss_figure(runs: list[RunRecords]) -> Figure:
    """Training with validation, then validation alone, against steps and against tokens."""
    training = [run.curve("loss") for run in runs]
    window = max(1.0, max((steps[-1] for steps, _ in training if steps.size), default=0.0) / 50)
    train = [
        c for i, curve in enumerate(training) if curve[0].size for c in raw_and_smooth(i, *curve, window)
    ]
    valid = curves(runs, "validation_loss", style="points", points=WIDE)
    marks = [(i, thin(run.skips(), run.skips(), NARROW)[0]) for i, run in enumerate(runs)]
    shown = [
        Panel("training and validation", train + valid, log=wide_range(train + valid), marks=marks),
        Panel("validation", valid),
    ]
    by_tokens = [against_tokens(panel, runs) for panel in shown]
    panels = [shown[0], by_tokens[0], shown[1], by_tokens[1]]
    over = f" over up to {round(window):,} steps" if window > 1 else ""
    note = f"training: thin as recorded, thick averaged{over}; dots: validation; crosses: skipped steps"
    return Figure("loss", "Loss", panels, columns=2, height=2.8, note=note)


def raw_and_smooth(colour: int, steps: Array, values: Array, window: float) -> list[Curve]:
    raw = Curve(colour, *thin(steps, values, WIDE), style="raw")
    return [raw, Curve(colour, *thin(steps, smooth(steps, values, window), WIDE), style="smooth")]


def against_tokens(panel: Panel, runs: list[RunRecords]) -> Panel:
    """The same panel over tokens, for the runs whose tokens per step are known."""
    sizes = [run.tokens_per_step for run in runs]
    moved = [
        Curve(c.colour, c.x * size, c.y, c.style)
        for c in panel.curves
        if (size := sizes[c.colour]) is not None
    ]
    marks = [(i, steps * size) for i, steps in panel.marks if (size := sizes[i]) is not None]
    return Panel(panel.title, moved, log=panel.log, x_label="tokens", marks=marks)


def wide_range(shown: list[Curve]) -> bool:
    """Whether a spike would flatten everything else on a linear axis."""
    values = np.concatenate([curve.y for curve in shown]) if shown else np.ones(1)
    return bool(values.min() > 0 and values.max() > 4 * np.median(values))


def per_role(name: str, title: str, runs: list[RunRecords], *prefix: str) -> Figure:
    panels = [
        Panel(printable(role), curves(runs, *prefix, role), zero=True) for role in every_name(runs, *prefix)
    ]
    return Figure(name, title, panels, columns=4)


def gradient_figure(runs: list[RunRecords]) -> Figure:
    panel = Panel("norm of the gradient", curves(runs, "grad_norm", points=WIDE), log=True)
    return Figure("gradient-norm", "Gradient norm", [panel], columns=1, height=2.4)


def conditioning_figure(parameter: str, number: int, runs: list[RunRecords]) -> Figure:
    """Six quantities of one parameter; where gradient and momentum share a panel the momentum is dashed."""

    def quantity(part: str, name: str, style: Style = "line") -> list[Curve]:
        return curves(runs, "diagnostics", parameter, part, name, style=style)

    def both(name: str) -> list[Curve]:
        return quantity("gradient", name) + quantity("momentum", name, "dashed")

    panels = [
        Panel("κ(G)", quantity("gradient", "condition"), log=True),
        Panel("κ(M)", quantity("momentum", "condition"), log=True),
        Panel("nuclear norm", both("nuclear_norm"), log=True),
        Panel("stable rank", both("stable_rank"), log=True),
        Panel("residual", quantity("update", "residual"), log=True),
        Panel("cosine", quantity("update", "cosine")),
    ]
    name = f"conditioning-{number + 1:03}"
    return Figure(
        name, printable(parameter), panels, columns=6, height=1.75, note="solid: G, dashed: M", aligned=True
    )


def polar_figure(role: str, number: int, runs: list[RunRecords]) -> Figure:
    panels = [
        Panel("nuclear norm", curves(runs, "polar", role, "nuclear_norm"), log=True),
        Panel("condition", curves(runs, "polar", role, "condition"), log=True),
        Panel("residual", curves(runs, "polar", role, "residual"), log=True),
        Panel("seconds", curves(runs, "polar", role, "seconds"), zero=True),
    ]
    return Figure(f"polar-{number + 1:02}", printable(role), panels, columns=4, aligned=True)


def throughput_figure(runs: list[RunRecords]) -> Figure:
    panels = [
        Panel("tokens per second", curves(runs, "tokens_per_second", points=WIDE), zero=True),
        Panel("model FLOPs utilisation", curves(runs, "mfu", points=WIDE), zero=True),
        Panel("largest memory, GiB", curves(runs, "memory_gib", points=WIDE), zero=True),
    ]
    return Figure("throughput", "Throughput and memory", panels, columns=3)


def share_figure(runs: list[RunRecords]) -> Figure:
    """Stacked shares of the phases, one panel per run."""
    phases = every_name(runs, "share")
    panels = [Panel(run.label, areas=share_areas(run, phases), zero=True) for run in runs]
    return Figure("time", "Share of time", panels, columns=min(3, len(runs)), height=2.0)


def share_areas(run: RunRecords, phases: list[str]) -> list[tuple[str, Curve]]:
    """A layer per phase on common steps, 0 where a record does not name it; means over equal stretches when thinned."""
    mine = {phase: run.curve("share", phase) for phase in phases}
    steps = np.unique(np.concatenate([steps for steps, _ in mine.values()])) if mine else np.empty(0)
    if not steps.size:
        return []
    stretches = np.array_split(np.arange(steps.size), min(NARROW, steps.size))
    areas = []
    for number, (phase, (at, values)) in enumerate(mine.items()):
        layer = np.zeros(steps.size)
        layer[np.searchsorted(steps, at)] = values
        x, y = (np.array([column[stretch].mean() for stretch in stretches]) for column in (steps, layer))
        areas.append((printable(phase), Curve(GREY if phase == "other" else number, x, y)))
    return areas


def smooth(steps: Array, values: Array, window: float) -> Array:
    """Exponential mean whose memory is ``window`` steps, and a tenth of the way so far where that is less: a fixed window
    would trail behind the steep beginning of a loss curve."""
    memory = np.minimum(window, np.maximum(1.0, steps / 10))
    keep = np.exp(-np.diff(steps, prepend=steps[:1]) / memory)
    out, mean = [], float(values[0])
    for k, value in zip(keep.tolist(), values.tolist(), strict=True):
        mean = k * mean + (1 - k) * value
        out.append(mean)
    return np.array(out)


def thin(x: Array, y: Array, points: int) -> tuple[Array, Array]:
    """At most ``points`` of the points: both ends, and the lowest and the highest of each stretch between them."""
    if x.size <= points:
        return x, y
    keep = {0, x.size - 1}
    for stretch in np.array_split(np.arange(1, x.size - 1), (points - 2) // 2):
        keep |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    chosen = np.array(sorted(keep))
    return x[chosen], y[chosen]
