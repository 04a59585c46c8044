"""`python -m experiments`: the matrix problems of Lau, Long, Su (2025) with every optimizer of tables D.1-D.6.

For each problem it writes a JSON file of curves and the figures, and prints final values and verdicts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NoReturn

from experiments.claims import table, verdicts
from experiments.curves import Curve, Curves
from experiments.figures import draw
from experiments.methods import METHODS
from experiments.pool import Task, curves_of
from experiments.problems import PROBLEMS
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.cli import run

# The paper's text does not give the number of steps.
STEPS = {"quadratic": 1000, "logistic": 600, "completion": 1000}
OUT = Path("runs/paper")


def report(problem: str, curves: list[Curve], out: Path) -> None:
    """Writes ``<problem>.json`` and the figures, prints the table and the verdicts."""
    gathered = Curves(curves)
    rows = verdicts(problem, gathered)
    methods = [
        {"name": m.name, "table": m.table, "lr": m.lr, "decay": m.decay, "why": m.why}
        for m in METHODS[problem]
    ]
    content = {
        "problem": problem,
        "methods": methods,
        "verdicts": rows,
        "curves": [c.plain() for c in curves],
    }
    (out / f"{problem}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    draw(problem, gathered, out)
    printed = {m.name: (f"({m.table})" if m.why else m.table, m.rate) for m in METHODS[problem]}
    print("\n" + table(problem, gathered, printed.__getitem__))
    for row in rows:
        print(f"  {row['verdict']:8} {row['source']:10} {row['claim']}\n{'':20} {row['figures']}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see python -m experiments --help)")


def options_from(args: list[str] | None) -> argparse.Namespace:
    """Parses the command line. Raises ``ConfigError`` for invalid options."""
    parser = _Parser(prog="python -m experiments", description=__doc__.split("\n")[0])
    parser.add_argument("problem", nargs="?", default="all", help=f"{', '.join(PROBLEMS)} or all (default)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--steps", type=int, help="default: " + ", ".join(f"{k} {v}" for k, v in STEPS.items())
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for JSON and figures, default {OUT}")
    parser.add_argument("--jobs", type=int, default=2, help="processes with one thread each, default 2")
    options = parser.parse_args(args)
    if options.problem not in (*PROBLEMS, "all"):
        raise ConfigError(f"there is no problem {options.problem!r}, expected {', '.join(PROBLEMS)} or all")
    if options.steps is not None and options.steps < 1:
        raise ConfigError(f"--steps is {options.steps}, expected a whole number >= 1")
    if options.jobs < 1:
        raise ConfigError(f"--jobs is {options.jobs}, expected a whole number >= 1")
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        raise ConfigError(f"--seeds is {options.seeds}, expected different whole numbers >= 0")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out is {options.out}, which cannot be made a folder ({error.strerror}): choose another folder"
        ) from None
    return options


def main(args: list[str] | None = None) -> int:
    """Runs the requested problems; returns the exit code."""
    options = options_from(args)
    began = time.perf_counter()
    names = list(PROBLEMS) if options.problem == "all" else [options.problem]
    tasks = [
        Task(name, method, seed, options.steps or STEPS[name])
        for name in names
        for method in range(len(METHODS[name]))
        for seed in options.seeds
    ]
    curves = curves_of(tasks, options.jobs)
    for name in names:
        report(name, [curve for curve in curves if curve.problem == name], options.out)
    wall, work = time.perf_counter() - began, sum(curve.seconds for curve in curves)
    print(
        f"\n{len(curves)} runs in {wall:.0f} s ({work:.0f} s of processor time); curves and figures in {options.out}"
    )
    return 0


if __name__ == "__main__":
    run(main)
