"""Checks that the default rules train: sweeps each role's learning rate around its default; the others stay unchanged.

It uses `OptimizerConfig()` on the built-in corpus, for models of both families at several widths. Each role has five rates, a
factor of 2 apart, and further ones while the best is the smallest or largest; three seeds. A default is good if its loss is
within `GOOD` of the best.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.language.runner import SMALL, Curves, Job, run_all
from polargrad_dist.optim import OptimizerConfig

# Nats per token.
GOOD = 0.05
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
FARTHEST = 2.0**6
FAMILIES = {
    "qwen2.5": ("hidden", "embed", "head", "scalar"),
    "gpt2-small": ("hidden", "embed", "value_embed", "head", "scalar"),
}
COMMON: dict[str, Any] = {
    "trainer.schedule.kind": "linear",
    "trainer.schedule.decay_fraction": 0.5,
    "trainer.evaluation.every": 0,
    "trainer.diagnostics.every": 0,
}


@dataclass(frozen=True)
class Place:
    """A model and a training length."""

    family: str
    width: int
    steps: int

    def job(self, role: str, factor: float, seed: int, out: Path) -> Job:
        """A run with one role's default rate times ``factor``."""
        config = OptimizerConfig()
        rules: dict[str, Any] = {}
        for each in FAMILIES[self.family]:
            fields = asdict(config.rule(each))
            rules |= {f"optimizer.{each}.{key}": value for key, value in fields.items() if key != "options"}
        rules[f"optimizer.{role}.lr"] *= factor
        sizes = {
            "model.architecture": self.family,
            "model.width": self.width,
            "model.heads": self.width // 16,
            "model.layers": 2 if self.family == "qwen2.5" else 4,
        }
        length = {
            "trainer.steps": self.steps,
            "trainer.schedule.warmup_steps": self.steps // 20,
            "trainer.seed": seed,
        }
        where = f"{role}-x{factor:g}" if factor != 1 else "default"
        folder = out / "defaults" / f"{self.family}-{self.width}-{self.steps}" / where / f"seed-{seed}"
        return Job.of("quickstart", folder, SMALL, COMMON, sizes, rules, length)


def run(
    out: Path, families: list[str], widths: list[int], steps: int, seeds: list[int], workers: int
) -> dict[str, Any]:
    """For every family, width and role, the mean final loss by factor of the default rate; JSON-able."""
    report: dict[str, Any] = {"steps": steps, "seeds": seeds, "places": []}
    for family in families:
        for width in widths:
            place = Place(family, width, steps)
            report["places"].append(
                {"family": family, "width": width, "roles": _swept(place, seeds, out, workers)}
            )
    return report


def _swept(place: Place, seeds: list[int], out: Path, workers: int) -> dict[str, dict[str, float]]:
    losses: dict[str, dict[float, float]] = {role: {} for role in FAMILIES[place.family]}
    wanted = {role: list(FACTORS) for role in losses}
    while wanted:
        jobs = {
            (role, factor, seed): place.job(role, factor, seed, out)
            for role, factors in wanted.items()
            for factor in factors
            for seed in seeds
        }
        ended: dict[Job, Curves] = run_all(jobs.values(), workers, f"{place.family}, width {place.width}")
        for role, factors in wanted.items():
            for factor in factors:
                losses[role][factor] = statistics.fmean(
                    ended[jobs[role, factor, seed]].final for seed in seeds
                )
        wanted = {role: [beyond] for role, found in losses.items() if (beyond := _beyond(found)) is not None}
    return {
        role: {f"{factor:g}": found[factor] for factor in sorted(found)} for role, found in losses.items()
    }


def _beyond(found: dict[float, float]) -> float | None:
    """The next factor to try if the best is on an edge, unless it would be too far away to matter."""
    best = min(found, key=lambda factor: found[factor])
    if best in (smallest := min(found), max(found)) and 1 / FARTHEST < best < FARTHEST:
        return best / 2 if best == smallest else best * 2
    return None


def table(report: dict[str, Any]) -> str:
    """A text table: for each model and role the default rate, its loss minus the best, and the best factor."""
    config = OptimizerConfig()
    lines = [f"{'model':<18}{'role':<14}{'default':>9}{'loss':>9}{'best':>9}{'at':>9}{'worse by':>10}"]
    for place in report["places"]:
        for role, found in place["roles"].items():
            best = min(found, key=lambda factor: found[factor])
            gap = found["1"] - found[best]
            model, lr = f"{place['family']}, {place['width']}", config.rule(role).lr
            verdict = "" if gap <= GOOD else "  more than allowed"
            lines.append(
                f"{model:<18}{role:<14}{lr:>9.4g}{found['1']:>9.4f}{found[best]:>9.4f}{lr * float(best):>9.4g}"
                f"{gap:>10.4f}{verdict}"
            )
    return "\n".join(lines)
