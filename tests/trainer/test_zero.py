"""`strategy: deepspeed` in the trainer: every ZeRO stage trains as DDP does, and resumes under any strategy and world."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from polargrad_dist.diagnostics import DiagnosticsConfig
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.config import StrategyConfig
from polargrad_dist.trainer.world import World
from tests.gloo import run_ranks
from tests.trainer.toy import settings, trainer

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'polargrad-dist[deepspeed]'")


def here(rank: int, world: int) -> World:
    return World(rank, world, rank, torch.device("cpu"), dist.new_group(backend="gloo"))


def ran(
    world: World, folder: str, steps: int, strategy: StrategyConfig, **options: Any
) -> dict[str, torch.Tensor]:
    """Trains, and returns whole weights and state."""
    made = trainer(
        settings(
            folder, steps=steps, strategy=strategy, allow_changes=True, diagnostics=DiagnosticsConfig(every=4)
        ),
        world,
        **options,
    )
    made.fit()
    tensors = {
        n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in made.tensors().items()
    }
    if hasattr(made.placed, "run"):
        made.placed.run.engine.destroy()
    return tensors


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-12)) for n in b)


def zero(stage: int) -> StrategyConfig:
    return StrategyConfig("deepspeed", zero_stage=stage)


def every_stage(rank: int, world: int, folder: str) -> dict[str, Any]:
    place, out = here(rank, world), {}
    native = ran(place, f"{folder}/ddp", 12, StrategyConfig())
    poisoned = ran(place, f"{folder}/ddp-poisoned", 8, StrategyConfig(), poison={30})
    for stage in (0, 1, 2, 3):
        out["apart", stage] = apart(ran(place, f"{folder}/{stage}", 12, zero(stage)), native)
        out["poisoned", stage] = apart(
            ran(place, f"{folder}/{stage}-poisoned", 8, zero(stage), poison={30}), poisoned
        )
        # The first 8 steps under this stage, the next under another, the last under DDP.
        ran(place, f"{folder}/mixed{stage}", 8, zero(stage))
        ran(place, f"{folder}/mixed{stage}", 10, zero((stage + 1) % 4))
        out["resumed", stage] = apart(ran(place, f"{folder}/mixed{stage}", 12, StrategyConfig()), native)
    return out


def one_rank(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Goes on alone with what two ranks began; the global batch is the same."""
    native = ran(World(), f"{folder}/alone", 12, StrategyConfig())
    return {stage: apart(ran(World(), f"{folder}/{stage}", 12, zero(stage)), native) for stage in (2, 3)}


def begun(rank: int, world: int, folder: str) -> None:
    for stage in (2, 3):
        ran(here(rank, world), f"{folder}/{stage}", 8, zero(stage))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("zero")
    return folder, run_ranks(every_stage, 2, str(folder), timeout=300)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_as_ddp(trained, stage):
    for found in trained[1]:
        assert found["apart", stage] <= 1e-6


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_is_skipped_as_under_ddp(trained, stage):
    for found in trained[1]:
        assert found["poisoned", stage] <= 1e-6


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_goes_on_under_another_stage_and_under_ddp(trained, stage):
    for found in trained[1]:
        assert found["resumed", stage] <= 1e-6


@pytest.mark.parametrize("stage", [1, 3])
def test_figures_are_those_of_ddp(trained, stage):
    """Norms, statistics of the oracle and diagnostics, of all groups, though DeepSpeed steps one after the other."""
    ours, theirs = (
        [json.loads(line) for line in (trained[0] / name / "metrics.jsonl").read_text().splitlines()]
        for name in (str(stage), "ddp")
    )
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        if "grad_norm" in b:
            assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-5)
        for role, figures in b.get("polar", {}).items():
            assert math.isclose(a["polar"][role]["nuclear_norm"], figures["nuclear_norm"], rel_tol=1e-4)
        for name, kinds in b.get("diagnostics", {}).items():
            assert math.isclose(
                a["diagnostics"][name]["gradient"]["nuclear"], kinds["gradient"]["nuclear"], rel_tol=1e-4
            )
            assert a["diagnostics"][name].keys() == kinds.keys()
    assert any("polar" in row for row in theirs)
    assert any("diagnostics" in row for row in theirs)


def test_a_run_goes_on_on_another_number_of_ranks(tmp_path):
    run_ranks(begun, 2, str(tmp_path), timeout=200)
    assert max(run_ranks(one_rank, 1, str(tmp_path), timeout=200)[0].values()) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy": StrategyConfig("ddp", zero_stage=2)}, "expected null"),
        ({"strategy": zero(4)}, "expected 0, 1, 2 or 3"),
        ({"strategy": zero(2), "precision": "bf16"}, "use 'bf16-mixed' or 'fp32'"),
        ({"strategy": zero(2), "compile": True}, "compile with strategy 'deepspeed'"),
        ({"strategy": zero(3), "activation_checkpointing": True}, "at ZeRO stage 3"),
        ({"strategy": StrategyConfig("deepspeed", zero_stage=0, cpu_offload=True)}, "at ZeRO stage 0"),
    ],
)
def test_what_was_not_tried_is_refused(changes, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        settings(tmp_path, **changes).check(2)
