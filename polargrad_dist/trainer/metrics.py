"""Metrics of a run: ``metrics.jsonl`` and the console always, TensorBoard and wandb if configured.

A failing sink never stops training: TensorBoard and wandb are reported once and dropped, the console goes silent, and rows of
``metrics.jsonl`` are kept in memory until they can be written.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.config import LoggingConfig
from polargrad_dist.trainer.console import Console
from polargrad_dist.trainer.rundir import leaves
from polargrad_dist.trainer.sinks import RunInfo, Sink, registered

log = logging.getLogger("polargrad_dist.trainer")
# Seconds that a run waits for a full disk at its end
PATIENCE = 5.0


def record_in(line: bytes) -> dict[str, Any] | None:
    """The record in a line of ``metrics.jsonl``; None for a line that a kill or a bad disk damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 2**53 else None


def seconds_of(record: dict[str, Any]) -> float:
    """The elapsed seconds of a record, 0 if it has none."""
    value = record.get("elapsed")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


class JsonLines:
    """``metrics.jsonl``: one object per line, written immediately, truncated to the checkpoint on resume.

    Rows that a full or failing disk refuses are kept and retried with every later row; a partly written row is truncated
    first, so that no torn line precedes a whole one.
    """

    def __init__(self, path: Path, keep_up_to: int):
        """Keeps the records of steps up to ``keep_up_to``, and drops damaged lines and what a killed run logged after its
        checkpoint. ``elapsed`` is then the elapsed time of the last kept record."""
        self.path, self._keep_up_to = path, keep_up_to
        self._file: int | None = None
        # Bytes of the file up to the end of its last whole row
        self._whole = 0
        self._waiting: deque[bytes] = deque()
        self._told = False
        self.elapsed = 0.0
        self._flush()

    def write(self, record: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(_finite(record)).encode() + b"\n")
        self._flush()

    def close(self) -> None:
        """Retries for a few seconds to write the remaining rows."""
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
        # For the type checker: opened just before
        assert self._file is not None
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
                        self.elapsed = max(self.elapsed, seconds_of(record))
            os.replace(temporary, self.path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._whole = os.fstat(self._file).st_size


def check_packages(config: LoggingConfig) -> None:
    """Raises ``ConfigError`` for a package that a sink needs and that is not installed."""
    if config.tensorboard:
        require("tensorboard", "trainer.logging.tensorboard is true", "tensorboard")
    if config.wandb != "disabled":
        require("wandb", f"trainer.logging.wandb is {config.wandb!r}", "wandb")


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, folder: Path, first: int, configuration: dict[str, Any] | None = None):
        """A resume replaces what was written after its checkpoint."""
        require("tensorboard", "trainer.logging.tensorboard is true", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first + 1 if first else None)
        if not first:
            self._write_hparams(configuration or {})

    def _write_hparams(self, configuration: dict[str, Any]) -> None:
        """The configuration under HPARAMS, in this run's own events: ``add_hparams`` would create a second run."""
        from torch.utils.tensorboard.summary import hparams

        kinds = bool | int | float | str
        values = {k: v if isinstance(v, kinds) else str(v) for k, v in leaves(configuration).items()}
        figures = {"loss": 0.0, "validation_loss": 0.0, "bits_per_byte": 0.0}
        for summary in hparams(values, figures):
            self._writer._get_file_writer().add_summary(summary)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in curves(record).items():
            self._writer.add_scalar(name, value, record["step"])
        for i, sample in enumerate(record.get("samples", ())):
            text = f"**{sample['prompt']}**{sample['text']}".replace("\n", "  \n")
            self._writer.add_text(f"samples/{i}", text, record["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A wandb run, the same for all resumes of a run directory."""

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
            # No table of all metrics on the terminal at the end.
            settings=wandb.Settings(quiet=True),
        )
        where = self._run.url if config.wandb == "online" else run_dir / "wandb"
        log.info("wandb: run %s, %s", run_id, where)

    def write(self, record: dict[str, Any]) -> None:
        shown: dict[str, Any] = curves(record)
        if "samples" in record:
            import wandb

            rows = [[record["step"], sample["prompt"], sample["text"]] for sample in record["samples"]]
            shown["samples"] = wandb.Table(columns=["step", "prompt", "text"], data=rows)
        self._run.log(shown, step=record["step"])

    def attach(self, path: Path) -> None:
        """Logs the run's report as an artifact."""
        import wandb

        artefact = wandb.Artifact(f"report-{self._run.id}", type="report")
        artefact.add_file(str(path))
        self._run.log_artifact(artefact)

    def close(self) -> None:
        self._run.finish()


def require(package: str, why: str, extra: str) -> None:
    """Raises ``ConfigError``, naming the extra to install, if a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{why}, but the package {package} is not installed: pip install '.[{extra}]', or turn it off"
        )


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers as ``a/b/c``; other values are left out."""
    out: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[prefix + name] = value
    return out


def curves(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record to plot against its step."""
    return {name: value for name, value in flat(record).items() if name not in ("step", "time")}


def _finite(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """All sinks of a run; does nothing on ranks other than 0."""

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
        tokens_per_step: int = 0,
        report: Callable[[Path], Path] | None = None,
    ):
        """tokens_per_step: over all ranks; 0 if steps have no tokens.

        report: writes the run's HTML report from its directory, for sinks with ``attach``.
        """
        self.sinks: list[Sink] = []
        self._tokens_per_step, self._began = tokens_per_step, time.monotonic()
        self._rows: JsonLines | None = None
        self._run_dir, self._report = run_dir, report
        self.console = Console(config.progress if active else "off", steps, first)
        if not active:
            return
        self._add("metrics.jsonl", lambda: self._json_lines(run_dir / "metrics.jsonl", first))
        if config.tensorboard:
            self._add("TensorBoard", lambda: TensorBoard(run_dir / "tensorboard", first, configuration))
        if config.wandb != "disabled":
            self._add("wandb", lambda: Wandb(config, run_dir, run_id, configuration))
        info = RunInfo(run_dir, run_id, configuration, steps, first)
        for name, make in registered().items():
            self._add(name, partial(make, info))

    def _add(self, name: str, make: Any) -> None:
        try:
            self.sinks.append(make())
        except ConfigError:
            raise
        except Exception as error:
            log.warning("%s could not be started (%s); training goes on without it", name, error)

    def _json_lines(self, path: Path, first: int) -> JsonLines:
        self._rows = JsonLines(path, first)
        return self._rows

    def write(self, record: dict[str, Any]) -> None:
        """Adds ``time``, ``elapsed`` seconds and ``tokens`` to a record, and passes it to every sink."""
        if not self.sinks and self.console.mode == "off":
            return
        before = 0.0 if self._rows is None else self._rows.elapsed
        when: dict[str, Any] = {
            "step": record["step"],
            "time": round(time.time(), 3),
            "elapsed": round(before + time.monotonic() - self._began, 3),
        }
        if self._tokens_per_step:
            when["tokens"] = record["step"] * self._tokens_per_step
        record = when | record
        for sink in list(self.sinks):
            try:
                sink.write(record)
            except Exception as error:
                self.sinks.remove(sink)
                log.warning("%s failed (%s) and is dropped; training goes on", type(sink).__name__, error)
        self.console.show(record)

    def _attach_report(self) -> None:
        takers = [sink for sink in self.sinks if hasattr(sink, "attach")]
        if not takers or self._report is None:
            return
        try:
            path = self._report(self._run_dir)
            for sink in takers:
                sink.attach(path)
        except Exception as error:
            log.warning("the report was not attached (%s)", error)

    def close(self) -> None:
        self._attach_report()
        self.console.close()
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                log.warning("%s failed to close (%s)", type(sink).__name__, error)
