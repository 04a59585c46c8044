"""The race's batch script: where each seed's run goes, which is where `experiments.benchmark` looks for it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def submitted(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The script as task 3 of an array, with a job.sh that only shows what train.py would be given."""
    folder = tmp_path / "launch" / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.sh").write_text('printf "%s\\n" "$@"\n')
    environment = os.environ | {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_ARRAY_TASK_ID": "3",
        "RUNS": "/runs",
    }
    script = ROOT / "launch" / "slurm" / "race.sbatch"
    return subprocess.run(
        ["bash", str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "given", [["--config", "configs/race-muon.yaml"], ["--config=configs/race-muon.yaml"]]
)
def test_a_seed_s_run_lies_where_the_verdict_looks(tmp_path, given):
    done = submitted(tmp_path, *given, "--trainer.micro_batch", "32")
    own = ["--trainer.seed", "3", "--trainer.run_dir", "/runs/race-muon/seed-3"]
    assert done.stdout.split("\n")[:-1] == [*given, "--trainer.micro_batch", "32", *own]


def test_without_a_configuration_it_says_what_to_give(tmp_path):
    done = submitted(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected one such as --config configs/race-muon.yaml" in done.stderr
