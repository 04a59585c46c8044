"""Trains a bag of parameters in every mode that the optimizer supports, for the contract tests."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from polargrad_dist.optim import PolarGrad
from tests.optim.bag import SAMPLES, Bag, groups


def whole(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


def wrapped(mode: str, bag: dict) -> torch.nn.Module:
    """A bag laid out on the ranks: ``mode`` is single, ddp, reduce_scatter, fsdp or hsdp."""
    model: torch.nn.Module = Bag(**bag)
    if mode == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif mode == "fsdp":
        fully_shard(model)
    elif mode == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return model


def build(mode: str, bag: dict, rule: dict, options: dict | None = None) -> tuple[torch.nn.Module, PolarGrad]:
    """A bag and its optimizer; see `wrapped` for ``mode``."""
    options = dict(options or {})
    if mode == "reduce_scatter":
        options["gradients"] = "reduce_scatter"
    model = wrapped(mode, bag)
    return model, PolarGrad(groups(model, **rule), **options)


def backward(
    mode: str, model, optimizer: PolarGrad, rank: int, world: int, step: int, accumulation: int = 1
) -> None:
    """Gradients of the mean loss over all samples, of which each rank sees its share, in ``accumulation`` parts."""
    share = SAMPLES // world
    size = share // accumulation
    for k in range(accumulation):
        samples = list(range(rank * share + k * size, rank * share + (k + 1) * size))
        last = k == accumulation - 1
        if mode in ("fsdp", "hsdp"):
            model.set_requires_gradient_sync(last)
        quiet = {"ddp": lambda: model.no_sync(), "reduce_scatter": lambda: optimizer.no_sync()}.get(
            mode, nullcontext
        )
        with nullcontext() if last else quiet():
            (model(samples, step) / accumulation).backward()


def train(
    rank: int,
    world: int,
    mode: str,
    bag: dict,
    rule: dict,
    *,
    options: dict | None = None,
    steps: int = 5,
    first_step: int = 0,
    accumulation: int = 1,
    clip: float | None = None,
    gather_state: bool = True,
    load: dict | None = None,
    start: dict | None = None,
) -> dict:
    """Five steps with a learning rate that changes every step; returns whole parameters, state, norms and traffic."""
    model, optimizer = build(mode, bag, rule, options)
    if start is not None:
        _fill(model, start)
    if load is not None:
        optimizer.load_state_dict(load)
    base = [group["lr"] for group in optimizer.param_groups]
    norms = []
    for step in range(first_step, first_step + steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr / (1 + 0.3 * step)
        optimizer.zero_grad()
        optimizer.traffic.clear()
        backward(mode, model, optimizer, rank, world, step, accumulation)
        if clip is not None:
            norms.append(float(optimizer.clip_grad_norm_(clip)))
        optimizer.step()
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr
    return {
        "parameters": {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()},
        "state": optimizer.full_state_dict() if gather_state else None,
        "norms": norms,
        "calls": dict(optimizer.traffic.calls),
        "bytes": dict(optimizer.traffic.bytes),
        "expected": optimizer.plan().traffic(),
        "stats": optimizer.stats(),
    }


def _fill(model: torch.nn.Module, values: dict) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = values[name.removeprefix("module.")]
            if isinstance(p, DTensor):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, p.device_mesh, p.placements)
            p.copy_(value)


def distance(a: dict, b: dict) -> float:
    """Largest absolute difference of two sets of parameters."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
