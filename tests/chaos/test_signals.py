"""Signals, a launcher that is killed and a rank that is stopped, as torchrun's ranks meet them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from polargrad_dist.trainer import PREEMPTED
from polargrad_dist.trainer.checkpoint import checkpoints_in, verify
from tests.chaos.harness import ROOT, final_state, kill, last_logged, ranks_of, torchrun, workers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
LONG = ["--steps", "100000", "--every", "0", "--pause", "0.02"]


def output(run_dir) -> str:
    return run_dir.with_name(run_dir.name + ".out").read_text()


def wait_until_trained(run, run_dir, steps=3):
    deadline = time.monotonic() + 60
    while last_logged(run_dir) < steps:
        assert run.poll() is None, output(run_dir)[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_gone(ranks, seconds):
    _, left = psutil.wait_procs(ranks, timeout=seconds)
    kill(left)
    assert not left, f"{len(left)} ranks were still there after {seconds} s"


def newest_step(run_dir) -> int:
    return verify(checkpoints_in(run_dir / "checkpoints")[-1]).step


def test_a_hangup_of_torchrun_saves_and_leaves(tmp_path):
    run_dir = tmp_path / "run"
    run = torchrun(run_dir, *LONG)
    wait_until_trained(run, run_dir)
    ranks = workers(run)
    run.send_signal(signal.SIGHUP)
    run.wait(timeout=25)
    wait_until_gone(ranks, 1)
    assert newest_step(run_dir) == final_state(run_dir)[0] >= 3
    assert "asked to leave (SIGHUP): saved at step" in (run_dir / "log.txt").read_text()


def test_ranks_whose_torchrun_was_killed_save_and_end(tmp_path):
    run_dir = tmp_path / "run"
    run = torchrun(run_dir, *LONG)
    wait_until_trained(run, run_dir)
    ranks, at = workers(run), last_logged(run_dir)
    run.kill()
    run.wait()
    wait_until_gone(ranks, 15)
    assert "asked to leave (torchrun is gone)" in (run_dir / "log.txt").read_text()
    assert at <= newest_step(run_dir) <= at + 10


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_ends_the_others_within_the_limit_and_is_named(tmp_path, stopped):
    run_dir, limit = tmp_path / "run", 9.0
    run = torchrun(run_dir, *LONG, "--limit", str(limit / 60))
    wait_until_trained(run, run_dir)
    ranks = ranks_of(run)
    ranks[stopped].suspend()
    began = time.monotonic()
    try:
        ranks[1 - stopped].wait(timeout=2 * limit)
        took = time.monotonic() - began
    finally:
        kill([*ranks, psutil.Process(run.pid)])
        run.wait()
    # For a busy machine
    assert took <= limit + 2
    log = (run_dir / "log.txt").read_text()
    named = (
        "rank 1 gives no sign of life" if stopped else "rank 0, which holds the store that the ranks meet at,"
    )
    assert re.search(rf"rank {1 - stopped} ends: it waited \d+ s at .*{named}", log), log


def test_who_waits_for_a_preparation_waits_longer_than_the_limit_and_says_what_for(tmp_path):
    run_dir = tmp_path / "run"
    options = ["--steps", "2", "--every", "0", "--limit", "0.05", "--prepare", "5", "--say_every", "1"]
    run = torchrun(run_dir, *options)
    assert run.wait(timeout=60) == 0, output(run_dir)[-2000:]
    assert re.search(r"rank 1 has waited 0 min for rank 0 to prepare the data", output(run_dir))


@pytest.mark.slow
def test_a_rank_0_stopped_in_a_preparation_is_named_within_the_limit(tmp_path):
    run_dir = tmp_path / "run"
    run = torchrun(run_dir, "--limit", "0.05", "--prepare", "600")
    deadline = time.monotonic() + 60
    while len(ranks := ranks_of(run)) < 2 or "preparing" not in output(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks[0].suspend()
    try:
        assert ranks[1].wait(timeout=10) != 0
    finally:
        kill([*ranks, psutil.Process(run.pid)])
        run.wait()
    assert re.search(r"rank 0 has given no sign of life for \d s while it was to prepare", output(run_dir))


def test_a_second_signal_while_a_checkpoint_is_written_does_not_lose_it(tmp_path):
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "tests.chaos.program",
        str(run_dir),
        *LONG,
        "--asynchronous",
        "--slow_disk",
        "1",
    ]
    run = subprocess.Popen(command, cwd=ROOT)
    wait_until_trained(run, run_dir)
    run.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while not any(run_dir.glob("checkpoints/.saving-*")):
        assert time.monotonic() < deadline
    time.sleep(1.3)
    assert any(run_dir.glob("checkpoints/.saving-*"))
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == PREEMPTED
    log = (run_dir / "log.txt").read_text()
    step = newest_step(run_dir)
    assert log.index("saved " + str(run_dir)) < log.index(f"asked to leave (SIGTERM): saved at step {step}")


def test_who_is_asked_to_leave_during_a_validation_saves_first_and_validates_at_the_next_start(tmp_path):
    run_dir = tmp_path / "run"
    options = ["--steps", "4", "--every", "0", "--validation", "2", "--pause", "0.1"]
    command = [sys.executable, "-m", "tests.chaos.program", str(run_dir), *options]
    run = subprocess.Popen(command, cwd=ROOT)
    wait_until_trained(run, run_dir, steps=1)
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == PREEMPTED
    assert "validation_loss" not in (run_dir / "metrics.jsonl").read_text()
    assert newest_step(run_dir) == 2
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4]
