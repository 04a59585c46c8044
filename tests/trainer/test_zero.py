"""``strategy: deepspeed``: every ZeRO stage trains as DDP does, and resumes under any strategy and world size."""

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
from polargrad_dist.trainer.checkpoint import CheckpointConfig
from polargrad_dist.trainer.config import StrategyConfig
from polargrad_dist.trainer.world import World
from tests.gloo import run_ranks
from tests.trainer.toy import settings, trainer

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install '.[deepspeed]'")

# Of a parameter's or state's largest element, after 12 steps in fp32
TOLERANCE = 5e-6


def here(rank: int, world: int) -> World:
    return World(rank, world, rank, torch.device("cpu"), dist.new_group(backend="gloo"))


def ran(
    world: World,
    folder: str,
    strategy: StrategyConfig,
    origin: str | None = None,
    precision: str = "fp32",
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Trains 12 steps, from step 8 of an ``origin``, and returns whole weights and state."""
    checkpoint = CheckpointConfig(every=4, resume=f"{origin}/checkpoints/step-00000008" if origin else "auto")
    config = settings(
        folder,
        strategy=strategy,
        checkpoint=checkpoint,
        precision=precision,
        diagnostics=DiagnosticsConfig(every=4),
    )
    made = trainer(config, world, **options)
    made.fit()
    tensors = {n: full(t).clone() for n, t in made.tensors().items()}
    if hasattr(made.placed, "run"):
        # A step that is skipped for its loss has finite gradients, which must be gone before the next.
        made.stepper._backward(made.data.train.batches_from(0))
        made.optimizer.zero_grad()
        after = made.tensors()
        assert all(torch.equal(full(after[n]), t) for n, t in tensors.items())
        made.placed.run.engine.destroy()
    return tensors


def full(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-12)) for n in b)


def zero(stage: int) -> StrategyConfig:
    return StrategyConfig("deepspeed", zero_stage=stage)


def every_stage(rank: int, world: int, folder: str) -> dict[str, Any]:
    place, out = here(rank, world), {}
    native = ran(place, f"{folder}/ddp", StrategyConfig())
    poisoned = ran(place, f"{folder}/ddp-poisoned", StrategyConfig(), poison={30})
    for stage in (0, 1, 2, 3):
        found = ran(place, f"{folder}/{stage}", zero(stage))
        out["apart", stage] = apart(found, native)
        out["poisoned", stage] = apart(
            ran(place, f"{folder}/{stage}-poisoned", zero(stage), poison={30}), poisoned
        )
        out["from ddp", stage] = apart(
            ran(place, f"{folder}/ddp-{stage}", zero(stage), f"{folder}/ddp"), native
        )
        out["same stage", stage] = apart(
            ran(place, f"{folder}/{stage}-{stage}", zero(stage), f"{folder}/{stage}"), found
        )
    mixed = ran(place, f"{folder}/mixed", StrategyConfig(), precision="bf16-mixed")
    out["fp32 and mixed"] = apart(mixed, native)
    for stage in (1, 3):
        found = ran(place, f"{folder}/mixed{stage}", zero(stage), precision="bf16-mixed")
        out["mixed", stage] = apart(found, mixed)
    out["to ddp", 3] = apart(ran(place, f"{folder}/3-ddp", StrategyConfig(), f"{folder}/3"), native)
    return out


def on_one_rank(rank: int, world: int, folder: str) -> dict[int, float]:
    """Goes on alone with what two ranks began; the global batch is the same."""
    native = ran(World(), f"{folder}/alone", StrategyConfig())
    return {
        stage: apart(ran(World(), f"{folder}/{stage}-alone", zero(stage), f"{folder}/{stage}"), native)
        for stage in (2, 3)
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("zero")
    return folder, run_ranks(every_stage, 2, str(folder), timeout=300)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_as_ddp(trained, stage):
    for found in trained[1]:
        assert found["apart", stage] <= TOLERANCE


def test_mixed_precision_is_that_of_ddp(trained):
    """In stage 3 DeepSpeed's own linear layer rounds otherwise: as far apart as roundings are, and less than fp32 is."""
    for found in trained[1]:
        assert found["mixed", 1] <= TOLERANCE
        assert found["fp32 and mixed"] > 1e-3
        assert found["mixed", 3] < 0.5 * found["fp32 and mixed"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_is_skipped_as_under_ddp(trained, stage):
    for found in trained[1]:
        assert found["poisoned", stage] <= TOLERANCE


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_resumes_to_the_bit_and_from_and_to_ddp(trained, stage):
    for found in trained[1]:
        assert found["same stage", stage] == 0.0
        assert found["from ddp", stage] <= TOLERANCE
        assert found["to ddp", 3] <= TOLERANCE


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
                a["diagnostics"][name]["gradient"]["nuclear_norm"],
                kinds["gradient"]["nuclear_norm"],
                rel_tol=1e-4,
            )
            assert a["diagnostics"][name].keys() == kinds.keys()
    assert any("polar" in row for row in theirs)
    assert any("diagnostics" in row for row in theirs)


def test_a_run_goes_on_on_another_number_of_ranks(trained):
    assert max(run_ranks(on_one_rank, 1, str(trained[0]), timeout=200)[0].values()) <= TOLERANCE


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
