"""How the best learning rates move with width, length, batch and vocabulary, for the default rules and for AdamW.

From one small training, one of the four is changed at a time. At each of these points the rate of the hidden matrices is
swept, then that of embedding and head, in factors of 2 around the start and further while the best is on an edge. The best
rate is the vertex of a parabola in log(rate) through the lowest point and its neighbours, so that it does not jump by 2.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.language.race import COMMON, RACERS, TARGET
from experiments.language.runner import SMALL, Job, run_all

RULES = {r.name: r for r in RACERS if r.name in (TARGET, "the default rules")}
# Where the sweeps begin: rates of the hidden matrices, and of embedding and head.
START = {TARGET: (6e-3, 0.032), "the default rules": (0.02, 1.0)}
FACTORS = (0.5, 1.0, 2.0)
FARTHEST = 2.0**5
SWEPT = ("hidden", "ends")


@dataclass(frozen=True)
class Setting:
    """A small training: width, steps, sequences of 128 tokens per step, and vocabulary."""

    width: int = 64
    steps: int = 160
    batch: int = 16
    vocabulary: int = 1024

    def __str__(self) -> str:
        return f"{self.width}-{self.steps}-{self.batch}-{self.vocabulary}"

    def job(self, rules: str, swept: str, factor: float, seed: int, out: Path) -> Job:
        """A training in which one of the two rates is multiplied."""
        racer, (hidden, ends) = RULES[rules], START[rules]
        hidden *= factor if swept == "hidden" else 1
        ends *= factor if swept == "ends" else 1
        sizes: dict[str, Any] = {
            "model.width": self.width,
            "model.heads": self.width // 16,
            "model.vocab_size": self.vocabulary,
            "data.tokenizer.vocab_size": self.vocabulary,
            "trainer.global_batch": self.batch,
            "trainer.steps": self.steps,
            "trainer.schedule.warmup_steps": self.steps // 20,
            "trainer.seed": seed,
            "trainer.evaluation.every": 0,
        }
        where = f"{swept}-x{factor:g}" if factor != 1 else "start"
        folder = out / "rates" / rules.replace(" ", "-") / str(self) / f"{where}-{seed}"
        return Job.of("quickstart", folder, SMALL, COMMON, racer.at((hidden, ends, *racer.momenta)), sizes)


BASE = Setting()
POINTS = {
    "base": BASE,
    "width 128": replace(BASE, width=128),
    "640 steps": replace(BASE, steps=640),
    "batch 64": replace(BASE, batch=64),
    "vocabulary 4096": replace(BASE, vocabulary=4096),
}


def run(out: Path, names: list[str], seeds: list[int], workers: int) -> dict[str, Any]:
    """For each set of rules and each point: mean final losses by factor, and the best rate, of both rates. JSON-able."""
    report: dict[str, Any] = {"seeds": seeds, "rules": {}}
    for rules in names:
        report["rules"][rules] = {
            point: _swept(rules, setting, seeds, out, workers) for point, setting in POINTS.items()
        }
    return report


def _swept(rules: str, setting: Setting, seeds: list[int], out: Path, workers: int) -> dict[str, Any]:
    losses: dict[str, dict[float, float]] = {swept: {} for swept in SWEPT}
    wanted = {swept: list(FACTORS) for swept in SWEPT}
    while any(wanted.values()):
        jobs = {
            (swept, factor, seed): setting.job(rules, swept, factor, seed, out)
            for swept, factors in wanted.items()
            for factor in factors
            for seed in seeds
        }
        ended = run_all(jobs.values(), workers, f"{rules}, {setting}")
        for swept, factors in wanted.items():
            for factor in factors:
                finals = [ended[jobs[swept, factor, seed]].final for seed in seeds]
                losses[swept][factor] = statistics.fmean(finals)
        wanted = {swept: beyond(found) for swept, found in losses.items()}
    return {
        swept: {
            "losses": {f"{factor:g}": found[factor] for factor in sorted(found)},
            "best": START[rules][at] * vertex(found),
        }
        for at, (swept, found) in enumerate(losses.items())
    }


def beyond(found: dict[float, float]) -> list[float]:
    """The next factor to try where the best is on an edge, unless that is too far away."""
    best = min(found, key=lambda factor: found[factor])
    if not 1 / FARTHEST < best < FARTHEST:
        return []
    return [best / 2] * (best == min(found)) + [best * 2] * (best == max(found))


def vertex(found: dict[float, float]) -> float:
    """The factor at the lowest point of the parabola through the best of losses by factor, factors of 2 apart, and its
    neighbours, in log(factor); the best itself where a neighbour is missing or has diverged."""
    best = min(found, key=lambda factor: found[factor])
    left, right = (found.get(best * ratio, math.inf) for ratio in (0.5, 2.0))
    bend = left - 2 * found[best] + right
    if not math.isfinite(bend) or bend <= 0:
        return best
    return best * 2.0 ** ((left - right) / (2 * bend))


def table(report: dict[str, Any]) -> str:
    """For people: at every point the best rates, over those at the base, and the loss there."""
    lines = [f"{'rules':<20}{'point':<18}{'hidden':>10}{'of base':>9}{'ends':>10}{'of base':>9}{'loss':>9}"]
    for rules, points in report["rules"].items():
        for point, found in points.items():
            lowest = min(loss for swept in SWEPT for loss in found[swept]["losses"].values())
            columns = ""
            for swept in SWEPT:
                best = found[swept]["best"]
                columns += f"{best:>10.3g}{best / points['base'][swept]['best']:>9.2f}"
            lines.append(f"{rules:<20}{point:<18}{columns}{lowest:>9.4f}")
    return "\n".join(lines)
