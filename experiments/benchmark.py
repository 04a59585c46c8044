"""`python -m experiments.benchmark race-muon --seeds 0 1 2 3`: runs for modded-nanoGPT's optimization track.

Each seed is a run of `train.py` on all GPUs of this machine. Interrupted runs are resumed; finished ones are not repeated.
The track's rule: with n runs of one setup, the result is the first step at which their mean validation loss is below 3.28 by
0.004/sqrt(n) (a one-sided z-test at p < 0.001 for a spread of 0.0013). It is one step for all runs: no run may stop by its
own loss.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.language.runner import Curves
from polargrad_dist.errors import ConfigError, PolarGradError
from polargrad_dist.trainer.cli import run

ROOT = Path(__file__).resolve().parents[1]
TARGET, MARGIN = 3.28, 0.004


def significant(losses: Sequence[float], target: float = TARGET) -> bool:
    """Whether runs with these final losses show a mean below ``target``: (target - mean) sqrt(n) >= 0.004."""
    return (target - statistics.fmean(losses)) * math.sqrt(len(losses)) >= MARGIN - 1e-12


def verdict(curves: dict[int, list[tuple[int, float]]], target: float = TARGET) -> dict[str, Any]:
    """From each seed's (step, validation loss) pairs: losses at the common steps, and the first significant one."""
    known = [dict(curve) for curve in curves.values()]
    steps = sorted(set.intersection(*(set(curve) for curve in known))) if known else []
    rows = [(step, [curve[step] for curve in known]) for step in steps]
    good = [step for step, losses in rows if significant(losses, target)]
    return {
        "target": target,
        "seeds": list(curves),
        "rows": [
            {"step": step, "mean": statistics.fmean(losses), "losses": losses, "significant": step in good}
            for step, losses in rows
        ],
        "steps_to_target": good[0] if good else None,
    }


def table(found: dict[str, Any], last: int = 12) -> str:
    """A text table of the last validations, and the verdict."""
    count = len(found["seeds"])
    needed = found["target"] - MARGIN / math.sqrt(max(1, count))
    lines = [f"{'step':>6}{'mean loss':>12}{'smallest':>12}{'largest':>12}"]
    for row in found["rows"][-last:]:
        mark = "  significant" if row["significant"] else ""
        lines.append(
            f"{row['step']:>6}{row['mean']:>12.5f}{min(row['losses']):>12.5f}{max(row['losses']):>12.5f}{mark}"
        )
    steps = found["steps_to_target"]
    reached = "not reached" if steps is None else f"{steps} steps"
    lines.append(f"{found['target']} with n = {count} (a mean of at most {needed:.5f}): {reached}")
    return "\n".join(lines)


def command(config: Path, run_dir: Path, seed: int, processes: int, more: Sequence[str]) -> list[str]:
    """The command that trains one seed."""
    starter = [sys.executable]
    if processes > 1:
        starter += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    own = ["--config", str(config), "--trainer.run_dir", str(run_dir), "--trainer.seed", str(seed)]
    return [*starter, "train.py", *own, *more]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__)
    parser.add_argument("config", help="a configuration's name or file, such as race-muon")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--processes", type=int, default=None, help="default: one per GPU, or one")
    parser.add_argument("--target", type=float, default=TARGET)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--report", action="store_true", help="run nothing; report finished runs")
    options, more = parser.parse_known_args()
    config = Path(options.config)
    if not config.is_file():
        config = ROOT / "configs" / f"{options.config}.yaml"
    if not config.is_file():
        raise ConfigError(
            f"there is no configuration {options.config!r}, expected a file or one of: "
            f"{', '.join(sorted(p.stem for p in (ROOT / 'configs').glob('race-*.yaml')))}"
        )
    processes = options.processes
    if processes is None:
        import torch

        processes = max(1, torch.cuda.device_count())
    if processes < 1:
        raise ConfigError(f"--processes is {processes}, expected a whole number >= 1")
    out = options.out.resolve() / config.stem
    folders = {seed: out / f"seed-{seed}" for seed in dict.fromkeys(options.seeds)}
    for seed, folder in folders.items():
        if options.report:
            continue
        code = subprocess.run(
            command(config, folder, seed, processes, more), cwd=ROOT, check=False
        ).returncode
        if code:
            raise PolarGradError(
                f"seed {seed} ended with exit code {code}, expected 0: see {folder}, then repeat the command to continue"
            )
    curves = {seed: Curves.read(folder).validation for seed, folder in folders.items()}
    if missing := [seed for seed, curve in curves.items() if not curve]:
        raise ConfigError(
            f"seed {missing[0]} has no validation in {folders[missing[0]]}, expected a finished run: run without --report"
        )
    found = verdict(curves, options.target) | {"config": config.stem}
    out.mkdir(parents=True, exist_ok=True)
    (out / "verdict.json").write_text(json.dumps(found, indent=1))
    print(table(found))
    print(f"figures: {out / 'verdict.json'}")
    return 0


if __name__ == "__main__":
    run(main)
