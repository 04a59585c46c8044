"""Weights that are not finite: never saved, never called intact, and the way back is named."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from polargrad_dist.errors import CheckpointError, PolarError, TrainingError
from polargrad_dist.optim import muon_rule
from polargrad_dist.trainer import World
from polargrad_dist.trainer.checkpoint import CheckpointConfig, CheckpointStore, Manifest, checkpoints_in
from polargrad_dist.trainer.config import SafetyConfig, StrategyConfig
from polargrad_dist.trainer.health import not_finite, reason_to_skip
from tests.gloo import run_ranks
from tests.trainer.toy import rules, settings, trainer


def poison(t, role: str, step: int, rank: int = 0) -> None:
    """The optimizer's ``step``-th step leaves one NaN in a parameter of ``role`` on ``rank``."""
    made, count = t.optimizer.step, []

    def poisoned(*args, **options):
        made(*args, **options)
        count.append(1)
        if len(count) == step and t.world.rank == rank:
            group = next(group for group in t.optimizer.param_groups if group["role"] == role)
            weights = group["params"][-1].detach()
            weights = weights.to_local() if hasattr(weights, "to_local") else weights
            weights.view(-1)[-1] = float("nan")

    t.optimizer.step = poisoned


def saved_steps(folder: Path) -> list[int]:
    """The steps on the disk, after a look at every weight and moment of each."""
    steps = []
    for path in checkpoints_in(folder / "checkpoints"):
        manifest = Manifest.read(path)
        tensors = {
            name: torch.empty(saved.shape, dtype=saved.dtype) for name, saved in manifest.tensors.items()
        }
        CheckpointStore(folder / "checkpoints", identity=manifest.identity).load(path, tensors)
        assert not_finite(tensors) == []
        steps.append(manifest.step)
    return steps


@pytest.mark.parametrize("role", ["hidden", "embed", "head", "scalar"])
@pytest.mark.parametrize("step", [6, 8, 12], ids=["between saves", "at a save", "the last"])
def test_a_step_that_poisons_weights_is_never_saved_and_the_way_back_works(tmp_path, role, step):
    t = trainer(settings(tmp_path))
    t.data.validation = None
    poison(t, role, step)
    with pytest.raises(TrainingError, match="not finite") as caught:
        t.fit()
    assert saved_steps(tmp_path) == ([4] if step <= 8 else [4, 8])
    message = str(caught.value)
    assert f"the checkpoint of step {saved_steps(tmp_path)[-1]} is intact" in message
    found = re.search(r"--trainer\.checkpoint\.resume (\S+) --trainer\.allow_changes true", message)
    again = settings(tmp_path, checkpoint=CheckpointConfig(every=4, resume=found[1]), allow_changes=True)
    assert trainer(again).fit().exit_code == 0


def test_a_final_validation_that_is_not_finite_is_exit_1_and_not_saved(tmp_path):
    t = trainer(settings(tmp_path))
    poison(t, "head", 12)
    assert t.fit().exit_code == 1
    assert saved_steps(tmp_path) == [4, 8]
    log = (tmp_path / "log.txt").read_text()
    assert (
        "the run ended in a validation loss of nan: its weights are not kept; the checkpoint of step 8" in log
    )


def test_an_absurd_learning_rate_leaves_no_checkpoint_and_says_so(tmp_path):
    optimizer = replace(rules(), hidden=muon_rule(1e38, oracle="svd"))
    with pytest.raises(TrainingError, match="no checkpoint was saved yet: lower the learning rates"):
        trainer(settings(tmp_path, clip_norm=None), optimizer=optimizer).fit()
    assert saved_steps(tmp_path) == []


def test_an_oracle_that_fails_at_a_save_step_names_the_checkpoint_before_it(tmp_path):
    t = trainer(settings(tmp_path))
    made, count = t.optimizer.step, []

    def fail(*args):
        count.append(1)
        if len(count) == 8:
            raise PolarError("the polar factor of head.weight is not finite")
        made(*args)

    t.optimizer.step = fail
    with pytest.raises(TrainingError, match=r"step 8: the polar factor .*the checkpoint of step 4 is intact"):
        t.fit()
    assert saved_steps(tmp_path) == [4]


def _poison_rank_1(rank, world, folder, strategy, asynchronous):
    here = World(rank, world, rank, torch.device("cpu"), dist.group.WORLD)
    config = settings(
        folder,
        strategy=StrategyConfig(strategy),
        checkpoint=CheckpointConfig(every=4, asynchronous=asynchronous),
    )
    t = trainer(config, here)
    poison(t, "hidden", 8, rank=1)
    try:
        t.fit()
    except TrainingError as error:
        return str(error)


@pytest.mark.parametrize(("strategy", "asynchronous"), [("ddp", True), ("fsdp", False)])
def test_weights_poisoned_on_one_rank_stop_the_save_on_all_and_that_rank_is_named(
    tmp_path, strategy, asynchronous
):
    told = run_ranks(_poison_rank_1, 2, str(tmp_path), strategy, asynchronous)
    assert told[0] == told[1]
    assert re.search(r"step 8 is not saved: model/\S+ on rank 1 is not finite.*step 4 is intact", told[0])
    assert saved_steps(tmp_path) == [4]


def _overflow_on_rank_1(rank, world, folder):
    """A norm that overflows on one rank alone: both must skip, or one waits for ever."""
    here = World(rank, world, rank, torch.device("cpu"), dist.group.WORLD)
    t = trainer(settings(folder, steps=3), here)
    norm, count = t.optimizer.clip_grad_norm_, []

    def clip(*args):
        count.append(1)
        return norm(*args) * (float("inf") if rank == 1 and len(count) == 2 else 1.0)

    t.optimizer.clip_grad_norm_ = clip
    return t.fit().exit_code, t.progress.skipped


def test_ranks_that_disagree_on_the_norm_skip_together(tmp_path):
    assert run_ranks(_overflow_on_rank_1, 2, str(tmp_path), timeout=30.0) == [(0, 1)] * 2


def test_a_checkpoint_with_weights_that_are_not_finite_is_not_gone_on_from(tmp_path):
    t = trainer(settings(tmp_path, steps=4))
    t.fit()
    tensors = t.tensors()
    tensors["model/head.weight"] = torch.full_like(tensors["model/head.weight"], float("inf"))
    store = CheckpointStore(
        tmp_path / "checkpoints", identity=t.store.identity, run=(tmp_path / "run_id").read_text()
    )
    store.save(5, tensors, objects={"progress": vars(t.progress) | {"step": 5}})
    with pytest.raises(CheckpointError, match=r"model/head\.weight on rank 0 that is not finite"):
        trainer(settings(tmp_path, steps=8)).fit()


def test_a_loss_spike_is_skipped_where_that_is_asked_for():
    safety = SafetyConfig(spike_sigma=3.0, spike_window=6)
    recent = [3.0, 2.9, 3.1, 3.0, 2.9, 3.1]
    assert reason_to_skip(3.2, 1.0, recent, safety) is None
    assert "spike" in reason_to_skip(3.3, 1.0, recent, safety)
    assert reason_to_skip(9.0, 1.0, recent[1:], safety) is None, "the window is not full yet"


def test_not_finite_looks_at_every_float_type_and_at_no_integer():
    tensors = {
        "good": torch.full((3,), 3e38),
        "bad": torch.tensor([1.0, float("nan")]),
        "half": torch.tensor([float("-inf")], dtype=torch.bfloat16),
        "none": torch.empty(0),
        "bits": torch.tensor([-1], dtype=torch.int16),
    }
    assert not_finite(tensors) == ["bad", "half"]
