"""Starts runs under torchrun, kills them, and compares how they ended. Called with a seed it does the same again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from polargrad_dist.trainer.checkpoint import CheckpointStore, checkpoints_in, verify

ROOT = Path(__file__).parents[2]


def torchrun(run_dir: Path, *options: str, **how: Any) -> subprocess.Popen:
    """A run of tests.chaos.program, started as `start` does; its output goes to RUN_DIR.out."""
    return start(run_dir, "-m", "tests.chaos.program", str(run_dir), *options, **how)


def start(
    run_dir: Path,
    *program: str,
    world: int = 2,
    restarts: int = 0,
) -> subprocess.Popen:
    """Any program under torchrun on ``world`` processes, in the repository's root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += [f"--max-restarts={restarts}", *program]
    # Without it a restart under --standalone cannot meet again at the store.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(f"{run_dir}.out", "ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)


def workers(run: subprocess.Popen) -> list[psutil.Process]:
    """The ranks' processes, as far as they have started."""
    try:
        return psutil.Process(run.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ranks_of(run: subprocess.Popen) -> list[psutil.Process]:
    """The ranks' processes in rank order, as far as they have started."""
    found = {}
    for process in workers(run):
        with contextlib.suppress(psutil.Error):
            found[int(process.environ()["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def records(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Step to logged loss and gradient norm."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "a step is logged twice"
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def last_logged(run_dir: Path) -> int:
    """The last whole step in metrics.jsonl, 0 without one."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines[:-1]), default=0)
    except (OSError, ValueError):
        return 0


def final_state(run_dir: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and every tensor of the newest checkpoint: parameters, optimizer state, all ranks' generators."""
    path = checkpoints_in(run_dir / "checkpoints")[-1]
    manifest = verify(path)
    tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in manifest.tensors.items()}
    store = CheckpointStore(run_dir / "checkpoints", identity=manifest.identity)
    loaded = store.load(path, tensors)
    return loaded.step, tensors | {f"rank/0/{name}": state for name, state in (loaded.per_rank or {}).items()}


def assert_same_end(run_dir: Path, straight: Path) -> None:
    """Every tensor and every logged figure of two runs is the same bit for bit."""
    (step, tensors), (expected_step, expected) = final_state(run_dir), final_state(straight)
    assert step == expected_step
    assert tensors.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(tensors[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, the first is {different[0]}"
    assert records(run_dir) == records(straight)


@dataclass
class Report:
    """What happened: how each life ended, how many kills tore a save, steps done twice."""

    kills: Counter = field(default_factory=Counter)
    torn: int = 0
    steps_lost: int = 0
    lives: list[str] = field(default_factory=list)


def chaos(
    folder: Path,
    kills: int,
    seed: int,
    world: int = 2,
    strategy: str = "ddp",
    always_asynchronous: bool = False,
    tell=print,
) -> Report:
    """Kills a run ``kills`` times and lets it end; asserts that it ends as one that was never disturbed.

    A third of the kills comes while a checkpoint is being written, the rest at any moment of training or of the start. Some
    hit all processes at once, some one rank alone; some lives save in the background, or all.
    """
    chance, report = random.Random(seed), Report()
    # Long enough never to end before its last kill: a life lasts 1.5 s and makes 16 steps on average, 40 at most.
    steps = ["--steps", str(20 * kills + 80), "--every", "5", "--fat", "16", "--pause", "0.04"]
    steps += ["--strategy", strategy]
    straight, run_dir = folder / "straight", folder / "killed"
    if code := torchrun(straight, *steps, world=world).wait():
        raise AssertionError(
            f"the undisturbed run ended with {code}: {(folder / 'straight.out').read_text()[-2000:]}"
        )
    for life in range(kills):
        options = [*steps, "--asynchronous"] if chance.random() < 0.5 or always_asynchronous else steps
        moment = "saving" if life % 3 == 0 else "starting" if chance.random() < 0.15 else "training"
        run = torchrun(run_dir, *options, world=world)
        ranks = _wait_for(moment, run, run_dir, chance)
        victims = "one rank" if ranks and chance.random() < 0.3 else "all"
        if run.poll() is not None:
            raise AssertionError(
                f"life {life} ended by itself: {(folder / 'killed.out').read_text()[-2000:]}"
            )
        kill([chance.choice(ranks)] if victims == "one rank" else [*ranks, psutil.Process(run.pid)])
        run.wait(timeout=60)
        kill(ranks)
        report.torn += any(run_dir.glob("checkpoints/.saving-*"))
        report.kills[moment, victims] += 1
        reached, kept = last_logged(run_dir), _newest(run_dir)
        report.steps_lost += max(0, reached - kept)
        report.lives.append(f"kill {life + 1}: {victims} while {moment}, at step {reached}, {kept} saved")
        tell(report.lives[-1])
    if code := torchrun(run_dir, *steps, world=world).wait():
        raise AssertionError(
            f"the last life ended with {code}: {(folder / 'killed.out').read_text()[-2000:]}"
        )
    assert_same_end(run_dir, straight)
    return report


def _wait_for(
    moment: str, run: subprocess.Popen, run_dir: Path, chance: random.Random
) -> list[psutil.Process]:
    """Until a moment of a life drawn at random ("saving": while a checkpoint is written); returns the ranks."""
    if moment == "starting":
        time.sleep(chance.uniform(0, 4))
        return workers(run)
    before = last_logged(run_dir)
    while run.poll() is None and last_logged(run_dir) == before:
        time.sleep(0.01)
    ranks = workers(run)
    time.sleep(chance.uniform(0, 1.5))
    if moment == "saving":
        while run.poll() is None and not any(run_dir.glob("checkpoints/.saving-*")):
            pass
        time.sleep(chance.uniform(0, 0.03))
    return ranks


def _newest(run_dir: Path) -> int:
    paths = checkpoints_in(run_dir / "checkpoints")
    return verify(paths[-1]).step if paths else 0
