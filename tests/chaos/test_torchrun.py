"""Preemption and restarts as torchrun does them."""

from __future__ import annotations

import signal
import time

import pytest

from tests.chaos.harness import assert_same_end, final_state, kill, last_logged, torchrun, workers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
STEPS = ["--steps", "120", "--every", "10", "--pause", "0.02"]


def wait_until_trained(run, run_dir, steps):
    deadline = time.monotonic() + 60
    while last_logged(run_dir) < steps:
        assert run.poll() is None, run_dir.with_suffix(".out").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("torchrun") / "straight"
    assert torchrun(run_dir, *STEPS).wait(timeout=120) == 0
    return run_dir


def test_sigterm_to_torchrun_saves_and_ends_within_its_thirty_seconds(tmp_path, straight):
    run_dir = tmp_path / "run"
    run = torchrun(run_dir, *STEPS)
    wait_until_trained(run, run_dir, 25)
    ranks, before = workers(run), last_logged(run_dir)
    asked = time.monotonic()
    run.send_signal(signal.SIGTERM)
    run.wait(timeout=60)
    took = time.monotonic() - asked
    assert took < 25, "torchrun would have killed the ranks"
    assert not any(rank.is_running() for rank in ranks)
    step, _ = final_state(run_dir)
    assert step >= before
    assert step == last_logged_whole(run_dir), "saved at the very step where it left"
    assert "asked to leave (SIGTERM)" in (run_dir / "log.txt").read_text()
    assert torchrun(run_dir, *STEPS).wait(timeout=120) == 0
    assert_same_end(run_dir, straight)


def last_logged_whole(run_dir):
    return len((run_dir / "metrics.jsonl").read_text().splitlines())


def test_max_restarts_resumes_by_itself_from_the_newest_checkpoint(tmp_path, straight):
    run_dir = tmp_path / "run"
    run = torchrun(run_dir, *STEPS, restarts=2)
    for steps in (25, 55):
        wait_until_trained(run, run_dir, steps)
        kill(workers(run)[:1])
        time.sleep(1)
    assert run.wait(timeout=120) == 0, (tmp_path / "run.out").read_text()[-3000:]
    log = (run_dir / "log.txt").read_text()
    assert log.count("resumed from") == 2 * 2, "two restarts, two ranks"
    assert_same_end(run_dir, straight)
