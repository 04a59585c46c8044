"""How the model is replicated or sharded over ranks; gradients are communicated only in the last micro-batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import OptimizerConfig, PolarGrad
from polargrad_dist.optim.names import cleaner, unwrap
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.world import World


@dataclass
class Placed:
    """A placed model: what to call, and the context for a micro-batch whose gradients are not yet communicated."""

    model: nn.Module
    quiet: Callable[[], AbstractContextManager[Any]]
    autocast: Callable[[], AbstractContextManager[Any]]

    def rest(self) -> None:
        """Reshards parameters after forward passes without backward."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass of a micro-batch's share of the loss."""
        loss.backward()

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers by name, as this rank stores them; every rank calls it."""
        model = unwrap(self.model)
        named = [*model.named_parameters(), *model.named_buffers()]
        clean = cleaner(model)
        persistent = set(map(clean, model.state_dict()))
        return {clean(name): t.detach() for name, t in named if clean(name) in persistent}

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies loaded tensors into the model, where they do not share its memory."""

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        """The context of one forward and backward; only the last micro-batch of a step communicates gradients."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        return nullcontext() if last else self.quiet()


def build(
    model: nn.Module, optimizer: OptimizerConfig, config: TrainerConfig, world: World
) -> tuple[Placed, Any]:
    """The model under the configured strategy, and the `PolarGrad`, or its equivalent, that steps it."""
    check_gradients(optimizer, config.strategy.name)
    if config.strategy.name == "deepspeed":
        from polargrad_dist.trainer.zero import start

        return start(model, optimizer, config, world)
    placed = place(model, config, world, optimizer.gradients == "reduce_scatter")
    return placed, PolarGrad.from_config(placed.model, optimizer)


def check_gradients(optimizer: OptimizerConfig, strategy: str) -> None:
    """Raises ``ConfigError`` if both the optimizer and the strategy would reduce the gradients."""
    if optimizer.gradients == "reduce_scatter" and strategy != "ddp":
        raise ConfigError(
            f"optimizer.gradients is 'reduce_scatter' with strategy {strategy!r}, which reduces gradients itself: set it to "
            "'all_reduced', or use strategy 'ddp'"
        )


def place(model: nn.Module, config: TrainerConfig, world: World, reduces: bool) -> Placed:
    """Puts a model on this rank's device under the configured strategy.

    ``reduces``: the optimizer reduces gradients itself, so the model is broadcast from rank 0 but not wrapped in DDP.
    """
    strategy = config.strategy
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    mixed = config.precision == "bf16-mixed"
    sharded = strategy.name in ("fsdp", "hsdp") and world.size > 1
    if strategy.cpu_offload and world.device.type == "cpu":
        raise ConfigError(
            "trainer.strategy.cpu_offload is true on CPUs, expected GPUs, whose memory it frees: set it to false"
        )
    if config.precision == "bf16":
        model.to(torch.bfloat16)
    if config.activation_checkpointing:
        _call(model, "checkpoint_blocks", "trainer.activation_checkpointing")
    if config.compile:
        _call(model, "compile_blocks", "trainer.compile")
    if sharded:
        _shard(model, config, world)
        return Placed(model, nullcontext, nullcontext)
    model.to(world.device)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(world.device.type, torch.bfloat16) if mixed else nullcontext()

    if world.size == 1:
        return Placed(model, nullcontext, autocast)
    if reduces:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, 0)
        return Placed(model, nullcontext, autocast)
    # Every rank computes the same buffers, so they are not broadcast. (torch 2.13 renamed the argument.)
    known = inspect.signature(DistributedDataParallel).parameters
    still: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    wrapped = DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        # Gradients are views of the buckets that are reduced: no second copy of them.
        gradient_as_bucket_view=True,
        **still,
    )
    return Placed(wrapped, wrapped.no_sync, autocast)


def sharded_units(model: nn.Module) -> list[nn.Module]:
    """What FSDP2 shards, gathers and reduces on its own, before what is left: blocks, and tables, which may be of another
    type than the rest, as one unit's parameters cannot."""
    return [*getattr(model, "blocks", []), *getattr(model, "tables", [])]


def _shard(model: nn.Module, config: TrainerConfig, world: World) -> None:
    """FSDP2: each block on its own, then what is left; reductions in fp32 whatever the compute type."""
    strategy = config.strategy
    kind = world.device.type
    if strategy.name == "hsdp":
        shape = (strategy.replicas, world.size // strategy.replicas)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": strategy.reshard_after_forward}
    if config.precision == "bf16-mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if strategy.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    else:
        model.to(world.device)
    for unit in sharded_units(model):
        fully_shard(unit, **options)
    # Backward starts where forward ends: freed in between, the root's parameters would be gathered twice.
    fully_shard(model, **options | {"reshard_after_forward": False})


def _call(model: nn.Module, method: str, key: str) -> None:
    if not hasattr(model, method):
        raise ConfigError(f"{key} is true, but the model has no {method}(): set it to false")
    getattr(model, method)()
