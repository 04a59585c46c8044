"""`python -m benchmarks.gpu [--reduced] [--out FILE] [SECTION ...]`: prints a table of figures and goals.

Every section is a separate process with a time limit: if it fails, hangs or runs out of memory, the results of the earlier
sections are already in the file. ``--reduced`` runs small sizes on a CPU, so that continuous integration covers all of it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Time limit of each section, in seconds.
SECTIONS = {
    "methods": 70,
    "steps": 170,
    "ranks": 100,
    "roots": 80,
    "training": 80,
    "collectives": 40,
    "rounds": 60,
}


def work(section: str, reduced: bool, out: Path) -> None:
    """Runs one section in this process and writes its lines."""
    from benchmarks.gpu.measure import Setting, machine

    setting = Setting.of(reduced)
    lines = importlib.import_module(f"benchmarks.gpu.{section}").run(setting)
    out.write_text(json.dumps({"machine": machine(setting), "lines": [asdict(line) for line in lines]}))


def run_section(section: str, reduced: bool) -> dict[str, Any]:
    """Runs one section in a separate process: its lines, or how it failed."""
    # Continuous integration runs other tests on the same machine, which slows this one down.
    limit = SECTIONS[section] * (4 if reduced else 1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lines.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", section, str(out)]
        process = subprocess.Popen(
            [*command, "--reduced"] if reduced else command,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, complaint = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"failed": f"took longer than its limit of {limit:g} s", "lines": [], "seconds": limit}
        found: dict[str, Any] = {"lines": []}
        if process.returncode or not out.exists():
            last = complaint.strip().splitlines()[-8:] or [f"exit code {process.returncode}"]
            found["failed"] = "\n".join(last)
        else:
            found = json.loads(out.read_text())
        return found | {"seconds": round(time.perf_counter() - began, 1)}


def options_from(args: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--reduced", action="store_true", help="small sizes on a CPU")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-gpu.json"), help="JSON, written after each section"
    )
    parser.add_argument("--worker", nargs=2, metavar=("SECTION", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"there is no section {min(unknown)!r}, expected some of: {', '.join(SECTIONS)}")
    return options


def main(args: list[str] | None = None) -> int:
    """Runs the sections; returns 1 if one failed or missed a goal, 2 without a GPU."""
    options = options_from(args)
    if options.worker:
        work(options.worker[0], options.reduced, Path(options.worker[1]))
        return 0
    from benchmarks.gpu.measure import Line, Setting, table

    if not options.reduced and Setting.of(False).device.type == "cpu":
        print(
            "torch finds no GPU, expected one: add --reduced to run small sizes on a CPU",
            file=sys.stderr,
        )
        return 2
    results: dict[str, dict[str, Any]] = {}
    for section in options.sections or SECTIONS:
        results[section] = run_section(section, options.reduced)
        options.out.write_text(json.dumps(results, indent=1))
        print(
            f"{section}: {results[section].get('failed', 'done')} ({results[section]['seconds']} s)",
            flush=True,
        )
    lines = [Line(**line) for found in results.values() for line in found["lines"]]
    if shown := next((found["machine"] for found in results.values() if "machine" in found), None):
        print("\n" + ", ".join(f"{key} {value}" for key, value in shown.items()))
    print("\n" + table(lines))
    missed = [line for line in lines if line.met is False]
    failed = [section for section, found in results.items() if "failed" in found]
    print(
        f"\n{len(missed)} goals missed, {sum(line.met is True for line in lines)} met; sections failed: {failed or 'none'}"
    )
    return int(bool(missed or failed))


if __name__ == "__main__":
    sys.exit(main())
