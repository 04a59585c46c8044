"""Full disks, lost permissions and killed processes while a checkpoint is being written: real ones."""

from __future__ import annotations

import os
import random
import resource
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from polargrad_dist.errors import CheckpointError
from polargrad_dist.trainer.checkpoint import CheckpointConfig, CheckpointStore, checkpoints_in, verify
from tests.checkpoint.toy import assert_equal, saved_run, state, zeros_like
from tests.gloo import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def large(step, rank):
    return {
        "model/large": torch.full((50_000,), float(step)),
        f"optim/{rank}": torch.full((50_000,), float(step)),
    }


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill_the_disk_of_rank_1(rank, world, folder, asynchronous, on_failure):
    """Saves 1 well, fails at 2 on rank 1 alone, saves 3 well. Returns what each rank saw."""
    store = CheckpointStore(folder, CheckpointConfig(asynchronous=asynchronous, on_failure=on_failure))
    seen = [store.save(1, large(1, rank)), store.wait()]
    if rank == 1:
        limit_file_size(100_000)
    try:
        seen.append(store.save(2, large(2, rank)))
        seen.append(store.wait())
    except CheckpointError as error:
        seen.append(str(error))
    # Training goes on
    dist.all_reduce(torch.ones(1))
    limit_file_size(resource.RLIM_INFINITY)
    seen += [store.save(3, large(3, rank)), store.wait(), store.failed]
    left = sorted(os.listdir(folder))
    dist.barrier()
    return seen, left


def test_a_disk_full_on_one_rank_raises_on_all_and_leaves_the_older_ones(tmp_path):
    results = run_ranks(fill_the_disk_of_rank_1, 2, str(tmp_path), False, None)
    for seen, left in results:
        assert seen[:2] == [True, True]
        assert "step 2 was not saved: cannot write" in seen[2]
        assert "rank-00001.bin: File too large (rank 1)" in seen[2]
        assert f"Older checkpoints in {tmp_path} are untouched" in seen[2]
        assert seen[3:] == [True, False, 1]
        assert left == ["step-00000001", "step-00000003"]
    verify(tmp_path / "step-00000001")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_after_a_failed_save_if_configured(tmp_path, asynchronous):
    on_failure = None if asynchronous else "continue"
    for seen, left in run_ranks(fill_the_disk_of_rank_1, 2, str(tmp_path), asynchronous, on_failure):
        assert seen == [True, True, asynchronous, False, True, True, 1]
        assert left == ["step-00000001", "step-00000003"]


def test_a_failed_background_save_ends_the_run_at_the_next_call_if_configured(tmp_path):
    for seen, _ in run_ranks(fill_the_disk_of_rank_1, 2, str(tmp_path), True, "raise"):
        assert seen[2] is True
        assert "step 2 was not saved: cannot write" in seen[3]


def run_out_of_memory(rank, world, folder):
    """Rank 1 has no memory for its copy in the background; rank 0 has."""
    store = CheckpointStore(folder, CheckpointConfig(asynchronous=True))
    tensors = {f"optim/{rank}": torch.zeros(80 << 20)}
    if rank == 1:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (280 << 20), resource.RLIM_INFINITY))
    store.save(1, tensors)
    # Training goes on
    dist.all_reduce(torch.ones(1))
    saved = store.wait()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    return saved, store.failed, os.listdir(folder)


def test_a_rank_without_memory_for_its_copy_fails_the_save_on_all_ranks(tmp_path):
    assert run_ranks(run_out_of_memory, 2, str(tmp_path)) == [(False, 1, [])] * 2


def lose_permission(rank, world, folder):
    store = CheckpointStore(folder)
    store.save(1, state(1, rank, world))
    if rank == 0:
        os.chmod(folder, 0o555)
    dist.barrier()
    if os.getuid() == 0:
        # Root may write anywhere
        os.setuid(65534)
    with pytest.raises(CheckpointError, match=r"step 2 was not saved: .*Permission denied.*"):
        store.save(2, state(2, rank, world))
    with pytest.raises(CheckpointError, match=r"Permission denied"):
        store.save(3, state(3, rank, world))
    return store.newest_valid().name


def test_permission_lost_raises_on_all_ranks_and_leaves_the_older_ones():
    # pytest's own folders are closed to other users
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        assert run_ranks(lose_permission, 2, f"{folder}/checkpoints") == ["step-00000001"] * 2


def save_where_rank_1_sees_no_folder(rank, world, folder):
    store = CheckpointStore(folder if rank == 0 else f"{folder}-of-another-machine")
    with pytest.raises(CheckpointError, match=r"all ranks must see one file system.*rank 1"):
        store.save(1, state(1, rank, world))
    dist.barrier()
    return os.listdir(folder)


def test_a_rank_that_does_not_see_the_folder_raises_on_all(tmp_path):
    assert run_ranks(save_where_rank_1_sees_no_folder, 2, str(tmp_path)) == [[], []]


def save_into_a_file(rank, world, folder):
    store = CheckpointStore(Path(folder) / "file")
    with pytest.raises(CheckpointError, match="was not saved"):
        store.save(1, state(1, rank, world))


def test_a_folder_that_cannot_be_made_raises_on_all(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run_ranks(save_into_a_file, 2, str(tmp_path))


def test_what_a_killed_save_left_is_removed_at_the_next_start(tmp_path):
    saved_run(tmp_path, [1])
    for name in (".saving-step-00000002", ".removing-step-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.bin").write_bytes(b"half")
    CheckpointStore(tmp_path).resume_point()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_looking_at_checkpoints_disturbs_no_save_in_progress(tmp_path):
    saved_run(tmp_path, [1])
    (tmp_path / ".saving-step-00000002").mkdir()
    store = CheckpointStore(tmp_path, identity={"model": {"width": 8}})
    store.load(store.newest_valid(), {})
    assert (tmp_path / ".saving-step-00000002").is_dir()


def die_while_the_other_saves(rank, world, folder):
    store = CheckpointStore(folder)
    store.save(1, large(1, rank))
    if rank == 1:
        Path(folder, "dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        store.save(2, large(2, rank))
    except Exception as error:
        Path(folder, "error").write_text(f"{type(error).__name__} after {time.monotonic() - started:.1f} s")
    os._exit(0)


def test_a_rank_that_dies_makes_the_others_fail_not_hang(tmp_path):
    with pytest.raises(AssertionError, match="rank 1 died"):
        run_ranks(die_while_the_other_saves, 2, str(tmp_path))
    deadline = time.monotonic() + 20
    while not (tmp_path / "error").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "error").exists(), "rank 0 still waits for the dead one"
    assert CheckpointStore(tmp_path).newest_valid().name == "step-00000001"


def save_for_ever(rank, world, folder, asynchronous):
    """Resumes, checks that every value is of one step, and saves step after step until it is killed."""
    config = CheckpointConfig(keep_last=2, asynchronous=asynchronous)
    store = CheckpointStore(folder, config)
    path, step = store.resume_point(), 0
    if path is not None:
        got = zeros_like(state(0, rank, world) | large(0, rank))
        step = store.load(path, got).step
        assert_equal(got, state(step, rank, world) | large(step, rank))
    Path(folder).parent.joinpath(f"pid-{rank}").write_text(str(os.getpid()))
    while True:
        step += 1
        store.save(step, state(step, rank, world) | large(step, rank))
        time.sleep(0.01)


def kill_both(base, delay, while_saving):
    """``delay`` seconds after both ranks run (and then once a save has begun): SIGKILL to both at once."""
    pids = [base / "pid-0", base / "pid-1"]
    while not all(pid.exists() and pid.read_text() for pid in pids):
        time.sleep(0.005)
    time.sleep(delay)
    while while_saving and not any(base.glob("checkpoints/.saving-*")):
        pass
    for pid in pids:
        os.kill(int(pid.read_text()), signal.SIGKILL)
        pid.unlink()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_kill_at_any_moment_leaves_a_valid_checkpoint_and_a_run_that_resumes(tmp_path, asynchronous):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance, newest = random.Random(seed), 0
    for kill in range(5):
        delay = chance.uniform(0.02, 0.3)
        killer = threading.Thread(target=kill_both, args=(tmp_path, delay, kill % 2 == 0))
        killer.start()
        with pytest.raises(AssertionError, match="died with exit code -9"):
            run_ranks(save_for_ever, 2, str(tmp_path / "checkpoints"), asynchronous, timeout=30)
        killer.join()
        found = CheckpointStore(tmp_path / "checkpoints").newest_valid()
        # Killed before the first save was done
        if found is None and newest == 0:
            continue
        assert found == checkpoints_in(tmp_path / "checkpoints")[-1], "the newest is always whole"
        step = verify(found).step
        assert step >= newest, "and no save is lost"
        newest = step
    assert newest > 5
