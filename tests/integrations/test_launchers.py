"""DeepSpeed's launcher and torchrun start the example and train.py; who starts a run makes no difference to it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commandline import ROOT
from tests.launch.cluster import free_ports
from tests.launch.tiny import options

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install '.[deepspeed]'")
pytestmark = pytest.mark.slow


def started(launcher: str, arguments: list[str], folder: Path) -> str:
    """What a program on two CPU ranks says."""
    port = str(free_ports(1)[0])
    ninja = Path(importlib.util.find_spec("ninja").origin).parent.parent / "bin"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([str(ninja), os.environ["PATH"]]),
    }
    command = {
        "deepspeed": ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
    }[launcher]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_the_example_trains_under_deepspeed_and_goes_on_under_torchrun(tmp_path):
    example = ROOT / "examples" / "deepspeed_zero.py"
    assert len(example.read_text().splitlines()) <= 70
    for launcher, steps in (("deepspeed", 40), ("torchrun", 60)):
        arguments = [
            str(example),
            "--stage",
            "3",
            "--steps",
            str(steps),
            "--checkpoints",
            str(tmp_path / "zero"),
        ]
        said = re.search(
            r"loss (\d\.\d+) after (\d+) steps on 2 ranks", started(launcher, arguments, tmp_path)
        )
        assert said is not None
        assert int(said[2]) == steps
        # From ln 64 = 4.16
        assert float(said[1]) < (2.0 if steps == 40 else 1.2)


def losses(folder: Path, run: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_train_py_runs_under_deepspeed_and_torchrun_alike(tmp_path):
    runs = {
        "ddp": ("torchrun", {}),
        "launched": ("deepspeed", {"strategy.name": "deepspeed", "activation_checkpointing": "true"}),
        "stage3": ("torchrun", {"strategy.name": "deepspeed", "strategy.zero_stage": 3}),
    }
    for run, (launcher, others) in runs.items():
        rule = [
            "--optimizer.embed.scale=nuclear",
            "--optimizer.embed.lr=0.001",
            "--optimizer.scalar.lr=0.001",
        ]
        script = [str(ROOT / "train.py"), *options(tmp_path, run, **others), *rule, "--trainer.steps=12"]
        started(launcher, script, tmp_path)
    expected = losses(tmp_path, "ddp")
    assert len(expected) == 12
    assert expected[-1] < expected[0] - 0.1
    for run in ("launched", "stage3"):
        assert losses(tmp_path, run) == pytest.approx(expected, rel=2e-3)
