"""Terminals, pipes and disks that fail under a run: it goes on, or saves and leaves. Real processes."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time

import pytest

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer import PREEMPTED
from polargrad_dist.trainer.checkpoint import checkpoints_in, verify
from tests.commandline import ROOT
from tests.gloo import run_ranks
from tests.trainer.toy import settings, trainer


def start(run_dir, *options, **streams) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.trainer.toy_run", str(run_dir), *options]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(command, cwd=ROOT, **streams)


def steps_in(run_dir) -> list[int]:
    """The steps of the training rows of metrics.jsonl; every line of it must be whole."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


def test_a_reader_of_stderr_that_goes_away_costs_nothing(tmp_path):
    run = start(tmp_path, "--pause", "0.02")
    run.stderr.readline()
    run.stderr.close()
    assert run.wait(timeout=60) == 0
    assert steps_in(tmp_path) == list(range(1, 13))


def test_a_full_disk_behind_stderr_and_log_costs_nothing(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with open("/dev/full", "w") as full:
        assert start(tmp_path, stderr=full, stdout=full).wait(timeout=60) == 0
    assert steps_in(tmp_path) == list(range(1, 13))
    assert verify(checkpoints_in(tmp_path / "checkpoints")[-1]).step == 12


def test_a_disk_that_is_full_for_two_seconds_costs_no_row(tmp_path):
    run = start(tmp_path, "--steps", "60", "--pause", "0.05", "--full_disk")
    _, told = run.communicate(timeout=60)
    assert run.returncode == 0, told.decode()
    assert "its rows are kept and tried again" in told.decode(), "the disk was never full"
    assert steps_in(tmp_path) == list(range(1, 61))


def test_a_lost_terminal_makes_the_run_save_and_leave(tmp_path):
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))

    def take_the_terminal():
        # Tests that run under nohup ignore it, and so would the run.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(other_end, termios.TIOCSCTTY, 0)

    run = start(
        tmp_path,
        *("--steps", "2000", "--pause", "0.02"),
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        preexec_fn=take_the_terminal,
    )
    os.close(other_end)
    seen = b""
    deadline = time.monotonic() + 60
    while not re.search(rb"\b[2-9]/2000", seen):
        assert time.monotonic() < deadline, seen
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert run.wait(timeout=60) == PREEMPTED
    assert "asked to leave (SIGHUP)" in (tmp_path / "log.txt").read_text()
    step = verify(checkpoints_in(tmp_path / "checkpoints")[-1]).step
    assert steps_in(tmp_path) == list(range(1, step + 1))


@pytest.mark.parametrize("what", ["log.txt", "run_id"])
def test_a_run_directory_that_cannot_be_written_is_one_sentence(tmp_path, what):
    (tmp_path / what).mkdir()
    run = start(tmp_path)
    _, told = run.communicate(timeout=60)
    assert run.returncode == 2
    assert len(told.decode().strip().splitlines()) == 1, told.decode()
    assert what in told.decode()


def _start_as_nobody(rank, world, folder):
    # Root may write anywhere
    os.setuid(65534)
    with pytest.raises(
        ConfigError, match=r"cannot be written \(Permission denied\): choose another trainer.run_dir"
    ):
        trainer(settings(folder))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_read_only_run_directory_is_one_sentence():
    # pytest's own folders are closed to other users
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        run_ranks(_start_as_nobody, 1, folder)
