"""Runs all benchmarks, one after another, each in its own process: `python -m benchmarks [--out FOLDER]`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ALL = ("polar", "optimizer", "step", "training", "data", "checkpoint", "diagnostics", "loss_bytes")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every benchmark; each prints a table.")
    parser.add_argument("--out", metavar="FOLDER", help="also write each benchmark's JSON here")
    parser.add_argument("only", nargs="*", default=[], help=f"some of: {', '.join(ALL)}")
    options = parser.parse_args()
    if unknown := set(options.only) - set(ALL):
        parser.error(f"there is no benchmark {sorted(unknown)[0]!r}, expected some of: {', '.join(ALL)}")
    failed = []
    for name in options.only or ALL:
        json_file = ["--json", str(Path(options.out) / f"{name}.json")] if options.out else []
        if options.out:
            Path(options.out).mkdir(parents=True, exist_ok=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *json_file], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
