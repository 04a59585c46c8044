"""Reads a run directory: its configuration, its description and the series of ``metrics.jsonl``.

Only ``config.yaml``, ``run.json`` and ``metrics.jsonl`` are opened, so a report needs neither the data nor the memory of the
run, and works while the run is still going.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.header import read_facts
from polargrad_dist.trainer.metrics import record_in
from polargrad_dist.words import counted

Array = NDArray[np.float64]
UNSET = "not set"
# Keys in which the seeds of one experiment differ
SEEDED = ("trainer.seed", "trainer.run_dir", "trainer.logging.")
# Beyond it the difference of two values overflows, and no axis can be drawn
LARGEST = 1e300


@dataclass
class Series:
    """One quantity over the steps, in ascending order."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def cut(self, step: float) -> None:
        """Removes the values from ``step`` on."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()

    def add(self, step: float, value: float) -> None:
        self.cut(step)
        self.steps.append(step)
        self.values.append(value)


@dataclass
class Summary:
    """The summary of a run; None for what the run directory does not contain.

    ``final_loss`` and ``bits_per_byte`` are infinite if the last validation was not finite.
    """

    label: str
    model: str | None
    parameters: int | None
    step: int
    planned: int | None
    final_loss: float | None
    best_loss: float | None
    best_step: int | None
    bits_per_byte: float | None
    tokens: float | None
    tokens_per_second: float | None
    skipped: int | None
    seconds: float | None
    mfu: float | None
    bigram_bits_per_byte: float | None


@dataclass
class RunRecords:
    """A run's configuration and series, each under its path in a record, such as ``("lr", "hidden")``."""

    folder: Path
    label: str
    config: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    """The content of ``run.json``; empty for a run without one."""
    series: dict[tuple[str, ...], Series] = field(default_factory=dict)
    step: int = 0
    records: int = 0
    unreadable: int = 0
    samples: list[tuple[int, str, str]] = field(default_factory=list)
    """Step, prompt and continuation of each sample, in the order in which they were written."""
    not_finite: list[int] = field(default_factory=list)
    """Steps of validations that were not finite, ascending; no series holds them."""

    def curve(self, *path: str) -> tuple[Array, Array]:
        """(steps, values) of a series; empty if nothing finite was recorded."""
        found = self.series.get(path, Series())
        return np.array(found.steps, dtype=np.float64), np.array(found.values, dtype=np.float64)

    def names(self, *prefix: str) -> list[str]:
        """The keys below a path, in the order in which they were first recorded."""
        n = len(prefix)
        return list(dict.fromkeys(path[n] for path in self.series if len(path) > n and path[:n] == prefix))

    def setting(self, dotted: str) -> Any:
        """A configuration value; None if it is missing."""
        return within(self.config, dotted)

    def fact(self, dotted: str) -> Any:
        """A value of ``run.json``; None if it is missing."""
        return within(self.facts, dotted)

    @property
    def bigram(self) -> float | None:
        """The loss of a bigram model on the run's validation data in nats per token, where it was measured."""
        return finite(self.fact("bigram.loss"))

    @property
    def tokens_per_step(self) -> int | None:
        sizes = [self.setting(f"trainer.{name}") for name in ("global_batch", "sequence_length")]
        return sizes[0] * sizes[1] if all(type(size) is int for size in sizes) else None

    @property
    def diverged_at(self) -> int | None:
        """The step of the last validation if that was not finite, else None."""
        steps, _ = self.curve("validation_loss")
        last_one = self.not_finite[-1] if self.not_finite else None
        return last_one if last_one is not None and not (steps.size and steps[-1] >= last_one) else None

    def skips(self) -> Array:
        """Steps of the records whose count of skipped steps is higher than that of the previous record."""
        steps, counts = self.curve("skipped")
        return steps[np.diff(counts, prepend=0.0) > 0]

    def add(self, record: dict[str, Any]) -> None:
        """Adds a record of ``metrics.jsonl``; nulls and values that are not numbers are left out.

        A step below the last one is a resume: it replaces everything recorded from that step on.
        """
        step = record["step"]
        if step < self.step:
            for series in self.series.values():
                series.cut(step)
            self.samples = [entry for entry in self.samples if entry[0] < step]
            self.not_finite = [entry for entry in self.not_finite if entry < step]
        self.records += 1
        self.step = step
        if "validation_loss" in record and is_not_finite(record["validation_loss"]):
            self.not_finite.append(step)
        samples = record.get("samples")
        for sample in samples if isinstance(samples, list) else ():
            if isinstance(sample, dict):
                self.samples.append((step, str(sample.get("prompt", "")), str(sample.get("text", ""))))
        for path, value in numbers(record, ()):
            if path not in (("step",), ("time",)):
                self.series.setdefault(path, Series()).add(step, value)

    def clock(self) -> tuple[Array, Array]:
        """(steps, elapsed seconds of the run). For older runs without them, derived from the recorded rates; else empty."""
        steps, seconds = self.curve("elapsed")
        if steps.size:
            return steps, seconds
        steps, rates = self.curve("tokens_per_second")
        tokens = self.tokens_per_step
        if tokens is None or not steps.size or not (rates > 0).all():
            return np.empty(0), np.empty(0)
        return steps, np.cumsum(np.diff(steps, prepend=0.0) * tokens / rates)

    def time_by_part(self) -> dict[str, float]:
        """Seconds of the whole run in each phase, longest first; empty if no shares were recorded."""
        at, seconds = self.clock()
        found: dict[str, float] = {}
        for part in self.names("share"):
            steps, shares = self.curve("share", part)
            if at.size:
                ends = np.interp(steps, at, seconds)
                all_ends = self._row_ends()
                before = np.searchsorted(all_ends, steps) - 1
                starts = np.where(before >= 0, np.interp(all_ends[np.maximum(before, 0)], at, seconds), 0.0)
                found[part] = float((shares * (ends - starts)).sum())
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _row_ends(self) -> Array:
        return np.unique(np.concatenate([self.curve("share", part)[0] for part in self.names("share")]))

    def summary(self) -> Summary:
        """The summary of the run."""
        loss_steps, losses = self.curve("validation_loss")
        _, bits = self.curve("bits_per_byte")
        _, rates = self.curve("tokens_per_second")
        _, skipped = self.curve("skipped")
        _, parameters = self.curve("parameters")
        _, seconds = self.clock()
        _, mfu = self.curve("mfu")
        best = int(losses.argmin()) if losses.size else None
        tokens, planned = self.tokens_per_step, self.setting("trainer.steps")
        diverged = self.diverged_at is not None
        return Summary(
            label=self.label,
            model=describe_model(self.setting("model")),
            parameters=int(parameters[-1]) if parameters.size else None,
            step=self.step,
            planned=planned if type(planned) is int else None,
            final_loss=math.inf if diverged else last(losses),
            best_loss=None if best is None else float(losses[best]),
            best_step=None if best is None else int(loss_steps[best]),
            bits_per_byte=math.inf if diverged and bits.size else last(bits),
            tokens=None if tokens is None else float(self.step * tokens),
            tokens_per_second=float(np.median(rates)) if rates.size else None,
            skipped=int(skipped[-1]) if skipped.size else None,
            seconds=last(seconds),
            mfu=float(np.median(mfu)) if mfu.size else None,
            bigram_bits_per_byte=finite(self.fact("bigram.bits_per_byte")),
        )


def within(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def finite(value: Any) -> float | None:
    """A number that fits on an axis, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return float(value) if good else None


def is_not_finite(value: Any) -> bool:
    """Whether this is how a record holds a loss that is not finite: null, or a number that fits on no axis."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and finite(value) is None)


def last(values: Array) -> float | None:
    return float(values[-1]) if values.size else None


def describe_model(model: Any) -> str | None:
    """Architecture with the configured sizes, such as ``qwen2.5, 3 layers, width 128``."""
    if not isinstance(model, dict) or not model.get("architecture"):
        return None
    layers, width = model.get("layers"), model.get("width")
    parts = [str(model["architecture"])]
    parts += [counted(layers, "layer")] if isinstance(layers, int) else []
    parts += [f"width {width}"] if width is not None else []
    return ", ".join(parts)


def numbers(tree: dict[str, Any], prefix: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], float]]:
    """Every number of a nested record that fits on an axis, with its path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from numbers(value, (*prefix, key))
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:
            yield (*prefix, key), value


def read_runs(folders: list[Path]) -> list[RunRecords]:
    """Opens run directories, each once, with distinct labels.

    Raises ``ConfigError`` for the first one that is not a run directory.
    """
    if not folders:
        raise ConfigError("a report needs at least one run directory, and none was given")
    whole = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [read_run(folder, label) for folder, label in zip(whole, labels(whole), strict=True)]


def read_run(folder: Path, label: str) -> RunRecords:
    """Reads one run directory. Unreadable lines, such as the last one of a running run, are counted and skipped.

    Raises ``ConfigError`` if the folder is not a run directory.
    """
    rundir.expect(folder, "config.yaml", "metrics.jsonl")
    try:
        config = rundir.read(folder / "config.yaml")
    except ValueError as error:
        # Bytes that are not text
        raise ConfigError(f"{folder / 'config.yaml'} cannot be read as a configuration ({error})") from error
    run = RunRecords(folder, label, json.loads(json.dumps(config, default=str)), read_facts(folder))
    try:
        with (folder / "metrics.jsonl").open("rb") as lines:
            for line in lines:
                record = record_in(line)
                if record is None:
                    run.unreadable += bool(line.strip())
                else:
                    run.add(record)
    except OSError as error:
        raise ConfigError(f"{folder / 'metrics.jsonl'} cannot be read ({error.strerror})") from error
    return run


def labels(folders: list[Path]) -> list[str]:
    """The shortest distinct suffix of each path."""
    depth = dict.fromkeys(folders, 1)

    def ending(folder: Path) -> str:
        return "/".join(part.strip("/") for part in folder.parts[-depth[folder] :]) or str(folder)

    while True:
        shown = [ending(folder) for folder in folders]
        again = [f for f, label in zip(folders, shown, strict=True) if shown.count(label) > 1]
        growing = [folder for folder in again if depth[folder] < len(folder.parts)]
        if not growing:
            return [printable(label) for label in shown]
        for folder in growing:
            depth[folder] += 1


def printable(text: str) -> str:
    """Replaces characters that are not printable by U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def by_seed(runs: list[RunRecords]) -> list[list[RunRecords]]:
    """The runs in groups whose configurations differ in seed, place and logging at most, in the order of the runs."""
    groups: dict[str, list[RunRecords]] = {}
    for run in runs:
        rest = {k: v for k, v in rundir.leaves(run.config).items() if not k.startswith(SEEDED)}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    return list(groups.values())


def differences(runs: list[RunRecords]) -> dict[str, list[str]]:
    """Dotted configuration keys whose values differ between runs, with each run's value as JSON."""
    flat = [rundir.leaves(run.config) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = {key: [json.dumps(one[key]) if key in one else UNSET for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}
