"""Saving, loading, keeping and resuming, in one process and in several."""

from __future__ import annotations

import json
import logging
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from polargrad_dist.errors import CheckpointError, ConfigError
from polargrad_dist.trainer.checkpoint import (
    CheckpointConfig,
    CheckpointStore,
    checkpoints_in,
    restore_rng_state,
    rng_state,
    verify,
)
from polargrad_dist.trainer.checkpoint.__main__ import main
from polargrad_dist.trainer.checkpoint.ranks import deal
from tests.checkpoint.toy import assert_equal, saved_run, state, value, zeros_like
from tests.gloo import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def names(folder):
    return [path.name for path in checkpoints_in(folder)]


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    saved_run(tmp_path, [3])
    store = CheckpointStore(tmp_path, identity={"model": {"width": 8}})
    got = zeros_like(state(3))
    loaded = store.load(store.resume_point(), got)
    assert_equal(got, state(3))
    assert (loaded.step, loaded.objects, loaded.world_size) == (3, {"sample": 30}, 1)
    assert store.last_saved == 3


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
)
def test_every_dtype_comes_back(tmp_path, dtype):
    tensors = {
        "a": torch.arange(6).view(2, 3).to(dtype),
        "transposed": torch.arange(6).view(2, 3).to(dtype).T,
    }
    store = CheckpointStore(tmp_path)
    store.save(1, tensors)
    got = {name: torch.zeros(t.shape, dtype=dtype) for name, t in tensors.items()}
    store.load(store.newest_valid(), got)
    for name, tensor in tensors.items():
        assert torch.equal(got[name].to(torch.complex128), tensor.to(torch.complex128))


def test_the_manifest_is_checked_by_the_systems_own_tool(tmp_path):
    saved_run(tmp_path, [1])
    subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=tmp_path / "step-00000001", check=True)


def test_a_checkpoint_is_little_more_than_its_tensors(tmp_path):
    CheckpointStore(tmp_path).save(1, {f"model/{i}": torch.randn(256, 256) for i in range(16)})
    on_disk = sum(file.stat().st_size for file in (tmp_path / "step-00000001").iterdir())
    assert on_disk <= 1.02 * 16 * 256 * 256 * 4


def test_random_generators_continue_where_they_were_saved(tmp_path):
    random.gauss(0, 1), np.random.standard_normal()
    store = CheckpointStore(tmp_path)
    store.save(1, {"a": torch.zeros(1)}, per_rank=rng_state())

    def draw():
        return random.gauss(0, 1), random.random(), *np.random.standard_normal(3), *torch.rand(3).tolist()

    expected = draw()
    loaded = store.load(store.newest_valid(), {"a": torch.zeros(1)})
    restore_rng_state(loaded.per_rank)
    assert draw() == expected


def test_the_last_the_round_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=2, keep_every=4))
    losses = [5.0, 3.0, 1.0, float("nan"), 2.0, 2.5, None, 2.2, 2.4, 2.3]
    for step, loss in enumerate(losses, 1):
        store.save(step, {"a": torch.zeros(1)}, validation_loss=loss)
    store.wait()
    expected = [f"step-{step:08d}" for step in (3, 4, 8, 9, 10)]
    assert names(tmp_path) == expected
    # A later start knows the losses from the manifests.
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=2, keep_every=4))
    store.save(11, {"a": torch.zeros(1)}, validation_loss=1.5)
    store.wait()
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 4, 8, 10, 11)]
    assert {path.name for path in tmp_path.iterdir()} == set(names(tmp_path)), "nothing half removed stays"


def test_a_valid_checkpoint_is_never_written_over(tmp_path):
    saved_run(tmp_path, [1])
    other = CheckpointStore(tmp_path, identity={"model": {"width": 8}})
    before = (tmp_path / "step-00000001" / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists and is valid"):
        other.save(1, state(2))
    assert (tmp_path / "step-00000001" / "manifest.json").read_bytes() == before


def test_saving_a_step_twice_writes_it_once(tmp_path):
    store = saved_run(tmp_path, [1])
    assert store.save(1, state(1))
    assert names(tmp_path) == ["step-00000001"]


def test_a_copy_in_the_background_is_of_the_moment_of_the_call(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(asynchronous=True))
    for step in (1, 2, 3):
        tensors = state(step)
        assert store.save(step, tensors)
        for tensor in tensors.values():
            tensor.fill_(0)
    assert store.close()
    for step in (1, 2, 3):
        got = zeros_like(state(step))
        CheckpointStore(tmp_path).load(tmp_path / f"step-{step:08d}", got)
        assert_equal(got, state(step))


def save_while_training(rank, world, folder):
    """Collectives of training run on the default group while three background saves run on theirs."""
    store = CheckpointStore(folder, CheckpointConfig(asynchronous=True), timeout=None)
    large = {
        "model/large": torch.full((2 << 20,), 1.0),
        f"optim/{rank}.momentum": torch.full((1 << 20,), 1.0),
    }
    reduced = 0
    for step in range(1, 4):
        store.save(step, large)
        while True:
            dist.all_reduce(torch.ones(1000))
            reduced += 1
            # Ranks leave the loop together, as in training.
            done = torch.tensor(float(store._pending.done()))
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done and reduced >= 50 * step:
                break
        for tensor in large.values():
            tensor.add_(1)
    return store.close(), store.last_saved, reduced


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    for saved, last, reduced in run_ranks(save_while_training, 2, str(tmp_path)):
        assert saved
        assert last == 3
        assert reduced >= 150
    for step in (1, 2, 3):
        got = {"model/large": torch.zeros(2 << 20), "optim/1.momentum": torch.zeros(1 << 20)}
        CheckpointStore(tmp_path).load(tmp_path / f"step-{step:08d}", got)
        assert all((tensor == step).all() for tensor in got.values())


def save_and_load_per_rank(rank, world, folder):
    store = CheckpointStore(folder)
    if not checkpoints_in(store.folder):
        dist.barrier()
        store.save(1, state(1, rank, world), per_rank={"rng": torch.tensor([rank, world])})
    loaded = store.load(store.resume_point(), zeros_like(state(1, rank, world)))
    return loaded.per_rank and loaded.per_rank["rng"].tolist()


def test_every_rank_gets_its_own_generators_back_at_the_same_world_size_only(tmp_path):
    assert run_ranks(save_and_load_per_rank, 3, str(tmp_path)) == [[0, 3], [1, 3], [2, 3]]
    assert run_ranks(save_and_load_per_rank, 2, str(tmp_path)) == [None, None]


def test_what_several_ranks_hold_is_written_once_and_evenly():
    held = ({"a": 40, "b": 30, "c": 20, "mine": 10}, {"a": 40, "b": 30, "c": 20}, {"a": 40, "b": 30, "c": 20})
    mine = deal(held)
    assert sorted(name for names in mine for name in names) == ["a", "b", "c", "mine"]
    assert "mine" in mine[0]
    assert max(sum(held[r][n] for n in mine[r]) for r in range(3)) == 40


def save_different_steps(rank, world, folder):
    with pytest.raises(CheckpointError, match=r"different steps, \(1, 2\)"):
        CheckpointStore(folder).save(1 + rank, state(1))


def test_ranks_that_save_different_steps_are_told(tmp_path):
    run_ranks(save_different_steps, 2, str(tmp_path))
    assert names(tmp_path) == []


def test_missing_names_and_other_shapes_are_named(tmp_path):
    store = saved_run(tmp_path, [1])
    with pytest.raises(CheckpointError, match=r"has no model/new; model/newer: it is of another model"):
        store.load(store.newest_valid(), {"model/new": torch.zeros(1), "model/newer": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"has model/embed \(37, 8\), not \(37, 9\)"):
        store.load(store.newest_valid(), {"model/embed": torch.zeros(37, 9)})


def ask_for_more_on_rank_1(rank, world, folder):
    store = CheckpointStore(folder, identity={"model": {"width": 8}})
    wanted = {"model/embed": torch.zeros(37, 8)} | ({"model/new": torch.zeros(1)} if rank else {})
    with pytest.raises(CheckpointError, match=r"has no model/new.*\(rank 1\)"):
        store.load(store.newest_valid(), wanted)


def test_a_name_missing_on_one_rank_raises_on_all(tmp_path):
    saved_run(tmp_path, [1])
    run_ranks(ask_for_more_on_rank_1, 2, str(tmp_path))


IDENTITY = {
    "model": {"width": 8, "layers": (1, 2)},
    "tokenizer": {"sha256": "aa"},
    "data": {"shards": [{"name": "a", "tokens": 5}], "seed": 1},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"width": 9, "layers": (1, 2)}}, "model.width is 8 in the checkpoint and 9"),
        ({"model": {"width": 8, "layers": (1, 2), "bias": True}}, "model.bias is true in this run"),
        ({"tokenizer": {"sha256": "ab"}}, 'of another tokenizer: tokenizer.sha256 is "aa"'),
        ({"data": {"shards": [{"name": "b", "tokens": 5}], "seed": 1}}, r"\[0\].name is .*allow_other_data"),
        ({"data": {"shards": [], "seed": 1}}, "shards is a list of 1 in the checkpoint and a list of 0"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_something_else_is_refused_with_the_difference(tmp_path, change, message):
    CheckpointStore(tmp_path, identity=IDENTITY).save(1, state(1))
    same = CheckpointStore(tmp_path, identity=IDENTITY)
    assert same.load(same.newest_valid(), {}).step == 1
    other = CheckpointStore(tmp_path, identity=IDENTITY | change)
    with pytest.raises(CheckpointError, match=message):
        other.load(other.newest_valid(), {})


def test_other_data_is_accepted_when_asked_for_and_nothing_else(tmp_path, caplog):
    CheckpointStore(tmp_path, identity=IDENTITY).save(1, state(1))
    config = CheckpointConfig(allow_other_data=True)
    store = CheckpointStore(tmp_path, config, identity=IDENTITY | {"data": {"seed": 2}})
    assert store.load(store.newest_valid(), {}).step == 1
    assert "with other data: data.seed is 1 in the checkpoint and 2 in this run" in caplog.text
    store = CheckpointStore(tmp_path, config, identity=IDENTITY | {"model": {}})
    with pytest.raises(CheckpointError, match="of another model"):
        store.load(store.newest_valid(), {})


def test_a_fresh_folder_has_nothing_to_resume(tmp_path):
    assert CheckpointStore(tmp_path / "none").resume_point() is None


def test_resume_never_refuses_a_folder_that_holds_checkpoints(tmp_path):
    saved_run(tmp_path, [1])
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume is never"):
        CheckpointStore(tmp_path, CheckpointConfig(resume="never")).resume_point()


def test_going_back_sets_the_newer_ones_aside_and_a_restart_stays_on_the_new_branch(tmp_path):
    saved_run(tmp_path, [1, 2, 3])
    config = CheckpointConfig(resume=str(tmp_path / "step-00000001"))
    store = CheckpointStore(tmp_path, config, identity={"model": {"width": 8}})
    assert store.resume_point().name == "step-00000001"
    store.load(tmp_path / "step-00000001", {})
    assert names(tmp_path) == ["step-00000001"]
    assert (tmp_path / "aside-step-00000003").is_dir()
    store.save(2, state(7))
    assert CheckpointStore(tmp_path).resume_point().name == "step-00000002"
    again = CheckpointStore(tmp_path, config, identity={"model": {"width": 8}})
    assert again.resume_point().name == "step-00000002", "the same command goes on, and not back once more"
    again.load(again.resume_point(), {})
    again.save(3, state(8))
    assert CheckpointStore(tmp_path, config).resume_point().name == "step-00000003"


def test_a_run_begun_at_another_runs_checkpoint_goes_on_from_its_own_when_restarted(tmp_path):
    saved_run(tmp_path / "first", [5])
    config = CheckpointConfig(resume=str(tmp_path / "first" / "step-00000005"))
    store = CheckpointStore(tmp_path / "second", config, identity={"model": {"width": 8}})
    begin = store.resume_point()
    assert begin == tmp_path / "first" / "step-00000005"
    store.load(begin, {})
    store.save(6, state(6))
    again = CheckpointStore(tmp_path / "second", config, identity={"model": {"width": 8}})
    assert again.resume_point().name == "step-00000006"
    again.load(again.resume_point(), {})
    again.save(7, state(7))
    third = CheckpointStore(tmp_path / "second", config, identity={"model": {"width": 8}})
    assert third.resume_point().name == "step-00000007"
    elsewhere = CheckpointConfig(resume=str(tmp_path / "second" / "step-00000006"))
    with pytest.raises(CheckpointError, match="a run that did not begin there"):
        CheckpointStore(tmp_path / "first", elsewhere).resume_point()


def test_what_was_set_aside_is_resumed_from_only_under_its_former_name(tmp_path):
    saved_run(tmp_path, [1, 2, 3])
    aside = tmp_path / "aside-step-00000002"
    (tmp_path / "step-00000002").rename(aside)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"expected a checkpoint step-…: rename one that was set aside"
        ):
            CheckpointStore(tmp_path, CheckpointConfig(resume=str(aside))).resume_point()
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_dtype_that_cannot_hold_what_was_saved_is_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"a": torch.tensor([1e38, 2.5]), "b": torch.tensor([1.5, math.inf])})
    given = {"b": torch.zeros(2, dtype=torch.float16)}
    store.load(store.newest_valid(), given)
    assert given["b"].tolist() == [1.5, math.inf]
    for dtype, said in (
        (torch.float16, "values that torch.float16 cannot hold"),
        (torch.int64, "not torch.int64"),
    ):
        with pytest.raises(CheckpointError, match=said):
            store.load(store.newest_valid(), {"a": torch.zeros(2, dtype=dtype)})


def test_a_checkpoint_is_the_same_by_a_path_through_links(tmp_path):
    saved_run(tmp_path / "run", [5, 6])
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    for folder, place in (("link", "run"), ("run", "link")):
        config = CheckpointConfig(resume=str(tmp_path / place / "step-00000005"))
        store = CheckpointStore(tmp_path / folder, config, identity={"model": {"width": 8}})
        assert store.resume_point() == tmp_path / "run" / "step-00000005"


@pytest.mark.parametrize("bad", [{"keep_last": 1}, {"every": -1}, {"threads": 0}])
def test_an_impossible_configuration_is_refused_with_its_key(bad):
    with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(bad))} is {next(iter(bad.values()))}"):
        CheckpointConfig(**bad)


def test_objects_that_are_not_json_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        CheckpointStore(tmp_path).save(1, state(1), objects={"x": object()})
    assert names(tmp_path) == []


def test_the_command_lists_shows_and_verifies(tmp_path, capsys):
    saved_run(tmp_path / "checkpoints", [1, 2])
    assert main(["list", str(tmp_path)]) == 0
    assert "step-00000002" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "checkpoints" / "step-00000002")]) == 0
    assert "model/embed  float32  37 × 8" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 0
    (tmp_path / "checkpoints" / "step-00000001" / "rank-00000.bin").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    assert "rank-00000.bin is missing" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nowhere")]) == 2


def test_the_command_runs_as_a_module(tmp_path):
    saved_run(tmp_path, [1])
    command = [sys.executable, "-m", "polargrad_dist.trainer.checkpoint", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("valid ")


def test_a_checkpoint_says_what_made_it(tmp_path):
    store = CheckpointStore(tmp_path, configuration={"model": {"layers": 2}}, identity=IDENTITY)
    store.save(4, {"a": value("a", (3,), 4)}, validation_loss=1.25)
    manifest = verify(store.newest_valid())
    assert manifest.configuration == {"model": {"layers": 2}}
    assert manifest.versions["torch"] == str(torch.__version__)
    assert manifest.validation_loss == 1.25
    assert manifest.identity == json.loads(json.dumps(IDENTITY))


def test_what_is_skipped_is_logged_with_the_reason(tmp_path, caplog):
    store = saved_run(tmp_path, [1, 2])
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert store.newest_valid().name == "step-00000001"
    assert "skipping checkpoint step-00000002" in caplog.text
    assert "manifest.json is missing" in caplog.text
