"""One process at a time in a run directory, from the very first moment on."""

import json
import logging

from polargrad_dist.trainer import rundir
from tests.trainer.test_output import start, steps_in


def test_two_fresh_starts_of_one_run_directory_train_it_once(tmp_path):
    run_dir = tmp_path / "run"
    both = [start(run_dir, "--steps", "12", "--pause", "0.4") for _ in range(2)]
    told = [run.communicate(timeout=90)[1].decode() for run in both]
    assert [run.returncode for run in both] == [0, 0], told
    assert sum("another process trains in" in text for text in told) == 1
    assert sum("nothing is left to do" in text for text in told) == 1
    assert steps_in(run_dir) == list(range(1, 13))
    manifest = json.loads((run_dir / "checkpoints" / "step-00000012" / "manifest.json").read_text())
    assert manifest["run"] == (run_dir / "run_id").read_text()


def test_a_finished_file_that_cannot_be_created_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("POLARGRAD_FINISHED", str(tmp_path / "gone" / "file"))
    # A run of an earlier test in this process has cut it off
    monkeypatch.setattr(logging.getLogger("polargrad_dist"), "propagate", True)
    rundir.tell_launcher()
    assert "gone/file cannot be created (No such file or directory)" in caplog.text
