"""`python -m tests.soak [--minutes 30]`: trains, validates, saves, leaves, comes back and reports; fails when anything grows.

A run of the chaos program (dropout, accumulation, prefetching, background saves) on two ranks lives for a few minutes at a
time and is then asked to leave. Of every life the memory, descriptors and threads of its ranks, and of the whole soak the
checkpoint folder, are watched; each life is compared with its own beginning, so that an import is no growth.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from polargrad_dist.trainer.checkpoint import checkpoints_in, verify
from tests.chaos.harness import kill, last_logged, ranks_of, torchrun, workers
from tools.report import write_report

# Seconds
LIFE = 240.0
OPTIONS = ["--steps", "100000000", "--every", "20", "--validation", "50", "--fat", "4", "--asynchronous"]
# What a life may show in its last third, given the first.
ALLOWED = {
    "memory": lambda first: first * 1.05 + 8,
    "descriptors": lambda first: first + 2,
    "threads": lambda first: first + 1,
    "checkpoint": lambda first: first * 1.05 + 1,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems = soak(Path(folder) / "run", 60 * options.minutes)
    for problem in problems:
        print(f"GROWTH  {problem}")
    print("nothing grew" if not problems else f"{len(problems)} things grew")
    return 1 if problems else 0


def soak(run_dir: Path, seconds: float) -> list[str]:
    """Lives one after the other for ``seconds``; what grew, in words."""
    end, problems, folder_sizes = time.monotonic() + seconds, list[str](), list[float]()
    life = 0
    while (left := end - time.monotonic()) > 20 or life == 0:
        life += 1
        samples = live(run_dir, min(LIFE, max(left, 20.0)))
        problems += [f"life {life}, {problem}" for problem in grown(samples)]
        folder_sizes.append(samples["checkpoint folder, MiB"][-1])
        step = verify(checkpoints_in(run_dir / "checkpoints")[-1]).step
        rows = check_metrics(run_dir, step)
        report = write_report([run_dir], run_dir / "report.html")
        figures = {name: f"{statistics.median(values):.1f}" for name, values in samples.items()}
        print(
            f"life {life}: to step {step}, {rows} rows, report {report.stat().st_size:,} bytes, {figures}",
            flush=True,
        )
    if len(folder_sizes) > 1 and folder_sizes[-1] > ALLOWED["checkpoint"](folder_sizes[0]):
        problems.append(
            f"the checkpoint folder went from {folder_sizes[0]:.1f} to {folder_sizes[-1]:.1f} MiB"
        )
    return problems


def live(run_dir: Path, seconds: float) -> dict[str, list[float]]:
    """One life of the run, saved and gone at its end: samples of each figure, once a second while it trains."""
    begin = last_logged(run_dir)
    run = torchrun(run_dir, *OPTIONS)
    try:
        deadline = time.monotonic() + 90
        # Past the first validation and saves
        while last_logged(run_dir) <= begin + 60:
            assert run.poll() is None, told(run_dir)
            assert time.monotonic() < deadline, told(run_dir)
            time.sleep(0.1)
        samples: dict[str, list[float]] = defaultdict(list)
        ranks, until = ranks_of(run), time.monotonic() + seconds
        step, at = last_logged(run_dir), time.monotonic()
        while time.monotonic() < until:
            time.sleep(1)
            assert run.poll() is None, told(run_dir)
            for rank, process in enumerate(ranks):
                samples[f"memory of rank {rank}, MiB"].append(process.memory_info().rss / 2**20)
                samples[f"descriptors of rank {rank}"].append(process.num_fds())
                samples[f"threads of rank {rank}"].append(process.num_threads())
            samples["checkpoint folder, MiB"].append(size(run_dir / "checkpoints") / 2**20)
            now, reached = time.monotonic(), last_logged(run_dir)
            samples["steps per second"].append((reached - step) / (now - at))
            step, at = reached, now
        run.send_signal(signal.SIGTERM)
        run.wait(timeout=60)
        return samples
    finally:
        kill([*workers(run), *([psutil.Process(run.pid)] if run.poll() is None else [])])


def grown(samples: dict[str, list[float]]) -> list[str]:
    """Which figures were higher in the last third of a life than in its first."""
    problems = []
    for name, values in samples.items():
        third = max(1, len(values) // 3)
        # A save is under way at some samples and not at others; what leaks is still there when none is.
        first, last = min(values[:third]), min(values[-third:])
        allowed = ALLOWED.get(name.split()[0])
        if allowed is not None and last > allowed(first):
            problems.append(f"{name}: {first:.1f} to {last:.1f}")
    return problems


def check_metrics(run_dir: Path, step: int) -> int:
    """Every step once, none after the checkpoint; returns the number of rows."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, step + 1)), f"metrics.jsonl does not hold every step up to {step} once"
    return len(rows)


def size(folder: Path) -> int:
    """Bytes of what is in a folder, which others write to meanwhile."""
    done = subprocess.run(["du", "-sb", str(folder)], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0]) if done.stdout else 0


def told(run_dir: Path) -> str:
    return run_dir.with_name(run_dir.name + ".out").read_text()[-3000:]


if __name__ == "__main__":
    sys.exit(main())
