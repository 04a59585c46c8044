"""The bag of parameters placed on meshes in every way, and trained with the gradients of one process.

Which elements a rank stores is read from a second bag, whose values are their own positions, placed in the same way: so
neither gradients nor results depend on what the optimizer, or a redistribution of torch's, takes a placement to mean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from polargrad_dist.optim import PolarGrad
from tests.optim.bag import Bag, groups

R, S0, S1 = Replicate(), Shard(0), Shard(1)
Places = dict[str, tuple[DeviceMesh, list[Placement]]]


def _one_dimension(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,))


def _grid(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)


def colwise(world: int) -> Places:
    """Tensor parallelism: outputs cut, norms copied."""
    mesh = _one_dimension(world)
    cut = ("wide", "square", "tall", "fused", "conv", "bias", "heads")
    return {name: (mesh, [S0 if name in cut else R]) for name in Bag().shapes}


def rowwise(world: int) -> Places:
    """Tensor parallelism: inputs cut, also those of a tall matrix and within each expert."""
    mesh = _one_dimension(world)
    return {name: (mesh, [R if name in ("bias", "square2") else S1]) for name in Bag().shapes}


def mixed(world: int) -> Places:
    """Some sharded, the others plain copies."""
    mesh = _one_dimension(world)
    return {name: (mesh, [S0]) for name in ("wide", "tall", "fused", "experts")}


def expert_parallel(world: int) -> Places:
    """Experts on pairs of ranks, copied between the pairs; dense ones over all four, some of them plain."""
    dense, experts = _one_dimension(world), _grid("copies", "experts")["experts"]
    sharded: Places = {name: (dense, [S0]) for name in ("square", "wide", "tall", "narrow")}
    return sharded | {"experts": (experts, [S0]), "square2": (experts, [S1]), "fused": (experts, [R])}


def experts_within(world: int) -> Places:
    """Every expert's rows cut over one pair of ranks, the experts dealt over the other."""
    mesh = _grid("experts", "rows")
    return {
        "experts": (mesh, [S0, S1]),
        "tall": (mesh, [R, S0]),
        "square": (mesh, [S0, R]),
        "conv": (mesh, [S1, S0]),
    }


def three_dimensions(world: int) -> Places:
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("a", "b", "c"))
    placements = {
        "wide": [R, S0, S1],
        "square": [R, S0, R],
        "square2": [R, R, S1],
        "narrow": [S0, R, S0],
        "tall": [R, S0, R],
        "experts": [R, S1, S0],
        "fused": [R, R, S0],
        "conv": [R, S1, S0],
    }
    return {name: (mesh, placements.get(name, [R] * 3)) for name in Bag().shapes}


def _some_ranks(world: int) -> Places:
    mesh = DeviceMesh("cpu", torch.arange(2)) if world > 2 else _one_dimension(world)
    return {"experts": (mesh, [S0]), "square": (mesh, [S0]), "tall": (mesh, [S0]), "fused": (mesh, [R])}


HAND_MADE: dict[str, Callable[[int], Places]] = {
    "tp_colwise": colwise,
    "tp_rowwise": rowwise,
    "mixed": mixed,
    "ep": expert_parallel,
    "experts_within": experts_within,
    "3d": three_dimensions,
    "excluded": _some_ranks,
    "absent": _some_ranks,
}
WORLDS = {
    "tp_colwise": (2, 3, 4),
    "tp_rowwise": (2, 3, 4),
    "mixed": (2, 3, 4),
    "ep": (4,),
    "experts_within": (4,),
    "3d": (4,),
    "excluded": (3, 4),
    "absent": (3, 4),
    "tp_fsdp": (4,),
    "ep_fsdp": (2, 4),
    "submesh": (4,),
}
"""Layouts, and the numbers of ranks on which each is tried."""


def place(model: nn.Module, where: Places) -> None:
    for name, (mesh, placements) in where.items():
        p = dict(model.named_parameters())[name]
        model.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))


def shard(layout: str, world: int, model: nn.Module) -> None:
    """Puts a bag's parameters where the layout says, in place."""
    if layout in HAND_MADE:
        place(model, HAND_MADE[layout](world))
    elif layout == "tp_fsdp":
        mesh = _grid("data", "tensor")
        cut = {
            "square": S0,
            "narrow": S0,
            "heads": S0,
            "wide": S1,
            "square2": S1,
            "conv": S0,
            "experts": S1,
            "tall": S0,
        }
        place(model, {name: (mesh["tensor"], [cut.get(name, R)]) for name in Bag().shapes})
        fully_shard(model, mesh=mesh["data"])
    elif layout == "ep_fsdp":
        place(model, {"experts": (_one_dimension(world), [S0])})
        fully_shard(model, ignored_params={model.experts})
    elif layout == "submesh":
        mesh = _grid("replicate", "shard")
        place(model, {"experts": (mesh["replicate"], [S0])})
        fully_shard(model, mesh=mesh["shard"], ignored_params={model.experts, model.square, model.bias})
    else:
        raise ValueError(layout)


def here(p: torch.Tensor) -> torch.Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def like(p: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A gradient, placed as the parameter is."""
    if not isinstance(p, DTensor):
        return local
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


class Placed:
    """A bag on meshes: ``parameters`` are those that this rank stores something of, ``at`` says which elements."""

    def __init__(self, layout: str, world: int, **bag):
        self.model, self.one = Bag(**bag), Bag(**bag)
        positions = Bag(**bag | {"dtype": torch.float64})
        with torch.no_grad():
            for p in positions.parameters():
                p.copy_(torch.arange(p.numel(), dtype=p.dtype).view(p.shape))
        for model in (self.model, positions):
            shard(layout, world, model)
        self.at = {n: here(p).detach().round().long().reshape(-1) for n, p in positions.named_parameters()}
        if layout == "absent":
            for name, p in list(self.model.named_parameters()):
                if isinstance(p, DTensor) and p.device_mesh.get_coordinate() is None:
                    delattr(self.model, name)
                    self.at.pop(name)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def whole(self) -> dict[str, torch.Tensor]:
        """Every parameter from the parts of all ranks, which must have the same bits of what several store. A collective."""
        mine = {n: (self.at[n], here(p).detach().reshape(-1)) for n, p in self.parameters().items()}
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        out = {}
        for name, p in self.one.named_parameters():
            value = torch.full((p.numel(),), torch.nan, dtype=p.dtype)
            for part in parts:
                if name in part:
                    at, x = part[name]
                    assert bool((value[at].isnan() | (value[at] == x)).all()), f"ranks differ in {name}"
                    value[at] = x
            out[name] = value.view(p.shape)
            assert not out[name].isnan().any(), f"some elements of {name} are on no rank"
        return out

    def gradients(self, samples: list[int], step: int, missing: frozenset[str] = frozenset()) -> None:
        """Gives each parameter its part of the gradient of one process."""
        with torch.no_grad():
            for name, value in self.whole().items():
                self.one.get_parameter(name).copy_(value)
        self.one.zero_grad()
        self.one(samples, step).backward()
        for name, p in self.parameters().items():
            g = self.one.get_parameter(name).grad
            p.grad = None
            if g is not None and name not in missing:
                p.grad = like(p, g.flatten()[self.at[name]].view(here(p).shape))


def quietly(collect: Callable[[], dict]) -> dict:
    """A collective in which torch must not have anything to warn of."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    logger.addHandler(handler)
    try:
        out = collect()
    finally:
        logger.removeHandler(handler)
    assert not said, said
    return out


def train_placed(
    rank: int, world: int, layout: str, bag: dict, rule: dict, steps: int = 3, **options
) -> dict:
    """Steps with clipping; returns whole parameters, norms, state, and what travelled beside what was planned."""
    placed = Placed(layout, world, **bag)
    optimizer = PolarGrad(groups(placed.model, **rule), **options)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        placed.gradients(list(range(48)), step)
        norms.append(float(optimizer.clip_grad_norm_(0.5)))
        optimizer.traffic.clear()
        optimizer.step()
    state = quietly(optimizer.full_state_dict)
    names = {i: n for g in state["param_groups"] for i, n in zip(g["params"], g["param_names"], strict=True)}
    return {
        "parameters": placed.whole(),
        "norms": norms,
        "state": {names[i]: s for i, s in state["state"].items()},
        "bytes": dict(optimizer.traffic.bytes),
        "planned": optimizer.plan().traffic_of(rank),
    }
