"""PolarGrad as DeepSpeed's client optimizer on real gloo ranks, against native DDP on the same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polargrad_dist import CheckpointError, ConfigError, PolarError
from tests.gloo import run_ranks
from tests.integrations import zero

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'polargrad-dist[deepspeed]'")

OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


def started(stage: int, world: int, model: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    """An engine and its client optimizer."""
    import deepspeed

    from polargrad_dist.integrations.deepspeed import ZeroPolarGrad, without_inference_kernel

    deepspeed.utils.logger.setLevel("ERROR")
    without_inference_kernel()
    rules, extra = options.pop("rules", zero.RULES), options.pop("extra", {})
    model = zero.Small() if model is None else model
    optimizer = ZeroPolarGrad(model, **rules)
    config = zero.configuration(stage, world, **options) | extra
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer


def compared(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Everything that needs DeepSpeed's import, which is most of its time, once."""
    out: dict[str, Any] = {}
    native = {k: zero.natively(rank, world, 20, k) for k in (1, 2)}
    plans = {}
    for stage, accumulation, options in ((0, 1, {}), (1, 1, {}), (2, 2, {}), (3, 1, {}), (3, 2, OFFLOADED)):
        engine, optimizer = started(stage, world, accumulation=accumulation, **options)
        zero.train(engine, range(10), rank, accumulation)
        tag = f"{stage}{len(options)}"
        engine.save_checkpoint(folder, tag=tag)
        zero.train(engine, range(10, 20), rank, accumulation)
        undisturbed = zero.whole(engine)
        out["apart", tag] = zero.apart(undisturbed, native[accumulation])
        # Into the engine that went on, whose optimizer has views of what the load replaces.
        engine.load_checkpoint(folder, tag=tag)
        zero.train(engine, range(10, 20), rank, accumulation)
        out["same engine", tag] = zero.apart(zero.whole(engine), undisturbed)
        plans[tag] = optimizer.plan(), dict(optimizer.bound().traffic.calls)
        engine.destroy()
        engine, _ = started(stage, world, accumulation=accumulation, **options)
        engine.load_checkpoint(folder, tag=tag)
        zero.train(engine, range(10, 20), rank, accumulation)
        out["new engine", tag] = zero.apart(zero.whole(engine), undisturbed)
        engine.destroy()
    out["planned"] = {tag: plan.traffic_of(rank) for tag, (plan, _) in plans.items()}
    out["owners"] = {e.name: e.owners for e in plans["10"][0].entries}
    return out


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(compared, 2, str(tmp_path_factory.mktemp("zero")), timeout=300)


@pytest.mark.parametrize("tag", ["00", "10", "20", "30", "31"])
def test_every_stage_trains_as_native_ddp(two_ranks, tag):
    for found in two_ranks:
        assert found["apart", tag] <= 1e-6


@pytest.mark.parametrize("tag", ["00", "10", "20", "30", "31"])
def test_state_survives_a_checkpoint_and_is_bound_anew(two_ranks, tag):
    for found in two_ranks:
        assert found["same engine", tag] == found["new engine", tag] == 0.0
