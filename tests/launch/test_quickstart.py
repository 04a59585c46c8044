"""`launch/quickstart.py`, what `make train` runs, at its edges."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import quickstart
from polargrad_dist.trainer.checkpoint import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]


def arguments(folder: Path, *more: str) -> list[str]:
    small = {
        "trainer.run_dir": folder / "run",
        "trainer.device": "cpu",
        "trainer.sequence_length": 16,
        "trainer.global_batch": 4,
        "trainer.micro_batch": 2,
        "trainer.logging.every": 1,
        "trainer.schedule.warmup_steps": 1,
        "trainer.evaluation.every": 0,
        "model.width": 16,
        "model.layers": 1,
        "model.heads": 2,
        "data.cache": folder / "cache",
        "data.max_tokens": 100_000,
        "data.tokenizer.vocab_size": 300,
        "data.tokenizer.train_bytes": 100_000,
        "data.validation_tokens": 1000,
    }
    pairs = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(ROOT / "launch" / "quickstart.py"), *pairs, *more]


def test_of_the_gpus_it_takes_as_many_as_divide_the_batch():
    assert [quickstart.ranks(count) for count in (1, 2, 3, 5, 6, 7, 8)] == [1, 2, 2, 4, 4, 4, 8]


def using(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGQUIT, marks=pytest.mark.slow)])
def test_a_signal_to_it_alone_ends_training_saved_and_leaves_nobody_behind(tmp_path, number):
    run = subprocess.Popen(
        arguments(tmp_path, "--trainer.steps", "1000000"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode not in (0, None)
    assert said.splitlines()[-1] == (
        f"stopped by {number.name}; the traceback above is torchrun's. The same command resumes from what was saved"
    )
    assert using(tmp_path) == []
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest_valid() is not None


def test_without_validation_it_ends_with_the_rest_of_its_summary(tmp_path):
    asked = ["--trainer.steps", "2", "--data.validation_fraction", "0"]
    run = subprocess.run(arguments(tmp_path, *asked), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "validation: not configured" in run.stdout
    assert "report: " in run.stdout


def test_a_dry_run_only_shows(tmp_path):
    run = subprocess.run(arguments(tmp_path, "--dry_run", "2"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "run").exists()
