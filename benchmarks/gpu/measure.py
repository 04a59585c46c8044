"""Shared by the sections: a line of the report, timing on a device, launches, and a device's published rates.

Needs only torch, so that a bare GPU machine can run it from a checkout.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Published fp64 flop/s of tensor cores, by a part of the device's name.
FP64_PEAKS = {
    "H100 PCIe": 51e12,
    "H100": 67e12,
    "H200": 67e12,
    "GH200": 67e12,
    "B200": 37e12,
    "A100": 19.5e12,
}


@dataclass
class Line:
    """One figure. ``met`` says whether it meets its goal; None if there is no goal, or none on this device."""

    section: str
    case: str
    what: str
    value: float
    unit: str
    goal: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Setting:
    """How a section runs: ``reduced`` selects small sizes, for a CPU in continuous integration."""

    device: torch.device
    reduced: bool

    @classmethod
    def of(cls, reduced: bool) -> Setting:
        gpu = torch.cuda.is_available() and not reduced
        return cls(torch.device("cuda", 0) if gpu else torch.device("cpu"), reduced)

    def goal(self, text: str, holds: bool) -> dict[str, Any]:
        """``goal`` and ``met`` of a line for GPUs only: without a GPU, the goal is shown but not judged."""
        return {"goal": text, "met": holds if self.device.type == "cuda" else None}


def fp64_peak(device: torch.device) -> float | None:
    """Published flop/s of fp64 products; None if the device is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in FP64_PEAKS.items() if known in name), None)


def machine(setting: Setting) -> dict[str, str]:
    """The machine and versions of the measurement."""
    gpu = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setting.device)
        if gpu
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda) if gpu else "none",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "form": "reduced" if setting.reduced else "full",
    }


def seconds(run: Callable[[], Any], setting: Setting, rounds: int = 5, warm: int = 2) -> float:
    """Median seconds of a call, after ``warm`` calls that do not count; on a GPU by events, from an empty queue.

    On a CPU, which other programs may share, it is CPU time of this process.
    """
    rounds, warm = (1, 1) if setting.reduced else (rounds, warm)
    for _ in range(warm):
        run()
    times = []
    for _ in range(rounds):
        if setting.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
    return statistics.median(times)


def launches_and_idle(run: Callable[[], Any], setting: Setting) -> tuple[int, float]:
    """(kernels started by one call, share of its time in which the GPU is idle); on a CPU (operations, 0)."""
    from torch.profiler import ProfilerActivity, profile

    gpu = setting.device.type == "cuda"
    run()
    if not gpu:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
        return sum(event.name.startswith("aten::") for event in found.events()), 0.0
    wall = seconds(run, setting)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.device_time for e in kernels) / 1e6
    return len(kernels), max(0.0, 1 - busy / wall)


def table(lines: list[Line]) -> str:
    """A Markdown table; the last column says whether the goal was met."""
    rows = ["| section | case | figure | | goal | met |", "| --- | --- | --- | --- | --- | --- |"]
    for line in lines:
        met = {True: "yes", False: "**no**", None: "not judged" if line.goal else ""}[line.met]
        rows.append(
            f"| {line.section} | {line.case} | {line.what} | {line.value:.4g} {line.unit} | {line.goal} | {met} |"
        )
    return "\n".join(rows)
