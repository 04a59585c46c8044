"""Saving in one layout and going on in another, with everything that PyTorch and the optimizer offer for it.

Three steps, a checkpoint, two steps elsewhere: the weights of five undisturbed steps in one process, and state with the same
bits. CI saves and loads between each pair of layouts in one of the ways, `make test-slow` in all.
"""

import os
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from polargrad_dist.optim import PolarGrad
from tests.gloo import run_ranks
from tests.optim import normuon  # noqa: F401 (registers its rule)
from tests.optim.bag import SHAPES, Bag
from tests.optim.training import backward, distance, whole

NAMES = ("square", "square2", "narrow", "row", "tall", "fused", "experts", "bias")
# Name: (ranks, mode)
LAYOUTS = {
    "one": (1, "single"),
    "ddp2": (2, "ddp"),
    "fsdp2": (2, "fsdp"),
    "ddp3": (3, "ddp"),
    "fsdp4": (4, "fsdp"),
    "hsdp4": (4, "hsdp"),
}
WAYS = ("plain", "flat", "full", "full_state_dict", "named_state")
PAIRS = [(source, target) for source in LAYOUTS for target in LAYOUTS]


def _build(mode: str, dtype: torch.dtype) -> tuple[nn.Module, PolarGrad]:
    bag = Bag({name: SHAPES[name] for name in NAMES}, condition=10.0, dtype=dtype)
    model: nn.Module = bag
    if mode == "ddp":
        model = DistributedDataParallel(bag)
    elif mode == "fsdp":
        fully_shard(bag)
    elif mode == "hsdp":
        fully_shard(bag, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    p = dict(bag.named_parameters())
    matrix = {"lr": 0.01, "momentum": "momentum_first", "oracle": "svd"}
    rows = matrix | {"algorithm": "normuon of the tests", "scale": "muon", "momentum": "heavy_ball"}
    adamw = {"algorithm": "adamw", "lr": 0.01}
    groups = [
        {"params": [(n, p[n]) for n in ("narrow", "experts")], **matrix, "weight_decay": 0.1},
        {"params": [("tall", p["tall"])], **matrix | {"oracle": "auto"}, "momentum": "polar_first"},
        {"params": [(n, p[n]) for n in ("square", "square2")], **rows},
        {"params": [("fused", p["fused"])], **rows, "split_sizes": (4, 6, 2), "lr": 0.02},
        {"params": [(n, p[n]) for n in ("row", "bias")], **adamw},
    ]
    return model, PolarGrad(groups)


def _train(mode: str, model: nn.Module, optimizer: PolarGrad, rank: int, world: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(mode, model, optimizer, rank, world, step)
        optimizer.step()


def _options(way: str) -> StateDictOptions:
    return StateDictOptions(
        flatten_optimizer_state_dict=way == "flat",
        full_state_dict=way == "full",
        cpu_offload=way == "full",
        broadcast_from_rank0=way == "full" and dist.is_initialized(),
    )


def _save(rank: int, way: str, folder: str, model: nn.Module, optimizer: PolarGrad) -> None:
    if way in ("full", "full_state_dict"):
        theirs = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = optimizer.full_state_dict() if way == "full_state_dict" else None
        both = {
            "model": get_model_state_dict(model, options=theirs),
            "optim": state or get_optimizer_state_dict(model, optimizer, options=theirs),
        }
        if rank == 0:
            torch.save(both, folder + ".pt")
        return
    optim = (
        optimizer.named_state()
        if way == "named_state"
        else get_optimizer_state_dict(model, optimizer, options=_options(way))
    )
    dcp.save({"model": get_model_state_dict(model), "optim": optim}, checkpoint_id=folder)


def _load(rank: int, way: str, folder: str, model: nn.Module, optimizer: PolarGrad) -> None:
    if way in ("full", "full_state_dict"):
        both = torch.load(folder + ".pt", weights_only=False)
        given = both if rank == 0 or way == "full_state_dict" else {"model": {}, "optim": {}}
        options = _options("full")
        set_model_state_dict(model, given["model"] if rank == 0 else {}, options=options)
        if way == "full":
            set_optimizer_state_dict(model, optimizer, given["optim"], options=options)
        else:
            optimizer.load_state_dict(given["optim"])
        return
    optim = (
        optimizer.named_state()
        if way == "named_state"
        else get_optimizer_state_dict(model, optimizer, options=_options(way))
    )
    both = {"model": get_model_state_dict(model), "optim": optim}
    dcp.load(both, checkpoint_id=folder)
    set_model_state_dict(model, both["model"])
    if way != "named_state":
        set_optimizer_state_dict(model, optimizer, both["optim"], options=_options(way))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def _saving(
    rank: int, world: int, root: str, jobs: list[tuple[str, list[str]]], dtype: torch.dtype
) -> list[dict]:
    """Three steps in each layout, saved in these ways; the state of each."""
    out = []
    for layout, ways in jobs:
        mode = LAYOUTS[layout][1]
        model, optimizer = _build(mode, dtype)
        _train(mode, model, optimizer, rank, world, range(3))
        for way in ways:
            _save(rank, way, os.path.join(root, f"{layout}-{way}"), model, optimizer)
        out.append({"state": optimizer.full_state_dict()["state"], "weights": _weights(model)})
    return out


def _loading(
    rank: int, world: int, root: str, jobs: list[tuple[str, str, str]], dtype: torch.dtype
) -> list[dict]:
    """What each (source, target, way) gives: state and weights as loaded, and the weights two steps later."""
    out = []
    for source, target, way in jobs:
        mode = LAYOUTS[target][1]
        model, optimizer = _build(mode, dtype)
        try:
            _load(rank, way, os.path.join(root, f"{source}-{way}"), model, optimizer)
        except Exception as error:
            raise AssertionError(f"{source} to {target}, {way}: {error}") from error
        loaded = {"state": optimizer.full_state_dict()["state"], "weights": _weights(model)}
        _train(mode, model, optimizer, rank, world, range(3, 5))
        out.append(loaded | {"after": _weights(model)})
    return out


def _on(world: int, function, *arguments) -> list[list[dict]]:
    return run_ranks(function, world, *arguments) if world > 1 else [function(0, 1, *arguments)]


@cache
def _undisturbed() -> dict[str, torch.Tensor]:
    model, optimizer = _build("single", torch.float64)
    _train("single", model, optimizer, 0, 1, range(5))
    return _weights(model)


def _round_trips(root: str, trips: list[tuple[str, str, str]], dtype: torch.dtype = torch.float64) -> None:
    saved: dict[str, dict] = {}
    for world in (1, 2, 3, 4):
        jobs = [
            (layout, [w for w in WAYS if any(t[::2] == (layout, w) for t in trips)])
            for layout, (ranks, _) in LAYOUTS.items()
            if ranks == world
        ]
        for (layout, _), *results in zip(jobs, *_on(world, _saving, root, jobs, dtype), strict=True):
            saved[layout] = results[0]
    for world in (1, 2, 3, 4):
        mine = [trip for trip in trips if LAYOUTS[trip[1]][0] == world]
        for trip, *results in zip(mine, *_on(world, _loading, root, mine, dtype), strict=True):
            for result in results:
                _same_bits(trip, saved[trip[0]], result)
                if dtype == torch.float64:
                    assert distance(_undisturbed(), result["after"]) <= 1e-10, trip
                assert distance(results[0]["after"], result["after"]) == 0, trip


def _same_bits(trip: tuple[str, str, str], before: dict, after: dict) -> None:
    for name, value in before["weights"].items():
        assert torch.equal(after["weights"][name], value), f"{trip}: weights {name}"
    assert after["state"].keys() == before["state"].keys()
    for i, states in before["state"].items():
        assert after["state"][i].keys() == states.keys()
        for key, value in states.items():
            assert torch.equal(after["state"][i][key], value), f"{trip}: {key} of parameter {i}"


def test_state_goes_from_each_layout_to_each_other(tmp_path):
    ways = {layout: i for i, layout in enumerate(LAYOUTS)}
    trips = [(s, t, WAYS[(ways[s] + ways[t]) % len(WAYS)]) for s, t in PAIRS]
    _round_trips(str(tmp_path), trips)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_goes_from_each_layout_to_each_other_in_each_way(tmp_path, dtype):
    _round_trips(str(tmp_path), [(s, t, way) for s, t in PAIRS for way in WAYS], dtype)


def test_the_low_bits_of_bf16_weights_go_along(tmp_path):
    layouts = ("one", "ddp2", "fsdp2")
    trips = [(s, t, WAYS[(i + j) % len(WAYS)]) for i, s in enumerate(layouts) for j, t in enumerate(layouts)]
    _round_trips(str(tmp_path), trips, torch.bfloat16)
