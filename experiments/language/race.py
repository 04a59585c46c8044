"""A race on equal terms: the same model, text, batch and schedule, and for each optimizer the same number of trial runs.

Each first sweeps two learning rates (hidden matrices; embedding and head) on seed 0: a coarse grid, then the neighbours of
its best. The best rates then run at several lengths, each with its whole schedule, on several seeds: what counts is how
short a complete run may be that still ends at AdamW's mean final loss.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.language.runner import SMALL, Curves, Job, run_all

LENGTHS = (0.5, 0.7, 1.0)
TARGET = "AdamW"


@dataclass(frozen=True)
class Racer:
    """An optimizer and its coarse grid: rates of the hidden matrices, rates of embedding and head."""

    name: str
    rule: dict[str, Any]
    hidden: tuple[float, ...]
    ends: tuple[float, ...]

    def rates(self, hidden: float, ends: float) -> dict[str, Any]:
        """Overrides with these learning rates."""
        return self.rule | {
            "optimizer.hidden.lr": hidden,
            "optimizer.embed.lr": ends,
            "optimizer.head.lr": ends,
        }


def _rule(role: str, **fields: Any) -> dict[str, Any]:
    return {f"optimizer.{role}.{key}": value for key, value in fields.items()}


def _polar(role: str, beta: float, **more: Any) -> dict[str, Any]:
    return _rule(
        role, algorithm="polar", momentum="momentum_first", beta=beta, nesterov=False, oracle="auto", **more
    )


_ADAMW_ENDS = _rule("embed", algorithm="adamw", betas=[0.9, 0.95]) | _rule(
    "head", algorithm="adamw", betas=[0.9, 0.95]
)
_POLAR_ENDS = _polar("embed", 0.5, scale="nuclear") | _polar("head", 0.5, scale="nuclear")
_MUON = _rule("hidden", oracle_dtype="float32")
RACERS = (
    Racer(
        TARGET,
        _rule("hidden", algorithm="adamw", betas=[0.9, 0.95], nesterov=False) | _ADAMW_ENDS,
        (2e-3, 6e-3, 18e-3),
        (2e-3, 8e-3, 32e-3),
    ),
    Racer("Muon + AdamW", _MUON | _ADAMW_ENDS, (0.01, 0.03, 0.09), (2e-3, 8e-3, 32e-3)),
    Racer("Muon + PolarSGDM", _MUON | _POLAR_ENDS, (0.01, 0.03, 0.09), (0.1, 0.4, 1.6)),
    Racer(
        "PolarGrad throughout",
        _polar("hidden", 0.95, scale="nuclear", oracle_dtype=None) | _POLAR_ENDS,
        (0.02, 0.1, 0.5),
        (0.1, 0.4, 1.6),
    ),
    Racer(
        "Homogenized throughout",
        _polar("hidden", 0.95, scale="muon", spectrum="homogenized", oracle_dtype=None) | _POLAR_ENDS,
        (0.01, 0.03, 0.09),
        (0.1, 0.4, 1.6),
    ),
)
COMMON: dict[str, Any] = {
    "model.layers": 2,
    "optimizer.scalar.lr": 3e-3,
    "trainer.schedule.kind": "linear",
    "trainer.schedule.decay_fraction": 0.5,
    "trainer.evaluation.every": 0,
    "trainer.diagnostics.every": 0,
}


def job(racer: Racer, rates: tuple[float, float], steps: int, seed: int, out: Path) -> Job:
    """One training of a racer."""
    name = f"{racer.name}/{rates[0]:g}-{rates[1]:g}/{steps}-{seed}".replace(" ", "-")
    length = {"trainer.steps": steps, "trainer.schedule.warmup_steps": steps // 20, "trainer.seed": seed}
    return Job.of("quickstart", out / "race" / name, SMALL, COMMON, racer.rates(*rates), length)


def run(
    out: Path, seeds: list[int], steps: int, workers: int, names: list[str] | None = None
) -> dict[str, Any]:
    """Sweeps and races; returns rates, losses of every run and steps to AdamW's loss as JSON-able figures."""
    racers = [r for r in RACERS if names is None or r.name in names or r.name == TARGET]
    tried = _sweep(racers, out, steps, workers)
    best = {r.name: min(tried[r.name], key=lambda rates: tried[r.name][rates]) for r in racers}
    lengths = [max(20, round(share * steps)) for share in LENGTHS]
    jobs = {
        (r.name, length, seed): job(r, best[r.name], length, seed, out)
        for r in racers
        for length in lengths
        for seed in seeds
    }
    found = run_all(jobs.values(), workers, "race")
    finals = {key: found[its_job].final for key, its_job in jobs.items()}
    target = statistics.fmean(finals[TARGET, lengths[-1], seed] for seed in seeds)
    report: dict[str, Any] = {"target": target, "steps": steps, "seeds": seeds, "racers": {}}
    for r in racers:
        curves = {seed: [(length, finals[r.name, length, seed]) for length in lengths] for seed in seeds}
        report["racers"][r.name] = {
            "best_rates": best[r.name],
            "trials": [[*rates, loss] for rates, loss in sorted(tried[r.name].items())],
            "losses": {length: [finals[r.name, length, seed] for seed in seeds] for length in lengths},
            "steps_to_target": [steps_to(target, curves[seed]) for seed in seeds],
        }
    return report


def _sweep(
    racers: list[Racer], out: Path, steps: int, workers: int
) -> dict[str, dict[tuple[float, float], float]]:
    """Final loss of every pair of rates that was tried on seed 0: the grid, then four neighbours of its best."""
    tried: dict[str, dict[tuple[float, float], float]] = {r.name: {} for r in racers}
    grid = {r.name: [(h, e) for h in r.hidden for e in r.ends] for r in racers}
    for stage in ("coarse sweep", "fine sweep"):
        jobs = {(r.name, rates): job(r, rates, steps, 0, out) for r in racers for rates in grid[r.name]}
        found: dict[Job, Curves] = run_all(jobs.values(), workers, stage)
        for (name, rates), its_job in jobs.items():
            tried[name][rates] = found[its_job].final
        for r in racers:
            h, e = min(tried[r.name], key=lambda rates, losses=tried[r.name]: losses[rates])  # type: ignore[misc]
            dh, de = math.sqrt(r.hidden[1] / r.hidden[0]), math.sqrt(r.ends[1] / r.ends[0])
            grid[r.name] = [(h * dh, e), (h / dh, e), (h, e * de), (h, e / de)]
    return tried


def steps_to(target: float, curve: list[tuple[int, float]]) -> float | None:
    """Length of the complete run that ends at ``target``, between measured (length, final loss) pairs on a logarithmic axis.

    None when the longest ends above the target; the shortest length where that one is already below. Diverged runs are
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
    steps = report["steps"]
    lines = [f"AdamW's mean final loss after {steps} steps: {report['target']:.4f} nats per token", ""]
    lines.append(
        f"{'optimizer':<24}{'hidden lr':>10}{'ends lr':>9}{'final loss (range)':>28}{'steps to target':>18}{'ratio':>22}"
    )
    for name, found in report["racers"].items():
        losses = found["losses"][steps] if steps in found["losses"] else found["losses"][str(steps)]
        reached = [s for s in found["steps_to_target"] if s is not None]
        whole = len(reached) == len(found["steps_to_target"])
        mean = (
            f"{statistics.fmean(reached):.0f}"
            if whole
            else f"{len(reached)} of {len(found['steps_to_target'])}"
        )
        ratio = (
            f"{statistics.fmean(reached) / steps:.2f} ({min(reached) / steps:.2f} to {max(reached) / steps:.2f})"
            if whole
            else "not reached"
        )
        span = f"{statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        lines.append(
            f"{name:<24}{found['best_rates'][0]:>10.3g}{found['best_rates'][1]:>9.3g}{span:>28}{mean:>18}{ratio:>22}"
        )
    return "\n".join(lines)
