"""Memory and time of a step before there is one: what a rank would hold, do and send, and how long known GPUs take.

Nothing here has been measured on a GPU; `python -m benchmarks.gpu` is to say how far off it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from polargrad_dist.distributed.plan import Plan
from polargrad_dist.integrations.fragments import planned
from polargrad_dist.optim import OptimizerConfig, plan_for, route
from polargrad_dist.optim.member import CPU_BUCKET, GPU_BUCKET
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.devices import Device, known

SHARE = 0.4  # of a device's bf16 peak that models are taken to reach
LINK = 0.7  # of a link's rate that collectives are taken to reach


def activations(build: Callable[..., nn.Module], config: TrainerConfig) -> int:
    """Bytes that autograd keeps between forward and backward of one micro-batch, parameters left out.

    A forward pass of ``build(device="cpu")`` on tensors without memory. Uncompiled: torch.compile keeps less.
    """
    kept: dict[int, torch.UntypedStorage] = {}
    # First weights are drawn, though into nothing: the run's own generator stays where it is.
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
        model = build(device="cpu")
        if config.precision == "bf16":
            model.to(torch.bfloat16)
        if config.activation_checkpointing:
            model.checkpoint_blocks()  # type: ignore[operator]
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return x

        tokens = torch.zeros(config.micro_batch, config.sequence_length, dtype=torch.int64)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16-mixed")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), mixed:
            model(tokens, tokens, progress=1.0)
    return sum(storage.nbytes() for storage in kept.values())


@dataclass(frozen=True)
class Work:
    """What one rank does in a step: flops of the model, of the optimizer's matrices (in fp32 products), bytes that its
    elementwise work moves, and bytes that travel."""

    model: float
    oracle: float
    moved: float
    travelling: float

    def seconds(self, device: Device, precision: str) -> float:
        """On a device, with nothing overlapping; the model at `SHARE` of the peak."""
        peak = device.fp32 if precision == "fp32" else device.bf16
        return (
            self.model / (SHARE * peak)
            + self.oracle / device.fp32
            + self.moved / device.bandwidth
            + self.travelling / (LINK * device.link)
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank. ``lasting`` ones are there all the time; activations and loss make room for ``buffers``.

    Parts that are not known are None, and ``why`` says the reason. What is ``offloaded`` lies in the host's memory.
    """

    lasting: dict[str, int]
    activations: int | None
    loss: int | None
    buffers: int
    offloaded: bool = False
    why: str = ""

    @property
    def total(self) -> int:
        """At the peak of a step, on the device; without what is not known."""
        lasting = 0 if self.offloaded else sum(self.lasting.values())
        return lasting + max(self.passing, self.buffers)

    @property
    def passing(self) -> int:
        """What a forward and backward pass holds for a moment."""
        return (self.activations or 0) + (self.loss or 0)

    @property
    def whole(self) -> bool:
        """Whether every large part is known."""
        return self.activations is not None


@dataclass(frozen=True)
class Estimate:
    """A run on so many ranks: whose matrix is whose, how full a rank is, and what it does in a step."""

    ranks: int
    strategy: str
    plan: Plan
    memory: Memory
    gradients: int
    """Bytes of gradients, and of gathered weights, that a rank sends in a step beside the optimizer's traffic."""
    work: Work | None
    """None for a model that does not tell its flops."""

    def seconds(self, device: Device, precision: str) -> float | None:
        """Of a step on a device, where it is known."""
        return None if self.work is None else self.work.seconds(device, precision)


def estimate(
    build: Callable[..., nn.Module], optimizer: OptimizerConfig, trainer: TrainerConfig, ranks: int
) -> Estimate:
    """What a run on ``ranks`` ranks would need; ``build(device="meta")`` gives the model's shapes."""
    model = build(device="meta")
    if trainer.precision == "bf16":
        model.to(torch.bfloat16)
    name = trainer.strategy.name if ranks > 1 else "ddp"
    stage = trainer.strategy.zero_stage_or_default
    replicas = {"ddp": ranks, "fsdp": 1, "hsdp": trainer.strategy.replicas, "deepspeed": ranks}[name]
    shards = ranks // replicas
    comm = None if optimizer.comm_dtype is None else getattr(torch, optimizer.comm_dtype)
    groups = route(model, optimizer)
    if name == "deepspeed" and stage > 0:
        plan = planned(groups, stage, ranks, comm)
    else:
        plan = plan_for(
            groups,
            replicas=replicas,
            shards=shards,
            gradients=optimizer.gradients,
            comm_dtype=comm,
            device_type="cpu" if trainer.device == "cpu" else "cuda",
        )
    memory = _memory(build, model, plan, optimizer, trainer)
    whole = sum(entry.bytes for entry in plan.entries)
    passes = 2 if name == "ddp" or (name == "deepspeed" and stage < 3) else 3
    gradients = passes * whole if ranks > 1 else 0
    work = None
    if hasattr(model, "flops_per_token"):
        flops = model.flops_per_token(trainer.sequence_length)  # type: ignore[operator]
        work = Work(
            model=flops * trainer.tokens_per_step / ranks,
            oracle=max(plan.loads.values(), default=0.0),
            moved=3.0 * sum(memory.lasting.values()),
            travelling=gradients + sum(plan.traffic().values()),
        )
    return Estimate(ranks, name, plan, memory, gradients, work)


def _memory(
    build: Callable[..., nn.Module],
    model: nn.Module,
    plan: Plan,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
) -> Memory:
    kept, why = None, ""
    try:
        kept = activations(build, trainer)
    except Exception as error:  # whatever a model of one's own does with tensors that hold nothing
        why = " ".join(str(error).split())[:200]
    loss = None
    if hasattr(model, "loss_bytes"):
        itemsize = 4 if trainer.precision == "fp32" else 2
        loss = model.loss_bytes(trainer.micro_batch * trainer.sequence_length, itemsize)  # type: ignore[operator]
    default = CPU_BUCKET if trainer.device == "cpu" else GPU_BUCKET
    bucket = default if optimizer.bucket_mb is None else int(optimizer.bucket_mb * 2**20)
    fullest = max(plan.memory(), key=lambda row: sum(row.values()))
    return Memory(fullest, kept, loss, 3 * bucket, trainer.strategy.cpu_offload, why)


def expected(
    build: Callable[..., nn.Module],
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    ranks: int,
    device: torch.device,
) -> dict[str, Any]:
    """What a run is expected to need on a known GPU, as facts of ``run.json``; empty on any other device."""
    gpu = known(device)
    if gpu is None:
        return {}
    return facts_on(
        gpu,
        torch.cuda.get_device_properties(device).total_memory,
        estimate(build, optimizer, trainer, ranks),
        trainer,
    )


def facts_on(gpu: Device, available: float, found: Estimate, trainer: TrainerConfig) -> dict[str, Any]:
    """``device``, its ``available`` bytes, ``memory`` by part and in all (as far as it is known), ``seconds`` a step and of
    the run. JSON-able."""
    memory = found.memory
    parts = memory.lasting | {
        "activations": memory.activations,
        "loss": memory.loss,
        "buffers": memory.buffers,
        "total": memory.total if memory.whole else None,
    }
    facts: dict[str, Any] = {
        "device": gpu.name,
        "available": int(available),
        "memory": {name: size for name, size in parts.items() if size is not None},
    }
    seconds = found.seconds(gpu, trainer.precision)
    if seconds is not None:
        facts |= {"seconds_per_step": seconds, "seconds": seconds * trainer.steps}
    return facts
