"""Runs many small trainings through `train.py`'s own code, a few at a time, and reads their curves.

A complete run with the same configuration file and overrides is not repeated, and an interrupted one is continued. A run
that another experiment left in the same folder is removed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.workers import worker_pool
from polargrad_dist.errors import PolarGradError
from polargrad_dist.trainer.metrics import record_in

STARTED, DONE = "started.json", "done.json"
DIVERGED = "diverged"
ROOT = Path(__file__).resolve().parents[2]

# Changes that make a full-size configuration small; everything else is kept.
SMALL: dict[str, Any] = {
    "data.source": "builtin",
    "data.tokenizer.name": "bpe",
    "data.tokenizer.vocab_size": 1024,
    "data.validation_fraction": 0.02,
    "data.validation_tokens": 32_768,
    "model.vocab_size": 1024,
    "model.width": 64,
    "model.heads": 4,
    "trainer.sequence_length": 128,
    "trainer.global_batch": 16,
    "trainer.micro_batch": 16,
    "trainer.precision": "fp32",
    "trainer.compile": False,
    "trainer.device": "cpu",
    "trainer.logging.every": 5,
    "trainer.logging.stats_every": 0,
    "trainer.logging.progress": "off",
    "trainer.diagnostics.hidden": 0,
    "trainer.checkpoint.every": 0,
}


@dataclass(frozen=True)
class Job:
    """One run: a configuration file with overrides by dotted keys, as on the command line."""

    config: str
    overrides: tuple[tuple[str, str], ...]
    folder: Path

    @classmethod
    def of(cls, config: str, folder: Path, *overrides: Mapping[str, Any]) -> Job:
        """Builds a job; later overrides take precedence."""
        merged: dict[str, Any] = {}
        for some in overrides:
            merged |= some
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in merged.items()}
        return cls(config, tuple(sorted(texts.items())), folder)

    @property
    def arguments(self) -> list[str]:
        """The arguments for train.py's command line."""
        out = [
            "--config",
            str(ROOT / "configs" / f"{self.config}.yaml"),
            "--trainer.run_dir",
            str(self.folder),
        ]
        for key, value in self.overrides:
            out += [f"--{key}", value]
        return out

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies this run, wherever the repository and the folder are."""
        text = (ROOT / "configs" / f"{self.config}.yaml").read_bytes()
        return {"configuration": hashlib.sha256(text).hexdigest(), "overrides": dict(self.overrides)}


@dataclass
class Curves:
    """A run's logged (step, value) pairs; ``diagnostics`` by parameter, part and figure. Cut short if it diverged."""

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    diagnostics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    diverged: bool = False

    @property
    def final(self) -> float:
        """The last validation loss in nats per token; infinite for a run that diverged."""
        last = self.validation[-1][1] if self.validation and not self.diverged else math.inf
        return last if math.isfinite(last) else math.inf

    @classmethod
    def read(cls, folder: Path) -> Curves:
        """The curves in a run directory."""
        ended = (_read(folder / DONE) or {}).get("ended")
        curves = cls(diverged=str(ended).startswith(DIVERGED))
        path = folder / "metrics.jsonl"
        for line in path.read_bytes().splitlines() if path.exists() else ():
            if (record := record_in(line)) is None:
                continue
            step = record["step"]
            for name, curve in (("loss", curves.train), ("validation_loss", curves.validation)):
                if name in record:
                    curve.append((step, math.inf if record[name] is None else record[name]))
            for parameter, parts in record.get("diagnostics", {}).items():
                for part, figures in parts.items():
                    for figure, value in figures.items():
                        if value is not None:
                            key = f"{parameter}/{part}/{figure}"
                            curves.diagnostics.setdefault(key, []).append((step, value))
        return curves


def run_all(jobs: Iterable[Job], workers: int, description: str) -> dict[Job, Curves]:
    """Trains all jobs that are not complete, ``workers`` at a time with one thread each, and returns all curves.

    Raises the first ``PolarGradError`` about a configuration. A run that diverges is a result, not an error.
    """
    from tqdm import tqdm

    jobs = list(dict.fromkeys(jobs))
    waiting = [job for job in jobs if _written(job, DONE) != job.identity]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc=description, unit="run")
    with bar, worker_pool(workers) as pool:
        # The first runs alone: it prepares the data that all share.
        for some in (waiting[:1], waiting[1:]):
            for finished in as_completed([pool.submit(_train, job) for job in some]):
                finished.result()
                bar.update()
    return {job: Curves.read(job.folder) for job in jobs}


def _written(job: Job, name: str) -> dict[str, Any] | None:
    """The identity with which a folder's run was started or finished."""
    return (_read(job.folder / name) or {}).get("identity")


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _train(job: Job) -> None:
    import torch

    from polargrad_dist.trainer import TrainingError
    from train import parse_run, pretrain

    torch.set_num_threads(1)
    os.chdir(ROOT)
    ended = "finished"
    config, configuration, _ = parse_run(job.arguments)
    if job.folder.exists() and _written(job, STARTED) != job.identity:
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / STARTED).write_text(json.dumps({"identity": job.identity}))
    try:
        with (
            (job.folder / "output.txt").open("a") as output,
            redirect_stdout(output),
            redirect_stderr(output),
        ):
            outcome = pretrain(config, configuration)
    except TrainingError as error:
        ended = f"{DIVERGED}: {error}"
    else:
        if outcome.exit_code:
            raise PolarGradError(
                f"{job.folder} was stopped at step {outcome.step}: run the same command again to continue"
            )
    (job.folder / DONE).write_text(json.dumps({"ended": ended, "identity": job.identity}))


def workers_here() -> int:
    """The number of cores: one run per core."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def spread(values: Sequence[float]) -> str:
    """The mean and range of a few values, as text."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < len(values):
        return f"{len(values) - len(finite)} of {len(values)} diverged"
    return f"{sum(finite) / len(finite):.4f} ({min(finite):.4f} to {max(finite):.4f})"
