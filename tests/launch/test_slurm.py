"""The batch scripts that people submit, on a real Slurm: preempted, requeued, resumed, and the same weights at the end."""

from pathlib import Path

import pytest
import yaml

from tests.chaos.harness import assert_same_end, final_state
from tests.launch.cluster import Cluster, missing
from tests.launch.tiny import STEPS, options, wait_for_step

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

ENDS = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def submit(cluster: Cluster, script: str, arguments: list[str], log: Path, *overrides: str) -> str:
    return cluster.call(
        "sbatch", "--parsable", "--cpus-per-task=1", f"--output={log}", *overrides,
        f"launch/slurm/{script}.sbatch", *arguments,
    ).strip()  # fmt: skip


def preempt(cluster: Cluster, job: str) -> None:
    """What Slurm does before the time limit; returns when the job is back in the queue, and lets it start at once."""
    cluster.call("scancel", "--signal=USR1", job)
    cluster.wait_for(job, {"PENDING"}, 60)
    # By itself Slurm waits two minutes
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+4")


def finish(cluster: Cluster, job: str, log: Path) -> None:
    assert cluster.wait_for(job, ENDS, 90) == "COMPLETED", log.read_text()[-2000:]


def test_a_preempted_job_is_requeued_and_ends_with_the_weights_of_an_undisturbed_run(
    cluster, folder, straight
):
    run_dir, log = folder / "preempted", folder / "preempted.log"
    shape = ("--ntasks-per-node=2", "--gpus-per-node=2")
    job = submit(cluster, "single_node", options(folder, "preempted"), log, *shape)
    wait_for_step(run_dir, 5, log.read_text)
    preempt(cluster, job)
    assert 5 <= final_state(run_dir)[0] < STEPS
    finish(cluster, job, log)
    assert log.read_text().count("preempted (exit code 75): back into the queue") == 1
    assert_same_end(run_dir, straight)


def test_two_nodes_with_a_task_each_find_each_other_and_end_with_the_same_weights(cluster, folder, straight):
    log = folder / "two_nodes.log"
    shape = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
    job = submit(cluster, "multi_node", options(folder, "two_nodes"), log, *shape)
    finish(cluster, job, log)
    assert "NumNodes=2" in cluster.call("scontrol", "show", "job", job)
    assert_same_end(folder / "two_nodes", straight)


def test_an_array_task_preempted_before_its_first_step_is_requeued_and_the_others_are_not(cluster, folder):
    logs = [folder / f"array_{task}.log" for task in (0, 1)]
    shape = (
        "--array=0-1",
        f"--export=ALL,RUNS={folder / 'array'}",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
    )
    job = submit(cluster, "array", options(folder, "unused"), folder / "array_%a.log", *shape)
    cluster.until(lambda: f"{job}_1.0" in cluster.call("squeue", "--steps", "-h", "-o", "%i"), "task 1", 30)
    # The last task bears the number of the whole array, which must not make Slurm requeue the others.
    preempt(cluster, f"{job}_1")
    for task in (0, 1):
        finish(cluster, f"{job}_{task}", logs[task])
    assert [log.read_text().count("back into the queue") for log in logs] == [0, 1]
    assert "REQUEUE" not in logs[0].read_text()
    runs = [folder / "array" / f"seed-{task}" for task in (0, 1)]
    assert [final_state(run)[0] for run in runs] == [STEPS, STEPS]
    assert [yaml.safe_load((run / "config.yaml").read_text())["trainer"]["seed"] for run in runs] == [0, 1]
