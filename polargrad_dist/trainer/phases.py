"""Where a step's time goes, and how fast the device could have been."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

from polargrad_dist.trainer.devices import known
from polargrad_dist.trainer.profiling import PREFIX


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is not known, as for any CPU."""
    found = known(device)
    return None if found is None else found.bf16


def memory_gib(device: torch.device) -> float:
    """Largest memory so far: of the device's allocator on a GPU, resident on a CPU; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# Parts of a run that are no training: tokens per second leave them out.
ASIDE = ("evaluation", "saving", "diagnostics")


@dataclass
class Period:
    """Wall seconds between two moments, and the seconds spent in named parts of them; on a GPU as pairs of events."""

    wall: float
    seconds: dict[str, float]
    events: list[tuple[str, Any, Any]]


class Phases:
    """Seconds spent in named parts of the steps since the last `cut`; on a GPU by events, which nothing waits for."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self._began = time.perf_counter()
        self._start_anew()

    def _start_anew(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with record_function(PREFIX + name), self._timed(name):
            yield

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if self.gpu and name != "data":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            start_time = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start_time

    def cut(self) -> Period:
        """What was spent since the last cut."""
        now = time.perf_counter()
        period = Period(now - self._began, self._seconds, self._events)
        self._began = now
        self._start_anew()
        return period


def shares(periods: Iterable[Period]) -> tuple[float, dict[str, float]]:
    """(seconds of training, share of each phase and of "other" in all seconds) of periods. Waits for a GPU to be through.

    Training is everything but evaluation, saving and diagnostics.
    """
    wall, seconds = 0.0, defaultdict[str, float](float)
    for period in periods:
        wall += period.wall
        for name, spent in period.seconds.items():
            seconds[name] += spent
        for name, start, end in period.events:
            end.synchronize()
            seconds[name] += start.elapsed_time(end) / 1e3
    found = {name: spent / wall for name, spent in seconds.items()}
    aside = sum(seconds[name] for name in ASIDE)
    return max(wall - aside, 0.0), found | {"other": max(0.0, 1.0 - sum(found.values()))}
