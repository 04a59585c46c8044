"""`consolidate_state_dict`, as ZeroRedundancyOptimizer has it, the warning of who saves without it, and torch's hooks."""

import io
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from polargrad_dist import CheckpointError, ConfigError, PolarGrad, PolarGradM
from tests.gloo import run_ranks
from tests.optim.training import backward, build

RULE = {"momentum": "momentum_first", "oracle": "svd"}
BAG = {"shapes": {"square": (8, 8), "tall": (50, 4), "bias": (7,)}}


def _stepped(mode: str, rank: int, world: int) -> tuple[nn.Module, PolarGrad]:
    model, optimizer = build(mode, BAG, RULE)
    backward(mode, model, optimizer, rank, world, 0)
    optimizer.step()
    return model, optimizer


def _warned(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "state_dict() holds" in str(w.message)]


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[i].keys() == b[i].keys() and all(torch.equal(a[i][k], b[i][k]) for k in a[i]) for i in a
    )


def _consolidating(rank: int, world: int, mode: str) -> dict:
    fresh = build(mode, BAG, RULE)[1]
    out: dict = {"before a step": _warned(fresh.state_dict)}
    model, optimizer = _stepped(mode, rank, world)
    out["torch asks"] = _warned(lambda: get_optimizer_state_dict(model, optimizer))
    out["unconsolidated"] = [_warned(optimizer.state_dict), _warned(optimizer.state_dict)]
    whole = optimizer.full_state_dict()
    optimizer.consolidate_state_dict()
    mine = optimizer.state_dict()
    out["whole"] = "place" not in mine and _same(mine["state"], whole["state"])
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    out["saved"] = buffer.getvalue()
    # what torch's checkpoint gets is every rank's part, consolidated or not
    theirs = get_optimizer_state_dict(model, optimizer)
    out["parts"] = any(isinstance(v, DTensor) for state in theirs["state"].values() for v in state.values())
    set_optimizer_state_dict(model, optimizer, theirs)
    out["after a load"] = "place" in optimizer.state_dict()
    optimizer.consolidate_state_dict(to=1)
    out["to 1"] = "place" not in optimizer.state_dict()
    backward(mode, model, optimizer, rank, world, 1)
    optimizer.step()
    out["after a step"] = "place" in optimizer.state_dict()
    return out


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_consolidated_state_is_whole_on_the_rank_that_saves_until_it_changes(mode):
    results = run_ranks(_consolidating, 2, mode)
    for rank, out in enumerate(results):
        assert out["before a step"] == out["torch asks"] == []
        assert [len(words) for words in out["unconsolidated"]] == [1, 0]
        assert "call consolidate_state_dict() on all ranks" in out["unconsolidated"][0][0]
        assert out["whole"] == (rank == 0)
        assert out["to 1"] == (rank == 1)
        assert out["parts"]
        assert out["after a load"]
        assert out["after a step"]
    saved = torch.load(io.BytesIO(results[0]["saved"]), weights_only=True)
    alone = build("single", BAG, RULE)[1]
    alone.load_state_dict(saved)
    for loaded in run_ranks(_loading, 2, mode, results[0]["saved"]):
        assert _same(loaded, alone.state_dict()["state"])


def _saving(rank: int, world: int, mode: str, folder: str) -> dict:
    """The optimizer handed to torch's checkpoint as it is, as any object with a ``state_dict``."""
    _, optimizer = _stepped(mode, rank, world)
    optimizer.consolidate_state_dict()
    assert _warned(lambda: dcp.save({"optimizer": optimizer}, checkpoint_id=folder)) == []
    return optimizer.full_state_dict()["state"]


def _reading(rank: int, world: int, mode: str, folder: str) -> dict:
    optimizer = build(mode, BAG, RULE)[1]
    dcp.load({"optimizer": optimizer}, checkpoint_id=folder)
    return optimizer.full_state_dict()["state"]


def test_torchs_checkpoint_takes_the_optimizer_itself_to_another_number_of_ranks(tmp_path):
    saved, _ = run_ranks(_saving, 2, "ddp", str(tmp_path))
    assert _same(_reading(0, 1, "single", str(tmp_path)), saved)
    for loaded in run_ranks(_reading, 3, "fsdp", str(tmp_path)):
        assert _same(loaded, saved)


def _loading(rank: int, world: int, mode: str, saved: bytes) -> dict:
    optimizer = build(mode, BAG, RULE)[1]
    optimizer.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
    return optimizer.full_state_dict()["state"]


def test_the_state_dict_of_one_process_is_whole_and_loads_on_two():
    _, optimizer = _stepped("single", 0, 1)
    optimizer.consolidate_state_dict()
    assert _warned(optimizer.state_dict) == []
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    for loaded in run_ranks(_loading, 2, "ddp", buffer.getvalue()):
        assert _same(loaded, optimizer.full_state_dict()["state"])


def _on_some_ranks(rank: int, world: int) -> list[str]:
    mesh = DeviceMesh("cpu", torch.tensor([1, 2]))
    generator = torch.Generator().manual_seed(0)
    everywhere, some = (torch.randn(6, 6, generator=generator) for _ in range(2))
    params = [("everywhere", nn.Parameter(everywhere))]
    if rank > 0:
        params.append(("some", nn.Parameter(distribute_tensor(some, mesh, [Shard(0)]))))
    optimizer = PolarGradM(params, lr=0.1)
    said = []
    for to in (0, 3, 1):
        try:
            optimizer.consolidate_state_dict(to)
            said.append(str(sorted(optimizer.state_dict()["state"])))
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_a_rank_that_stores_nothing_of_a_parameter_is_no_place_for_the_whole():
    for rank, said in enumerate(run_ranks(_on_some_ranks, 3)):
        assert said[0].startswith("rank 0 stores no part of some, expected a part of every parameter")
        assert said[1] == "to is 3, expected a rank in [0, 3)"
        assert said[2] == ("[0]" if rank == 0 else "[0, 1]")


def test_torchs_hooks_around_loading_and_stepping_are_called():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = PolarGradM([p], lr=0.1)
    p.grad = torch.eye(4)
    optimizer.step()
    saved = optimizer.state_dict()
    called = []

    def renamed(_, state):
        called.append("pre")
        state["param_groups"] = state.pop("groups of old")

    optimizer.register_load_state_dict_pre_hook(renamed)
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("post"))
    optimizer.register_step_pre_hook(lambda *_: called.append("step"))
    optimizer.register_step_post_hook(lambda *_: called.append("stepped"))
    old = {"state": saved["state"], "groups of old": saved["param_groups"]}
    optimizer.load_state_dict(old)
    assert "groups of old" in old
    optimizer.step()
    assert called == ["pre", "post", "step", "stepped"]
    with pytest.raises(CheckpointError, match="groups of old"):
        optimizer.load_state_dict(saved)


def test_a_state_that_a_hook_returns_is_the_one_that_is_loaded():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = PolarGradM([p], lr=0.1)
    other = PolarGradM([nn.Parameter(torch.ones(4, 4))], lr=0.3)
    optimizer.register_load_state_dict_pre_hook(lambda *_: other.state_dict())
    optimizer.load_state_dict({})
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_other_optimizers_are_refused_by_name():
    from polargrad_dist.integrations.accelerate import consolidate_before_save
    from polargrad_dist.integrations.transformers import ConsolidateBeforeSave

    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ConfigError, match="was given a AdamW, expected a PolarGrad"):
        consolidate_before_save(SimpleNamespace(), SimpleNamespace(optimizer=adamw))
    with pytest.raises(ConfigError, match="was given no optimizer"):
        consolidate_before_save(SimpleNamespace())
    with pytest.raises(ConfigError, match="found a AdamW, expected a PolarGrad"):
        ConsolidateBeforeSave().on_train_begin(None, None, None, optimizer=adamw)


@pytest.mark.parametrize(
    ("control", "strategy", "only_model", "calls"),
    [
        ({"should_save": True}, "steps", False, 1),
        ({"should_save": True}, "steps", True, 0),
        ({"should_save": False}, "steps", False, 0),
        ({"should_save": False, "should_evaluate": True}, "best", False, 1),
        ({"should_save": False, "should_evaluate": True}, "steps", False, 0),
    ],
)
@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end"])
def test_the_callback_puts_the_state_together_where_a_save_may_follow(
    monkeypatch, control, strategy, only_model, calls, event
):
    from polargrad_dist.integrations import transformers

    called = []
    optimizer = SimpleNamespace(consolidate_state_dict=lambda: called.append(1))
    monkeypatch.setattr(transformers, "AcceleratorState", SimpleNamespace)
    arguments = SimpleNamespace(save_strategy=strategy, save_only_model=only_model)
    control = SimpleNamespace(**({"should_evaluate": False} | control))
    getattr(transformers.ConsolidateBeforeSave(), event)(arguments, None, control, optimizer=optimizer)
    assert len(called) == calls


def test_saves_on_a_signal_are_refused_where_several_processes_would_have_to_take_part(monkeypatch):
    from polargrad_dist.integrations.transformers import ConsolidateBeforeSave

    optimizer = PolarGradM([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    arguments = SimpleNamespace(enable_jit_checkpoint=True)
    ConsolidateBeforeSave().on_train_begin(arguments, None, None, optimizer=optimizer)
    monkeypatch.setattr(PolarGrad, "agreement", "several")
    with pytest.raises(ConfigError, match="enable_jit_checkpoint is true on several processes"):
        ConsolidateBeforeSave().on_train_begin(arguments, None, None, optimizer=optimizer)
