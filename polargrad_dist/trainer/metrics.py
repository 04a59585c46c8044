"""Figures of a run: one line per log step for people, ``metrics.jsonl`` for machines, TensorBoard and wandb when asked.

A sink that fails costs no step: TensorBoard and wandb are named once and dropped, the console falls silent, and rows of
``metrics.jsonl`` wait until there is room for them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.config import LoggingConfig

log = logging.getLogger("polargrad_dist.trainer")
PATIENCE = 5.0  # seconds that the end of a run waits for a full disk


class Sink(Protocol):
    """Where records go."""

    def write(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def record_in(line: bytes) -> dict[str, Any] | None:
    """The record of a line of ``metrics.jsonl``, with its step; None for a line that a kill or a bad disk damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 2**53 else None


class JsonLines:
    """``metrics.jsonl``: one object per line, written at once, cut back to the checkpoint on resume.

    What a full or failing disk refuses is kept and tried again with every later row; a row that went out in part is taken
    back first, so that no torn line is ever left before a whole one.
    """

    def __init__(self, path: Path, keep_up_to: int):
        """Keeps the records of the steps up to ``keep_up_to``: what a killed run logged after its checkpoint goes, and with
        it every damaged line."""
        self.path, self._keep_up_to = path, keep_up_to
        self._file: int | None = None
        self._whole = 0  # bytes of the file up to the end of its last whole row
        self._waiting: deque[bytes] = deque()
        self._told = False
        self._flush()

    def write(self, record: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(_finite(record)).encode() + b"\n")
        self._flush()

    def close(self) -> None:
        """Tries for a few seconds to write what is still waiting."""
        deadline = time.monotonic() + PATIENCE
        while self._waiting and time.monotonic() < deadline:
            time.sleep(0.1)
            self._flush()
        if self._waiting:
            log.error("%s lacks its last %d rows: the disk took none of them", self.path, len(self._waiting))
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._open()
            while self._waiting:
                self._put(self._waiting[0])
                self._waiting.popleft()
            self._told = False
        except OSError as error:
            if not self._told:
                self._told = True
                log.warning(
                    "%s cannot be written (%s): its rows are kept and tried again", self.path, error.strerror
                )

    def _put(self, row: bytes) -> None:
        assert self._file is not None  # for the type checker: opened just before
        os.ftruncate(self._file, self._whole)
        done = 0
        while done < len(row):
            done += os.pwrite(self._file, row[done:], self._whole + done)
        self._whole += len(row)

    def _open(self) -> None:
        if self.path.exists():
            temporary = self.path.with_suffix(".tmp")
            with self.path.open("rb") as old, temporary.open("wb") as new:
                for row in old:
                    record = record_in(row)
                    if record is not None and record["step"] <= self._keep_up_to:
                        new.write(row.rstrip() + b"\n")
            os.replace(temporary, self.path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._whole = os.fstat(self._file).st_size


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, folder: Path, first: int):
        """A resume takes the place of what was written after its checkpoint."""
        require("tensorboard", "trainer.logging.tensorboard is true", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first + 1 if first else None)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in flat(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A wandb run, the same one over all resumes of a run directory."""

    def __init__(self, config: LoggingConfig, run_dir: Path, run_id: str, configuration: dict[str, Any]):
        require("wandb", f"trainer.logging.wandb is {config.wandb!r}", "wandb")
        import wandb

        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or run_dir.name,
            id=run_id,
            resume="allow",
            mode=config.wandb,
            dir=str(run_dir),
            config=configuration,
        )

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(flat(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def require(package: str, why: str, extra: str) -> None:
    """Raises ``ConfigError`` saying which extra to install when a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{why}, but the package {package} is not installed: pip install 'polargrad-dist[{extra}]', or turn it off"
        )


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures as ``a/b/c``, numbers only."""
    out: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[prefix + name] = value
    return out


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """A progress bar on a terminal, one dense line per log step elsewhere; silent once nobody can read it."""

    def __init__(self, mode: str, steps: int, first: int):
        self.steps, self.first, self.began = steps, first, time.monotonic()
        self._bar: Any = None
        self.mode = mode
        self._unless_gone(self._start)

    def tick(self, done: int) -> None:
        """Moves the bar to ``done`` steps."""
        if self._bar is not None:
            self._unless_gone(lambda: self._bar.update(done - self._bar.n))

    def show(self, record: dict[str, Any]) -> None:
        text = line(record, self.steps)
        self._unless_gone(lambda: self._show(record, text))

    def close(self) -> None:
        if self._bar is not None:
            self._unless_gone(self._bar.close)

    def _start(self) -> None:
        if self.mode == "auto":
            self.mode = "bar" if sys.stderr.isatty() else "lines"
        if self.mode == "bar":
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.steps, initial=self.first, unit="step", dynamic_ncols=True, smoothing=0.05
            )

    def _show(self, record: dict[str, Any], text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {record['loss']:.4f}" if "loss" in record else "")
            if "validation_loss" in record:
                self._bar.write(text)
        elif self.mode == "lines":
            done = record["step"] - self.first
            left = (self.steps - record["step"]) * (time.monotonic() - self.began) / max(1, done)
            print(f"{text}  eta {duration(left)}", file=sys.stderr, flush=True)

    def _unless_gone(self, act: Callable[[], Any]) -> None:
        """A closed pipe, a hung-up terminal, a full disk behind a redirection: the figures are in metrics.jsonl."""
        try:
            act()
        except (OSError, ValueError, AttributeError):  # also of a stream that is closed or None
            self.mode, self._bar = "off", None


def line(record: dict[str, Any], steps: int) -> str:
    """One record for a person's eye."""
    parts = [f"step {record['step']:>{len(str(steps))}}/{steps}"]
    for name, form in (
        ("loss", ".4f"),
        ("validation_loss", ".4f"),
        ("bits_per_byte", ".4f"),
        ("grad_norm", ".3g"),
    ):
        if name in record:
            parts.append(f"{name} {record[name]:{form}}")
    if "lr" in record:
        parts.append("lr " + " ".join(f"{role}:{value:.2e}" for role, value in record["lr"].items()))
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    if "mfu" in record:
        parts.append(f"mfu {record['mfu']:.1%}")
    if "memory_gib" in record:
        parts.append(f"{record['memory_gib']:.2f} GiB")
    if "share" in record:
        parts.append(" ".join(f"{name}:{value:.0%}" for name, value in record["share"].items()))
    if record.get("skipped"):
        parts.append(f"skipped {record['skipped']}")
    return "  ".join(parts)


def quiet(message: str) -> None:
    """A report that goes nowhere."""


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


class Metrics:
    """All sinks of a run; on ranks other than 0 it swallows everything."""

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        *,
        steps: int,
        first: int,
        run_id: str,
        configuration: dict[str, Any],
        active: bool,
    ):
        self.sinks: list[Sink] = []
        self.console = Console(config.progress if active else "off", steps, first)
        if not active:
            return
        self._add("metrics.jsonl", lambda: JsonLines(run_dir / "metrics.jsonl", first))
        if config.tensorboard:
            self._add("TensorBoard", lambda: TensorBoard(run_dir / "tensorboard", first))
        if config.wandb != "disabled":
            self._add("wandb", lambda: Wandb(config, run_dir, run_id, configuration))

    def _add(self, name: str, make: Any) -> None:
        try:
            self.sinks.append(make())
        except ConfigError:
            raise
        except Exception as error:
            log.warning("%s could not be started (%s); training goes on without it", name, error)

    def write(self, record: dict[str, Any]) -> None:
        """Hands a record, which has a ``step``, to every sink."""
        for sink in list(self.sinks):
            try:
                sink.write(record)
            except Exception as error:
                self.sinks.remove(sink)
                log.warning("%s failed (%s) and is dropped; training goes on", type(sink).__name__, error)
        self.console.show(record)

    def close(self) -> None:
        self.console.close()
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                log.warning("%s failed to close (%s)", type(sink).__name__, error)
