"""Shared by all benchmarks: interleaved timing, and a table for people and JSON for machines from the same rows."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Row:
    """One measured figure with its named baseline. ``ratio`` is figure/baseline, ``target`` the intended value."""

    case: str
    figure: str
    baseline: str
    ratio: float | None
    target: str
    note: str = ""


def interleaved(
    methods: Mapping[str, Callable[[], Any]], rounds: int = 5, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each method; each round runs all of them once, so that drifts of the machine affect all."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for run in methods.values():
        run()
    for _ in range(rounds):
        for name, run in methods.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine() -> dict[str, str]:
    """The machine and versions of the measurement."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": gpu,
    }


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows."""
    lines = ["| case | figure | baseline | ratio | target | note |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.3g}"
        lines.append(f"| {row.case} | {row.figure} | {row.baseline} | {ratio} | {row.target} | {row.note} |")
    return "\n".join(lines)


def report(name: str, rows: Sequence[Row], json_path: str | None) -> None:
    """Prints the table, and writes the JSON if requested."""
    print(f"\n## {name}\n\n{', '.join(f'{k} {v}' for k, v in machine().items())}\n\n{table(rows)}")
    if json_path:
        content = {"benchmark": name, "machine": machine(), "rows": [asdict(row) for row in rows]}
        Path(json_path).write_text(json.dumps(content, indent=1))


def arguments(description: str) -> argparse.ArgumentParser:
    """The command-line options that benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    parser.add_argument(
        "--rounds", type=int, default=5, help="measurements of each method; the median is reported"
    )
    return parser
