"""The curves of a report, thinned to the resolution of a screen, as the JSON-able tree that `chart.js` and `page.js` draw.

A series is ``{"run", "name", "s", "y"}``: the run's number, the curve's name, steps and values; ``lo`` and ``hi`` are the
lowest and highest value of each interval that was averaged, so that a spike of one step stays visible among 100,000. The
browser converts steps to tokens or seconds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tools.report.runs import Array, RunRecords, printable

WIDE, NARROW = 800, 240
"""Most points of a curve in a large and in a small chart."""

QUANTITIES = {
    "κ(G)": ("gradient", "condition"),
    "κ(M)": ("momentum", "condition"),
    "nuclear norm of G": ("gradient", "nuclear_norm"),
    "nuclear norm of M": ("momentum", "nuclear_norm"),
    "stable rank of G": ("gradient", "stable_rank"),
    "stable rank of M": ("momentum", "stable_rank"),
    "residual": ("update", "residual"),
    "cosine": ("update", "cosine"),
}
POLAR = {
    "nuclear_norm": "nuclear norm",
    "condition": "condition number",
    "residual": "residual",
    "seconds": "seconds in the oracle",
}


def charts(runs: list[RunRecords], budget: int = 40_000) -> dict[str, Any]:
    """Everything that is drawn. ``budget``: most values of all diagnosed matrices; a fifth of it for other groups."""
    return {
        "runs": [run_entry(run) for run in runs],
        "groups": {
            name: kept
            for name, found in (
                ("loss", loss_charts(runs, budget)),
                ("optimizer", optimizer_charts(runs, budget)),
                ("speed", speed_charts(runs, budget)),
                ("polar", polar_charts(runs, budget)),
            )
            if (kept := [chart for chart in found if chart["series"]])
        },
        "matrices": [matrices(run, budget // len(runs)) for run in runs],
    }


def run_entry(run: RunRecords) -> dict[str, Any]:
    steps, seconds = run.clock()
    at, elapsed, _, _ = stretches(steps, seconds, NARROW)
    return {
        "label": run.label,
        "tokensPerStep": run.tokens_per_step,
        "bigram": run.bigram,
        "clock": {"s": short(at), "t": short(elapsed)},
        "skips": short(run.skips()[:NARROW]),
    }


def chart(
    identifier: str, title: str, unit: str, series: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """``more``: ``log`` and ``zero`` (of the y axis), ``large``, ``smooth``, ``marks``, ``x`` (step, tokens or time)."""
    return {"id": identifier, "title": title, "unit": unit, "series": series, **more}


def series(
    runs: list[RunRecords], *path: str, budget: int, wide: bool = False, **more: Any
) -> list[dict[str, Any]]:
    """One series of each run that has it."""
    points = max(40, min(WIDE if wide else NARROW, budget // 10 // max(1, len(runs))))
    found = []
    for number, run in enumerate(runs):
        steps, values = run.curve(*path)
        if steps.size:
            s, y, low, high = stretches(steps, values, points)
            curve = {"run": number, "s": short(s), "y": short(y)} | more
            if steps.size > points:
                curve |= {"lo": short(low), "hi": short(high)}
            found.append(curve)
    return found


def loss_charts(runs: list[RunRecords], budget: int) -> list[dict[str, Any]]:
    """Training and validation by step and by wall time, then each validation set on its own."""
    training = series(runs, "loss", budget=budget, wide=True, name="training", smooth=True)
    held_out = series(runs, "validation_loss", budget=budget, name="validation", dots=True)
    both = training + held_out
    timed = [curve for curve in both if runs[curve["run"]].clock()[0].size]
    found = [
        chart("loss", "Loss", "nats per token", both, large=True, marks=True, bigram=True, x="step"),
        chart("loss-time", "Loss by time", "nats per token", timed, large=True, bigram=True, x="time"),
    ]
    for name in every_name(runs, "validation"):
        curves = series(runs, "validation", name, "loss", budget=budget, name=printable(name), dots=True)
        found.append(chart(f"validation-{name}", f"Validation: {printable(name)}", "nats per token", curves))
    answers = series(runs, "hellaswag", "acc_norm", budget=budget, name="HellaSwag", dots=True)
    return [*found, chart("hellaswag", "HellaSwag", "share right, by likelihood per character", answers)]


def optimizer_charts(runs: list[RunRecords], budget: int) -> list[dict[str, Any]]:
    norm = series(runs, "grad_norm", budget=budget, name="norm", smooth=True)
    rates = [
        chart(
            f"lr-{role}",
            f"Learning rate, {printable(role)}",
            "",
            series(runs, "lr", role, budget=budget // 4, name=printable(role)),
            zero=True,
        )
        for role in every_name(runs, "lr")
    ]
    return [
        chart("norm", "Gradient norm, before clipping", "", norm, log=True, marks=True),
        *(one_chart("lr", "Learning rates", rates) if len(runs) == 1 else rates),
    ]


def one_chart(identifier: str, title: str, parts: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """Merges several charts of one run into one with named curves; identical curves are merged."""
    curves: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(parts):
        for curve in part["series"]:
            same = curves.get(key := f"{curve['s']}{curve['y']}")
            if same is None:
                curves[key] = curve | {"colour": number}
            else:
                same["name"] += f", {curve['name']}"
    named = list(curves.values())
    return [chart(identifier, title, "", named, log=len(named) > 1, **more)] if named else []


def speed_charts(runs: list[RunRecords], budget: int) -> list[dict[str, Any]]:
    rows = (
        ("tokens_per_second", "Tokens per second", "all ranks, training only"),
        ("mfu", "Model FLOPs utilization", "share of the dense bf16 peak"),
        ("memory_gib", "Peak memory", "GiB, rank 0, since its last start"),
    )
    return [
        chart(name, title, unit, series(runs, name, budget=budget, name=title.lower()), zero=True)
        for name, title, unit in rows
    ]


def polar_charts(runs: list[RunRecords], budget: int) -> list[dict[str, Any]]:
    """The oracle's metrics: for one run a chart per metric with a curve per role, for several a chart per metric and role."""
    roles = every_name(runs, "polar")
    found = []
    for figure, words in POLAR.items():
        parts = [
            chart(
                f"polar-{figure}-{role}",
                f"{printable(role)}: {words}",
                "",
                series(runs, "polar", role, figure, budget=budget // 5, name=printable(role)),
                log=figure != "seconds",
                zero=figure == "seconds",
            )
            for role in roles
        ]
        single = one_chart(f"polar-{figure}", words.capitalize(), parts)
        for one in single:
            one["log"] = figure != "seconds"
            one["zero"] = figure == "seconds"
        found += single if len(runs) == 1 else parts
    return found


def matrices(run: RunRecords, budget: int) -> list[dict[str, Any]]:
    """Steps and quantities of each diagnosed matrix; every matrix keeps a few columns, however many there are."""
    names = run.names("diagnostics")
    columns = max(6, min(120, budget // max(1, len(names) * len(QUANTITIES))))
    found = []
    for name in names:
        curves = {words: run.curve("diagnostics", name, *path) for words, path in QUANTITIES.items()}
        recorded = [steps for steps, _ in curves.values() if steps.size]
        if not recorded:
            continue
        steps = np.unique(np.concatenate(recorded))
        if steps.size > columns:
            steps = steps[np.linspace(0, steps.size - 1, columns).round().astype(int)]
        quantities = {}
        for words, (at, values) in curves.items():
            if at.size:
                known = dict(zip(at.tolist(), values.tolist(), strict=True))
                quantities[words] = [rounded(known.get(step)) for step in steps.tolist()]
        found.append({"name": printable(name), "s": short(steps), "q": quantities})
    return found


def every_name(runs: list[RunRecords], *prefix: str) -> list[str]:
    """The keys below a path in any run, in the order of the first."""
    return list(dict.fromkeys(name for run in runs for name in run.names(*prefix)))


def stretches(steps: Array, values: Array, points: int) -> tuple[Array, Array, Array, Array]:
    """(steps, means, lowest, highest) of at most ``points`` equal intervals; the last one ends at the last step."""
    if steps.size <= points:
        return steps, values, values, values
    parts = np.array_split(np.arange(steps.size), points)
    firsts = np.array([part[0] for part in parts])
    counts = np.array([part.size for part in parts])
    means = np.add.reduceat(values, firsts) / counts
    ends = steps[firsts + counts - 1]
    return ends, means, np.minimum.reduceat(values, firsts), np.maximum.reduceat(values, firsts)


def rounded(value: float | None) -> float | int | None:
    """Five significant digits, more than a screen shows."""
    if value is None or not math.isfinite(value):
        return None
    short_value = float(f"{value:.5g}")
    return int(short_value) if short_value == int(short_value) and abs(short_value) < 1e15 else short_value


def short(values: Array) -> list[float | int | None]:
    """Steps keep all their digits: five would not suffice beyond 99,999."""
    whole = (
        values.size > 0 and bool((values == np.round(values)).all()) and bool((np.abs(values) < 2**53).all())
    )
    return [int(v) if whole else rounded(v) for v in values.tolist()]
