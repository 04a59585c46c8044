"""One checkpoint, any number of ranks, replicated or sharded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from polargrad_dist.trainer.checkpoint import CheckpointConfig, CheckpointStore
from tests.checkpoint.toy import value
from tests.gloo import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Toy(nn.Module):
    """Rows that no world size divides, and fewer rows than ranks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(37, 6)
        self.up = nn.Linear(6, 11)
        self.down = nn.Linear(11, 2, bias=False)


def held(model, strategy, rank, world):
    """Parameters, and momentum: a DTensor everywhere under FSDP2, at one owner under DDP."""
    tensors = {}
    for owner, (name, parameter) in enumerate(model.named_parameters()):
        name = name.removeprefix("module.")
        tensors[f"model/{name}"] = parameter
        if strategy != "ddp" or owner % world == rank:
            tensors[f"optim/{name}.momentum"] = torch.zeros_like(parameter)
    return tensors


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensors, step):
    """Sets every tensor to the values of (name, step), each rank the part that it holds."""
    for name, tensor in tensors.items():
        full = value(name, tuple(tensor.shape), step)
        if isinstance(tensor, DTensor):
            full = torch.distributed.tensor.distribute_tensor(full, tensor.device_mesh, tensor.placements)
        with torch.no_grad():
            tensor.copy_(full)


def stage(rank, world, folder, strategy, step, asynchronous):
    """One life of a run: loads what the last left (checking every value), goes on to ``step`` and saves."""
    model = Toy()
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        shape, dims = ((2, world // 2), ("r", "s")) if strategy == "hsdp" else ((world,), ("s",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=dims)
        for module in (model.embed, model.up, model.down, model):
            fully_shard(module, mesh=mesh)
    tensors = held(model, strategy, rank, world)
    store = CheckpointStore(folder, CheckpointConfig(asynchronous=asynchronous))
    path = store.resume_point()
    if path is not None:
        before = store.load(path, tensors).step
        for name, tensor in tensors.items():
            expected = value(name, tuple(tensor.shape), before)
            assert torch.equal(whole(tensor.detach()), expected), f"{name} on rank {rank}"
    fill(tensors, step)
    store.save(step, tensors)
    # A background save must not see this
    fill(tensors, step + 1000)
    assert store.close()
    return path and path.name


@pytest.mark.parametrize(
    ("lives", "asynchronous"),
    [
        ([("ddp", 1), ("ddp", 2), ("ddp", 4), ("ddp", 3), ("ddp", 1)], False),
        ([("ddp", 2), ("fsdp", 2), ("ddp", 2), ("fsdp", 3), ("fsdp", 1), ("ddp", 1)], True),
        ([("fsdp", 2), ("hsdp", 4), ("ddp", 1)], False),
    ],
    ids=["world size", "ddp and fsdp", "hsdp"],
)
def test_every_value_survives_every_change_of_world_and_strategy(tmp_path, lives, asynchronous):
    for step, (strategy, world) in enumerate(lives, 1):
        names = run_ranks(stage, world, str(tmp_path), strategy, step, asynchronous)
        expected = f"step-{step - 1:08d}" if step > 1 else None
        assert names == [expected] * world


def load_part(rank, world, folder):
    """Each rank asks for something else: nobody waits for a name that only another wants."""
    dist.barrier()
    name = ["model/embed.weight", "model/up.weight"][rank]
    got = torch.zeros((37, 6) if rank == 0 else (11, 6))
    CheckpointStore(folder).load(CheckpointStore(folder).newest_valid(), {name: got})
    return bool(torch.equal(got, value(name, tuple(got.shape), 1)))


def test_each_rank_loads_only_what_it_asks_for(tmp_path):
    run_ranks(stage, 2, str(tmp_path), "fsdp", 1, False)
    assert run_ranks(load_part, 2, str(tmp_path)) == [True, True]
