"""What launch/slurm/job.sh says of an srun that came back; `srun` and `scontrol` are stand-ins, the trainer is real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commandline import ROOT


@pytest.fixture
def job(tmp_path):
    """Runs job.sh with ``srun``, and other programs by name, as the given shell lines; returns its exit code and output."""

    def run(srun: str, *, folder: Path = tmp_path, **programs: str) -> tuple[int, str]:
        for name, body in ({"srun": srun, "scontrol": 'echo "node0"'} | programs).items():
            program = tmp_path / name
            program.write_text(f"#!/usr/bin/env bash\n{body}\n")
            program.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node0",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "TMPDIR": str(folder),
            "PYTHON": sys.executable,
        }
        done = subprocess.run(
            ["bash", "-c", 'source launch/slurm/job.sh "$@"', "job", str(tmp_path / "run")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_run_that_is_done_is_finished(job, tmp_path):
    code, told = job(f'exec {sys.executable} -m tests.trainer.toy_run "{tmp_path / "run"}"')
    assert code == 0
    assert "finished\n" in told
    assert not list(tmp_path.glob("polargrad-7-*"))


def test_an_srun_that_came_back_without_the_run_being_done_is_not(job):
    code, told = job("exit 0")
    assert code == 1
    assert "finished\n" not in told
    assert "before the run was finished, as after a node's failure" in told


@pytest.mark.parametrize("kind", ["missing", "no folder"])
def test_a_finished_run_is_finished_where_tmpdir_cannot_be_used(job, tmp_path, kind):
    folder = tmp_path / "temporary"
    if kind == "no folder":
        folder.write_text("")
    code, told = job('touch "$POLARGRAD_FINISHED"', folder=folder)
    assert (code, told) == (0, "finished\n")
    code, told = job("exit 0", folder=folder)
    assert code == 1
    assert "before the run was finished" in told


def test_without_any_place_for_the_finished_file_the_code_of_srun_counts(job):
    code, told = job('[ -z "$POLARGRAD_FINISHED" ]', mktemp="exit 1")
    assert (code, told) == (0, "finished\n")
    assert job("exit 3", mktemp="exit 1")[0] == 3


def test_a_preempted_run_goes_back_into_the_queue(job):
    code, told = job("exit 75")
    assert code == 75
    assert "back into the queue" in told
