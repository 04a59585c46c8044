"""The batch scripts that people submit, on a real Slurm: preempted, requeued, resumed, and the same weights at the end."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster, missing

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it into the wood\n" * 400
STEPS = 40


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def arguments(folder: Path, run: str) -> list[str]:
    text = folder / "text.txt"
    text.write_text(TEXT)
    return [
        *("--model.width", "32", "--model.layers", "2", "--model.heads", "2"),
        *(
            "--data.source",
            "files",
            "--data.paths",
            json.dumps([str(text)]),
            "--data.cache",
            str(folder / "cache"),
        ),
        *("--data.tokenizer.vocab_size", "300", "--data.validation_fraction", "0.1"),
        *(
            "--trainer.run_dir",
            str(folder / run),
            "--trainer.steps",
            str(STEPS),
            "--trainer.global_batch",
            "4",
        ),
        *("--trainer.micro_batch", "2", "--trainer.sequence_length", "32", "--trainer.device", "cpu"),
        *(
            "--trainer.checkpoint.every",
            "1000",
            "--trainer.logging.every",
            "1",
            "--trainer.evaluation.every",
            "0",
        ),
    ]


def submit(cluster: Cluster, folder: Path, script: str, args: list[str], *options: str) -> str:
    out = cluster.call(
        "sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=2",
        f"--chdir={ROOT}", f"--output={folder}/job.log", *options, f"launch/slurm/{script}.sbatch", *args,
    )  # fmt: skip
    return out.strip()


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def final_tensors(run: Path) -> dict[str, str]:
    """The checksum of every tensor of the last checkpoint."""
    last = max((run / "checkpoints").glob("step-*"))
    shown = json.loads((last / "manifest.json").read_text())
    return {
        name: json.dumps(entry, sort_keys=True)
        for name, entry in shown["tensors"].items()
        if name.startswith(("model/", "optim/"))
    }


def test_a_preempted_job_is_requeued_and_ends_with_the_weights_of_an_undisturbed_one(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    job = submit(cluster, tmp_path, "single_node", arguments(tmp_path, "preempted"))
    cluster.wait_for(job, {"RUNNING"}, 30)
    deadline = time.monotonic() + 90
    while steps_done(tmp_path / "preempted") < 5:
        assert time.monotonic() < deadline, (tmp_path / "job.log").read_text()[-2000:]
        time.sleep(0.1)
    cluster.call("scancel", "--signal=USR1", job)
    cluster.wait_for(job, {"PENDING"}, 60)
    assert steps_done(tmp_path / "preempted") < STEPS
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm itself waits two minutes
    assert cluster.wait_for(job, {"COMPLETED", "FAILED"}, 120) == "COMPLETED", (
        tmp_path / "job.log"
    ).read_text()[-2000:]
    assert "saved and preempted: back into the queue" in (tmp_path / "job.log").read_text()

    straight = submit(cluster, tmp_path, "single_node", arguments(tmp_path, "straight"))
    assert cluster.wait_for(straight, {"COMPLETED", "FAILED"}, 120) == "COMPLETED"
    assert final_tensors(tmp_path / "preempted") == final_tensors(tmp_path / "straight")

    def losses(run: str) -> list:
        records = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        return [(r["step"], r["loss"]) for r in records if "loss" in r]

    assert losses("preempted") == losses("straight")


@pytest.mark.parametrize(
    "script", sorted((ROOT / "launch").rglob("*sh")) + sorted((ROOT / "launch").rglob("*.sbatch"))
)
def test_scripts_are_well_formed(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
