"""`--profile N`: a trace of N steps by torch's profiler, and a table of where their time goes; on rank 0."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("polargrad_dist.trainer")

# Steps before the trace: compilation, allocator, the profiler itself
WARM_UP = 2
# What `Phases` calls the parts of a step
PREFIX = "step/"
ROWS = 25
MEMORY_EVENTS = 200_000


class Profile:
    """Call `step` after each step; afterwards ``profile/`` in the run directory holds the trace, the table, and on a GPU a
    snapshot of its memory for https://pytorch.org/memory_viz."""

    def __init__(self, steps: int, run_dir: Path, device: torch.device, active: bool):
        """steps: how many to trace, 0 for none. active: whether this rank traces."""
        self.steps, self.folder, self.gpu = steps, run_dir / "profile", device.type == "cuda"
        self._profiler: Any = None
        if not (steps and active):
            return
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.gpu else [])
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=False,
        )
        if self.gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profiler.__enter__()

    def step(self) -> None:
        """Marks the end of a training step."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """Ends a trace that the run did not complete, with the steps so far."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.__exit__(None, None, None)
            if self.gpu:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiler: Any) -> None:
        """A failure costs the trace, not the run."""
        try:
            self.folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
            text = table(profiler, self.gpu)
            (self.folder / "table.txt").write_text(text, encoding="utf-8")
            if self.gpu:
                torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            log.info("profile of %d steps: %s\n%s", self.steps, self.folder, text.split("\n\n")[0])
        except Exception as error:
            log.warning("the profile could not be written to %s (%s); training goes on", self.folder, error)


def table(profiler: Any, gpu: bool) -> str:
    """Parts of a step and then operators, longest first: milliseconds per step, and shares of the traced time."""
    averages = profiler.key_averages()
    attribute = "device_time_total" if gpu else "cpu_time_total"
    phases = [event for event in averages if event.key.startswith(PREFIX)]
    steps = max(1, next((e.count for e in averages if e.key == f"{PREFIX}whole"), 1))
    whole = max((getattr(e, attribute) for e in phases if e.key == f"{PREFIX}whole"), default=0.0)
    whole = whole or max(sum(getattr(e, attribute) for e in phases), 1e-9)
    lines = [f"{'part of a step':<24} {'ms per step':>12} {'share':>7}"]
    for event in sorted(phases, key=lambda e: -getattr(e, attribute)):
        value = getattr(event, attribute)
        lines.append(
            f"{event.key.removeprefix(PREFIX):<24} {value / 1e3 / steps:>12.3f} {value / whole:>7.1%}"
        )
    by = "self_device_time_total" if gpu else "self_cpu_time_total"
    return (
        "\n".join(lines)
        + "\n\n"
        + averages.table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        + "\n"
    )
