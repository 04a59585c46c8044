"""Sections 5.4, 5.5 and E.1 of Lau, Long, Su (2025), scaled down: same configurations, models and rules, smaller sizes.

If it matters, two sets of learning rates are run: the printed ones, and some that suit the small models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.language.figures import draw
from experiments.language.runner import SMALL, Curves, Job, run_all


@dataclass(frozen=True)
class Entry:
    """One line of a figure: a full-size configuration and changes to it."""

    name: str
    config: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One section: its entries, common sizes, and the figures of the paper that its picture corresponds to."""

    title: str
    figures: str
    sizes: dict[str, Any]
    entries: tuple[Entry, ...]
    embed: str
    head: str

    def jobs(self, name: str, out: Path, seeds: list[int], steps: int) -> dict[tuple[str, int], Job]:
        """The run of each (entry, seed)."""
        length = {
            "trainer.steps": steps,
            "trainer.evaluation.every": max(1, steps // 10),
            "trainer.diagnostics.every": max(1, steps // 40),
        }
        return {
            (entry.name, seed): Job.of(
                entry.config,
                out / name / entry.name.replace(" ", "-") / f"seed-{seed}",
                SMALL,
                self.sizes,
                length,
                entry.changes,
                {"trainer.seed": seed},
            )
            for entry in self.entries
            for seed in seeds
        }


# From a sweep of two rates at these sizes, coarser than the race's of today.
QWEN_ADAMW = {"optimizer.hidden.lr": 6e-3, "optimizer.embed.lr": 0.03, "optimizer.scalar.lr": 3e-3}
QWEN_MUON = {"optimizer.hidden.lr": 0.03, "optimizer.hidden.scale": "muon", "optimizer.scalar.lr": 3e-3}


def _qwen() -> Experiment:
    adamw, muon_adamw, polar = "qwen2.5-adamw", "qwen2.5-muon-adamw", "qwen2.5-muon-polarsgdm"
    warmup = {"trainer.schedule.warmup_steps": 10}
    embed = {"optimizer.embed.lr": 1.0}
    first = {"optimizer.embed.momentum": "polar_first"}
    return Experiment(
        "Qwen2.5-style (section 5.4)",
        "figures 5, D.12, D.13, D.14",
        {"model.layers": 2},
        (
            Entry("AdamW printed", adamw, warmup),
            Entry("AdamW", adamw, warmup | QWEN_ADAMW),
            Entry("Muon + AdamW printed", muon_adamw),
            Entry("Muon + AdamW", muon_adamw, QWEN_MUON | {"optimizer.embed.lr": 0.03}),
            Entry("Muon + PolarSGDM printed", polar),
            Entry("Muon + PolarSGDM", polar, QWEN_MUON | embed),
            Entry("Muon + PolarSGDM polar-first", polar, QWEN_MUON | embed | first),
        ),
        "qwen.model.embed_tokens.weight",
        "qwen.lm_head.weight",
    )


# From one run each at a few rates, seed 0. The printed rates, for full-size gradients, are at most a tenth of these.
GPT2_ADAM = {"optimizer.head.lr": 0.03}
GPT2_POLAR = {
    "small": {"optimizer.embed.lr": 50.0, "optimizer.head.lr": 0.4},
    "medium": {"optimizer.embed.lr": 25.0, "optimizer.head.lr": 1.6},
}


def _gpt2(size: str, figures: str, section: str) -> Experiment:
    polar, adam = f"gpt2-{size}-fineweb", f"gpt2-{size}-fineweb-adam"
    first = {f"optimizer.{role}.momentum": "polar_first" for role in ("embed", "value_embed", "head")}
    return Experiment(
        f"GPT-2 {size} (section {section})",
        figures,
        {"model.layers": 4, "trainer.schedule.momentum_warmup_steps": 20},
        (
            Entry("Muon + Adam printed", adam),
            Entry("Muon + Adam", adam, GPT2_ADAM),
            Entry("Muon + PolarSGDM printed", polar),
            Entry("Muon + PolarSGDM", polar, GPT2_POLAR[size]),
            Entry("Muon + PolarSGDM polar-first printed", polar, first),
            Entry("Muon + PolarSGDM polar-first", polar, GPT2_POLAR[size] | first),
        ),
        "embed.weight",
        "head.weight",
    )


EXPERIMENTS = {
    "qwen2.5": _qwen(),
    "gpt2-small": _gpt2("small", "figures 6 and 7", "5.5"),
    "gpt2-medium": _gpt2("medium", "figures E.1 and E.2", "E.1"),
}


def run(names: list[str], out: Path, seeds: list[int], steps: int, workers: int) -> dict[str, Any]:
    """Trains, draws one picture per experiment into ``out``, and returns the final losses, JSON-able."""
    report: dict[str, Any] = {}
    for name in names:
        experiment = EXPERIMENTS[name]
        jobs = experiment.jobs(name, out, seeds, steps)
        found = run_all(jobs.values(), workers, name)
        curves: dict[str, list[Curves]] = {
            entry.name: [found[jobs[entry.name, seed]] for seed in seeds] for entry in experiment.entries
        }
        title = f"{experiment.title}, scaled down: counterpart of {experiment.figures}"
        draw(title, experiment.embed, experiment.head, curves, out / f"{name}.png")
        report[name] = {
            entry: {
                "final_validation_loss": [run.final for run in runs],
                **{
                    f"{where}_{figure}": [_last(run, f"{parameter}/gradient/{figure}") for run in runs]
                    for where, parameter in (("embed", experiment.embed), ("head", experiment.head))
                    for figure in ("condition", "nuclear_norm")
                },
            }
            for entry, runs in curves.items()
        }
    return report


def _last(run: Curves, key: str) -> float | None:
    curve = run.diagnostics.get(key)
    return curve[-1][1] if curve else None
