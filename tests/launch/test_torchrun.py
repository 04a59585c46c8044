"""launch/torchrun.sh with the real trainer: a SIGTERM, two "machines" of which one loses its process, other world sizes."""

import re
import signal
import subprocess
import time

import psutil
import pytest

from tests.chaos.harness import assert_same_end, final_state, kill, last_logged, records, workers
from tests.launch.cluster import free_ports
from tests.launch.tiny import ROOT, STEPS, options, wait_for_step

SCRIPTS = sorted((ROOT / "launch").rglob("*.sh")) + sorted((ROOT / "launch").rglob("*.sbatch"))


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_and_moved_to_two_machines_where_a_rank_dies_ends_as_the_undisturbed_one(
    folder, straight, torchrun
):
    run_dir, out = folder / "disturbed", folder / "disturbed.out"
    run = torchrun(out, options(folder, "disturbed"), PROCESSES=2)
    wait_for_step(run_dir, 25, out.read_text)
    asked = time.monotonic()
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) != 0
    assert time.monotonic() - asked < 25, "torchrun would have killed the ranks after 30 s"
    stopped_at, _ = final_state(run_dir)
    assert 25 <= stopped_at < STEPS
    assert f"asked to leave (SIGTERM): saved at step {stopped_at}" in out.read_text()

    places = {
        "NODES": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_ports(1)[0],
        "PROCESSES": 1,
        "RESTARTS": 1,
    }
    machines = [torchrun(out, options(folder, "disturbed"), NODE_RANK=n, **places) for n in range(2)]
    wait_for_step(run_dir, 65, out.read_text)
    kill(workers(machines[1]))
    assert last_logged(run_dir) < STEPS
    assert [machine.wait(timeout=90) for machine in machines] == [0, 0], out.read_text()[-3000:]
    log = (run_dir / "log.txt").read_text()
    assert log.count("resumed from") == 2 * 2, "two resumptions on two ranks"
    assert_same_end(run_dir, straight)


def test_killed_on_two_ranks_and_gone_on_with_on_one_and_on_two_it_sees_the_same_batches(
    folder, straight, torchrun
):
    """The micro-batch of four fits one rank; on two it is divided anew."""
    run_dir, out = folder / "resized", folder / "resized.out"
    arguments = options(folder, "resized", micro_batch=4)
    for ranks, until in ((2, 25), (1, 65), (2, STEPS)):
        run = torchrun(out, arguments, PROCESSES=ranks)
        if until == STEPS:
            assert run.wait(timeout=90) == 0, out.read_text()[-3000:]
            break
        wait_for_step(run_dir, until, out.read_text)
        kill([*workers(run), psutil.Process(run.pid)])
        run.wait()
    log = (run_dir / "log.txt").read_text()
    assert re.findall(r"^batch .*: (\d) ranks? x (\d) x (\d)$", log, re.MULTILINE) == [
        ("2", "1", "2"),
        ("1", "1", "4"),
        ("2", "1", "2"),
    ]
    assert "rank 0 INFO resumed from" in log
    assert final_state(run_dir)[0] == STEPS
    resized, undisturbed = records(run_dir), records(straight)
    assert resized.keys() == undisturbed.keys()
    assert max(abs(resized[n][0] - undisturbed[n][0]) for n in undisturbed) < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_is_lost_is_gone_on_without_and_taken_in_again(folder, torchrun):
    run_dir, out = folder / "elastic", folder / "elastic.out"
    arguments = options(folder, "elastic", micro_batch=4, steps=3000)
    places = {"NODES": "1:2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0], "PROCESSES": 1}
    first, second = (torchrun(out, arguments, NODE_RANK=n, RESTARTS=5, **places) for n in range(2))
    wait_for_step(run_dir, 25, out.read_text)
    kill([*workers(second), psutil.Process(second.pid)])
    second.wait()
    alone = last_logged(run_dir) + 200
    wait_for_step(run_dir, alone, out.read_text)
    second = torchrun(out, arguments, NODE_RANK=1, RESTARTS=5, **places)
    assert [machine.wait(timeout=400) for machine in (first, second)] == [0, 0], out.read_text()[-3000:]
    ranks = re.findall(r"^batch .*: (\d) rank", (run_dir / "log.txt").read_text(), re.MULTILINE)
    assert [n for i, n in enumerate(ranks) if i == 0 or n != ranks[i - 1]] == ["2", "1", "2"]
    assert sorted(records(run_dir)) == list(range(1, 3001))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
