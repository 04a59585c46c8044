"""A race on equal terms: the same model, text, batch and schedule, and for each optimizer the same number of trial runs.

At each width there is a sweep of short runs on two seeds: a grid of two learning rates (hidden matrices; embedding and head),
then further trials beyond the grid if the best pair is on its edge, else between its points; then momenta of both. A variant
of a racer starts at that racer's best point and tries two neighbouring rates, and further ones while the best is on an edge.
The best points run at both lengths, on three other seeds. Main racers also run shorter complete schedules, which tell how
long a run must be to reach AdamW's mean final loss.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.language.figures import draw_race
from experiments.language.runner import SMALL, Curves, Job, run_all

SHARES = (0.6, 0.8, 1.0)
# Trials of rates after the grid, and of momenta after their first four.
FURTHER = 4
TARGET = "AdamW"
SWEEP_SEEDS = (0, 1)
# Validations of a run at full length.
LOOKS = 16
# Rates of hidden matrices and of embedding and head, then the momenta of both.
Point = tuple[float, float, float, float]


@dataclass(frozen=True)
class Racer:
    """An optimizer and its grid: rates of the hidden matrices, rates of embedding and head; initial momenta.

    ``kin`` names the racer at whose best point a variant starts, with its hidden rate times ``factor``.
    """

    name: str
    rule: dict[str, Any]
    hidden: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()
    momenta: tuple[float, float] = (0.95, 0.5)
    adam: tuple[bool, bool] = (False, False)
    kin: str | None = None
    factor: float = 1.0

    def at(self, point: Point) -> dict[str, Any]:
        """Overrides with these rates and momenta."""
        hidden, ends, beta, ends_beta = point
        out = self.rule | {"optimizer.hidden.lr": hidden}
        out |= {f"optimizer.{role}.lr": ends for role in ("embed", "head")}
        for role, value, adam in (
            ("hidden", beta, self.adam[0]), ("embed", ends_beta, self.adam[1]), ("head", ends_beta, self.adam[1]),
        ):  # fmt: skip
            out |= {f"optimizer.{role}.betas": [value, 0.95]} if adam else {f"optimizer.{role}.beta": value}
        return out


def _rule(role: str, **fields: Any) -> dict[str, Any]:
    return {f"optimizer.{role}.{key}": value for key, value in fields.items()}


def _polar(role: str, **more: Any) -> dict[str, Any]:
    base = {"algorithm": "polar", "momentum": "momentum_first", "nesterov": False, "oracle": "auto"}
    return _rule(role, **(base | more))


_ADAMW_ENDS = _rule("embed", algorithm="adamw") | _rule("head", algorithm="adamw")
_POLAR_ENDS = _polar("embed", scale="nuclear") | _polar("head", scale="nuclear")
_RELATIVE_ENDS = _polar("embed", scale="nuclear_relative") | _polar("head", scale="nuclear_relative")
_MUON = _rule("hidden", oracle_dtype="float32")
_KIN: dict[str, Any] = {"kin": "Muon + PolarSGDM"}
RACERS = (
    Racer(TARGET, _rule("hidden", algorithm="adamw", nesterov=False) | _ADAMW_ENDS, (2e-3, 6e-3, 18e-3),
          (2e-3, 8e-3, 32e-3), (0.9, 0.9), (True, True)),
    Racer("Muon + AdamW", _MUON | _ADAMW_ENDS, (0.01, 0.03, 0.09), (2e-3, 8e-3, 32e-3), (0.95, 0.9), (False, True)),
    Racer("Muon + PolarSGDM", _MUON | _POLAR_ENDS, (0.01, 0.03, 0.09), (0.1, 0.4, 1.6)),
    Racer("the default rules", _MUON | _RELATIVE_ENDS, (0.01, 0.03, 0.09), (0.25, 1.0, 4.0)),
    Racer("SOAP-Muon", _MUON | _rule("hidden", precondition="soap", normalize="rows") | _POLAR_ENDS, **_KIN),
    Racer("NorMuon", _MUON | _rule("hidden", normalize="rows") | _POLAR_ENDS, **_KIN),
    # A hidden matrix of 64 columns starts with a norm of about 5, an update of Muon's has one of about 8.
    Racer("hyperball", _MUON | _rule("hidden", control="hyperball", scale="none") | _POLAR_ENDS, factor=1.6, **_KIN),
    # The sum of all hidden matrices' nuclear norms is about 10.
    Racer("nuclear_shared", _MUON | _rule("hidden", scale="nuclear_shared") | _POLAR_ENDS, factor=0.1, **_KIN),
    Racer("EMA-Nesterov", _MUON | _POLAR_ENDS | {"trainer.lookahead.beta": 0.3, "trainer.lookahead.decay": 0.9}, **_KIN),
)  # fmt: skip
COMMON: dict[str, Any] = {
    "model.layers": 2,
    "optimizer.scalar.lr": 3e-3,
    "trainer.schedule.kind": "linear",
    "trainer.schedule.decay_fraction": 0.5,
    "trainer.diagnostics.every": 0,
}


def job(
    racer: Racer, point: Point, width: int, steps: int, seed: int, out: Path, validate_every: int = 0
) -> Job:
    """One run of a racer; validated every so many steps, and at its end."""
    where = "-".join(f"{x:.4g}" for x in point)
    name = f"{width}/{racer.name}/{where}/{steps}-{seed}".replace(" ", "-")
    sizes = {"model.width": width, "model.heads": width // 16}
    length = {"trainer.steps": steps, "trainer.schedule.warmup_steps": steps // 20, "trainer.seed": seed}
    length["trainer.evaluation.every"] = validate_every
    if "trainer.lookahead.beta" in racer.rule:
        length |= {"trainer.lookahead.start": steps // 10, "trainer.lookahead.end": steps * 3 // 4}
    return Job.of("quickstart", out / "race" / name, SMALL, COMMON, sizes, racer.at(point), length)


@dataclass
class Sweep:
    """One racer's trials: mean final losses by point, and the next point to try."""

    racer: Racer
    tried: dict[Point, float] = field(default_factory=dict)

    @property
    def best(self) -> Point:
        return min(self.tried, key=lambda point: self.tried[point])

    def grid(self) -> list[Point]:
        """The first nine points."""
        return [(h, e, *self.racer.momenta) for h in self.racer.hidden for e in self.racer.ends]

    def edges(self, axes: tuple[int, ...]) -> list[Point]:
        """Points beyond the best one, along each of these axes on whose edge it is."""
        best, out = self.best, []
        for axis in axes:
            values = sorted({p[axis] for p in self.tried})
            if best[axis] in (values[0], values[-1]):
                out.append(moved(best, axis, up=best[axis] == values[-1], ratio=self._ratio(axis)))
        return [point for point in out if point not in self.tried]

    @property
    def on_an_edge(self) -> bool:
        """Whether the best point has the largest or smallest value tried on some axis; nothing is below momentum 0."""
        axes = (0, 1, 2, 3) if self.racer.kin is None else (0,)
        values = [sorted({point[axis] for point in self.tried}) for axis in axes]
        return any(
            len(v) > 1 and (self.best[axis] == v[-1] or (self.best[axis] == v[0] > 0))
            for axis, v in zip(axes, values, strict=True)
        )

    def _ratio(self, axis: int) -> float:
        # A variant has no grid
        if axis > 1 or self.racer.kin is not None:
            return 2.0
        values = self.racer.hidden if axis == 0 else self.racer.ends
        return values[1] / values[0]

    def further(self, axes: tuple[int, ...]) -> Point:
        """One more trial: beyond an edge, else half a step from the best on the side with fewer trials."""
        if edges := self.edges(axes):
            return edges[0]
        for shrink in itertools.count(1):
            for axis, up in itertools.product(axes, (True, False)):
                point = moved(self.best, axis, up, self._ratio(axis) ** (0.5**shrink))
                if point not in self.tried:
                    return point
        raise AssertionError


def moved(point: Point, axis: int, up: bool, ratio: float) -> Point:
    """A point with a rate times ``ratio``, or a momentum's distance from 1 divided by it, or the inverse; rounded."""
    value = point[axis]
    if axis < 2:
        value = value * ratio if up else value / ratio
    else:
        value = 1 - (1 - value) / ratio if up else max(0.0, 1 - (1 - value) * ratio)
    out = list(point)
    out[axis] = float(f"{value:.4g}")
    return tuple(out)  # type: ignore[return-value]


Trained = Callable[[dict[Any, Job], str], dict[Any, Curves]]


def sweep(racers: list[Racer], width: int, steps: int, out: Path, trained: Trained) -> dict[str, Sweep]:
    """Sweeps with equal budgets: 9 + `FURTHER` pairs of rates, 4 + `FURTHER` pairs of momenta, each on two seeds.

    Variants have 3 rates of hidden matrices, and up to `FURTHER` more while the best is on an edge.
    """
    found = {r.name: Sweep(r) for r in racers if r.kin is None}
    others = {r.name: r for r in racers if r.kin is not None}

    def trial(points: dict[str, list[Point]], stage: str) -> None:
        jobs = {
            (name, point, seed): job(found[name].racer, point, width, steps, seed, out)
            for name, some in points.items()
            for point in some
            for seed in SWEEP_SEEDS
        }
        ended = trained(jobs, f"width {width}, {stage}")
        for name, some in points.items():
            for point in some:
                found[name].tried[point] = statistics.fmean(
                    ended[name, point, seed].final for seed in SWEEP_SEEDS
                )

    trial({name: s.grid() for name, s in found.items()}, "grid")
    for number in range(FURTHER):
        trial({name: [s.further((0, 1))] for name, s in found.items()}, f"rates {number + 1}")
    best = {name: s.best for name, s in found.items()}
    trial(
        {n: [moved(p, axis, up, 2.0) for axis in (2, 3) for up in (True, False)] for n, p in best.items()},
        "momenta",
    )
    for number in range(FURTHER):
        trial({name: [s.further((2, 3))] for name, s in found.items()}, f"momenta {number + 1}")
    starts = {}
    for name, r in others.items():
        hidden, *rest = found[r.kin].best  # type: ignore[index]
        starts[name] = [(float(f"{hidden * r.factor * x:.4g}"), *rest) for x in (0.5, 1.0, 2.0)]
        found[name] = Sweep(r)
    trial(starts, "kin")  # type: ignore[arg-type]
    for number in range(FURTHER):
        trial({name: found[name].edges((0,)) for name in starts}, f"kin {number + 1}")
    return found


def run(
    out: Path,
    seeds: list[int],
    steps: int,
    workers: int,
    names: list[str] | None = None,
    widths: tuple[int, ...] = (64, 128),
    lengths: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Sweeps at ``steps`` and races at every length and width; JSON-able points, curves, losses, steps to AdamW's loss.

    Draws each race's validation losses into ``out``. Finished runs are not repeated, so the same command continues after an
    interruption.
    """

    def trained(jobs: dict[Any, Job], stage: str) -> dict[Any, Curves]:
        ended = run_all(jobs.values(), workers, stage)
        return {key: ended[its_job] for key, its_job in jobs.items()}

    wanted = {TARGET, *(names or [r.name for r in RACERS])}
    wanted |= {r.kin for r in RACERS if r.name in wanted and r.kin is not None}
    racers = [r for r in RACERS if r.name in wanted]
    report: dict[str, Any] = {"steps": steps, "seeds": seeds, "races": {}}
    for width in widths:
        swept = sweep(racers, width, steps, out, trained)
        for length in lengths or (steps, 4 * steps):
            race = judge(swept, width, length, seeds, out, trained)
            report["races"][f"width {width}, {length} steps"] = race
            curves = {name: found["curves"] for name, found in race["racers"].items()}
            draw_race(f"width {width}, {length} steps", curves, out / f"race-{width}-{length}.svg")
    return report


def judge(
    swept: dict[str, Sweep], width: int, length: int, seeds: list[int], out: Path, trained: Trained
) -> dict[str, Any]:
    """The results of the best points on other seeds, at one width and length."""
    points = {name: s.best for name, s in swept.items()}
    shorter = {
        name: [length]
        if s.racer.kin or name == TARGET
        else sorted({max(20, round(x * length)) for x in SHARES})
        for name, s in swept.items()
    }
    jobs = {
        (name, steps, seed): job(
            s.racer, points[name], width, steps, seed, out, length // LOOKS if steps == length else 0
        )
        for name, s in swept.items()
        for steps in shorter[name]
        for seed in seeds
    }
    curves = trained(jobs, f"width {width}, {length} steps")
    finals = {key: found.final for key, found in curves.items()}
    target = statistics.fmean(finals[TARGET, length, seed] for seed in seeds)
    racers = {}
    for name, s in swept.items():
        ends = [[(steps, finals[name, steps, seed]) for steps in shorter[name]] for seed in seeds]
        alone = name == TARGET or s.racer.kin is not None
        racers[name] = {
            "point": points[name],
            "on_an_edge": s.on_an_edge,
            "trials": [[*point, loss] for point, loss in sorted(s.tried.items())],
            "losses": [finals[name, length, seed] for seed in seeds],
            "curves": [curves[name, length, seed].validation for seed in seeds],
            "steps_to_target": None if alone else [steps_to(target, some) for some in ends],
        }
    return {"target": target, "length": length, "racers": racers}


def steps_to(target: float, curve: list[tuple[int, float]]) -> float | None:
    """The length of a complete run that ends at ``target``, interpolated between (length, final loss) pairs, log scale.

    None if the longest run ends above the target; the shortest length if that run already ends below it. Diverged runs are
    left out.
    """
    curve = sorted(point for point in curve if math.isfinite(point[1]))
    if not curve:
        return None
    if curve[0][1] <= target:
        return float(curve[0][0])
    for (short, high), (long, low) in itertools.pairwise(curve):
        if low <= target < high:
            share = (high - target) / (high - low)
            return math.exp(math.log(short) + share * math.log(long / short))
    return None


def table(report: dict[str, Any]) -> str:
    """For people."""
    lines = []
    for title, race in report["races"].items():
        lines += [f"{title}: AdamW's mean final loss is {race['target']:.4f} nats per token"]
        lines += [f"{'optimizer':<24}{'rates; momenta':>34}{'final loss (range)':>28}{'of AdamW steps':>24}"]
        for name, found in race["racers"].items():
            h, e, b, eb = found["point"]
            losses, steps = found["losses"], found["steps_to_target"]
            ratio = "–"
            if steps is not None:
                shares = [s / race["length"] for s in steps if s is not None]
                whole = len(shares) == len(steps)
                ratio = (
                    f"{statistics.fmean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
                    if whole
                    else "not reached"
                )
            span = f"{statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
            lines.append(f"{name:<24}{f'{h:.3g}, {e:.3g}; {b:.3g}, {eb:.3g}':>34}{span:>28}{ratio:>24}")
        lines.append("")
    return "\n".join(lines)
