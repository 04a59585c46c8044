"""PolarGrad as DeepSpeed's client optimizer on real gloo ranks, against native DDP on the same batches."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from polargrad_dist import CheckpointError, ConfigError, PolarError
from tests.gloo import run_ranks
from tests.integrations import zero

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install '.[deepspeed]'")

OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


def ready() -> None:
    """DeepSpeed on the process group that is there, quiet, without compiling anything."""
    import deepspeed

    from polargrad_dist.integrations.deepspeed import without_inference_kernel

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    without_inference_kernel()
    deepspeed.init_distributed("gloo")


def started(stage: int, world: int, model: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    """An engine and its client optimizer."""
    import deepspeed

    from polargrad_dist.integrations.deepspeed import ZeroPolarGrad

    rules, extra = options.pop("rules", zero.RULES), options.pop("extra", {})
    model = zero.Small() if model is None else model
    optimizer = ZeroPolarGrad(model, **rules)
    config = zero.configuration(stage, world, **options) | extra
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer


def compared(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Everything that needs DeepSpeed's import, which is most of its time, once."""
    ready()
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


def test_matrices_that_lie_whole_on_a_rank_stay_there(two_ranks):
    """Stages 1 and 2 cut between parameters, and across one per group and border; stage 3 cuts each."""
    owners = two_ranks[0]["owners"]
    assert owners == two_ranks[1]["owners"]
    whole = {f"experts[{i}]": [0] for i in range(3)} | {"fused.weight[0]": [0], "down.weight": [1]}
    assert {name: owners[name] for name in whole} == whole
    sent = {tag: sum(found["planned"][tag]["all_to_all"] for found in two_ranks) for tag in ("10", "30")}
    assert sent["10"] < 0.85 * sent["30"]
    assert all("all_gather" not in found["planned"][tag] for found in two_ranks for tag in sent)


def odd_ones(rank: int, world: int, folder: str) -> dict[str, Any]:
    import deepspeed

    ready()
    out: dict[str, Any] = {}
    native = zero.natively(rank, world, 20)

    with deepspeed.zero.Init(config_dict_or_path=zero.configuration(3, world)):
        model = zero.Small()
    out["ds_shape"] = tuple(model.embed.weight.ds_shape), tuple(model.embed.weight.shape)
    engine, optimizer = started(3, world, model)
    zero.train(engine, range(20), rank)
    out["zero.Init"] = zero.apart(zero.whole(engine), native)
    engine.save_checkpoint(folder, tag="stage 3")
    engine.destroy()

    engine, optimizer = started(3, world, extra={"gradient_clipping": 1e9})
    zero.train(engine, range(20), rank)
    out["unclipped"] = zero.apart(zero.whole(engine), native)
    saved = optimizer_state(engine)
    engine.destroy()

    for name, stage, options in (
        ("hpZ", 3, {"zero_hpz_partition_size": 2}),
        ("round robin", 2, {"round_robin_gradients": True}),
        ("stage 0 in bf16", 0, {"extra": {"bf16": {"enabled": True}}}),
    ):
        try:
            engine, _ = started(stage, world, **options)
            zero.train(engine, range(1), rank)
            out[name] = "trained"
        except ConfigError as error:
            out[name] = str(error)
        engine.destroy()

    for stage in (1, 2, 3):
        engine, optimizer = started(stage, world, extra={"bf16": {"enabled": True}})
        zero.train(engine, range(20), rank)
        out["bf16", stage] = zero.whole(engine)
        if stage == 1:
            try:
                optimizer.load_state_dict(saved)
                out["another stage"] = "loaded"
            except CheckpointError as error:
                out["another stage"] = str(error)
        engine.destroy()
    out["native"] = native

    engine, optimizer = started(3, world)
    zero.train(engine, range(1), rank)
    before = zero.whole(engine)
    inner = optimizer.bound()
    flat = next(f for f in (f.flat for f in inner.fragments.values()) if f is not None)
    flat.grad = torch.full_like(flat, torch.nan if rank == 0 else 0.0)
    try:
        optimizer.param_groups[0]["params"] = [flat]
        optimizer.step()
        out["not finite"] = "stepped"
    except PolarError as error:
        out["not finite"] = str(error)
    optimizer.param_groups[0]["params"] = []
    out["kept"] = zero.apart(zero.whole(engine), before)
    engine.destroy()
    return out


def optimizer_state(engine: Any) -> dict[str, Any]:
    return engine.optimizer.state_dict()["optimizer_state_dict"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(odd_ones, 2, str(tmp_path_factory.mktemp("odd")), timeout=300)


def test_a_model_that_was_built_in_parts_trains_alike(odd):
    for found in odd:
        assert found["ds_shape"] == ((37, 13), (0,))
        assert found["zero.Init"] <= 1e-6


def test_gradients_are_clipped_before_the_oracle(odd):
    """The other tests compare with native training that clips; without clipping it goes elsewhere."""
    assert all(found["unclipped"] > 1e-3 for found in odd)


def test_bf16_models_have_fp32_weights_of_their_own_in_every_stage(odd):
    for found in odd:
        assert zero.apart(found["bf16", 2], found["bf16", 1]) <= 1e-6
        assert zero.apart(found["bf16", 3], found["bf16", 1]) <= 1e-6
        assert 0 < zero.apart(found["bf16", 1], found["native"]) < 0.1
        assert found["bf16", 1]["embed.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("hpZ", "DeepSpeed runs with hpZ"),
        ("round robin", "leave zero_optimization.round_robin_gradients out"),
        ("stage 0 in bf16", "set zero_optimization.stage to 1"),
        ("another stage", "that of another ZeRO stage"),
        ("not finite", "is not finite"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(odd, case, says):
    assert all(says in found[case] for found in odd)


def test_a_failed_step_leaves_the_matrix_as_it_was(odd):
    assert all(found["kept"] < 0.01 for found in odd)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"optimizer": {"type": "OneBitAdam"}}, "a 1-bit optimizer"),
        ({"optimizer": {"type": "AdamW"}}, "which it ignores beside ZeroPolarGrad"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "NVMe offload"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "NVMe offload"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "hpZ"),
        ({"zero_optimization": {"mics_shard_size": 4}}, "MiCS"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "partial offload"),
        ({"tensor_parallel": {"autotp_size": 2}}, "AutoTP"),
        ({"expert_parallel": {"enabled": True}}, "AutoEP"),
    ],
)
def test_configurations_that_do_not_fit_are_refused_by_name(config, says, tmp_path):
    from polargrad_dist.integrations.deepspeed_checks import check_config

    with pytest.raises(ConfigError, match=says):
        check_config(config)
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=says):
        check_config(str(tmp_path / "ds.json"))
    check_config(zero.configuration(2, 2) | {"zero_optimization": {"offload_optimizer": None}})


def test_other_versions_and_other_modules_are_refused(monkeypatch):
    from polargrad_dist.integrations import deepspeed_checks as ours
    from polargrad_dist.integrations.deepspeed import ZeroPolarGrad

    for name, what in (("PipelineModule", "pipeline parallelism"), ("MoE", "mixture of experts")):
        theirs = type(name, (nn.Linear,), {"__module__": "deepspeed.somewhere"})
        model = nn.Sequential(theirs(4, 4))
        with pytest.raises(ConfigError, match=what):
            ours.refuse_unknown(model, 0, list(model.parameters()), [{}])
    model = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="mixture of experts"):
        ours.refuse_unknown(model, 0, list(model.parameters()), [{"moe": True}])
    ours.refuse_unknown(model, 0, list(model.parameters()), [{}])
    monkeypatch.setattr(ours, "version", lambda _: "0.20.1")
    with pytest.raises(ConfigError, match=r"DeepSpeed is 0\.20\.1, tested is 0\.19"):
        ZeroPolarGrad(model)


def test_matrices_side_by_side_and_state_of_whole_matrices_are_refused():
    from polargrad_dist.integrations.fragments import Fragment, fragments_of
    from polargrad_dist.optim.groups import DEFAULTS
    from tests.optim import normuon  # noqa: F401

    whole = Fragment("qkv", (4, 12), ((0, 30), (30, 48)), 1, None, 0)
    beside = DEFAULTS | {"role": "hidden", "transposed": True, "split_sizes": (4, 4, 4)}
    with pytest.raises(ConfigError, match="3 matrices side by side"):
        list(fragments_of(beside, "qkv", (4, 12), whole))
    kept = DEFAULTS | {"role": "hidden", "algorithm": "normuon of the tests"}
    with pytest.raises(ConfigError, match="keeps state with whole matrices"):
        list(fragments_of(kept, "qkv", (4, 12), whole))
    relative = DEFAULTS | {"role": "embed", "scale": "nuclear_relative"}
    with pytest.raises(ConfigError, match=r"tokens has scale 'nuclear_relative'.*set scale to 'nuclear'"):
        list(fragments_of(relative, "tokens", (4, 12), whole))
    below = [f.bounds for f in fragments_of(DEFAULTS | {"num_heads": 2}, "qkv", (4, 12), whole)]
    assert below == [((0, 24), (24, 24)), ((0, 6), (6, 24))]
