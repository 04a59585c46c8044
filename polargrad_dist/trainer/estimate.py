"""Memory and time of a step before there is one: what a rank would hold, do and send, and how long known GPUs take.

Nothing here has been measured on a GPU; `python -m benchmarks.gpu` compares it with measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
from polargrad_dist.trainer.strategies import sharded_units

# Assumed fraction of a device's peak, in bf16 or fp32, that a model reaches
SHARE = 0.4
# Assumed fraction of a link's rate that collectives reach
LINK = 0.7
# Inductor's decompositions and its partition into forward and backward, run eagerly.
TRACER = "aot_eager_decomp_partition"


def built(build: Callable[..., nn.Module], config: TrainerConfig) -> nn.Module:
    """The model on the meta device, its parameters of the types that they have in the run."""
    model = build(device="meta")
    if config.precision == "bf16":
        model.to(torch.bfloat16)
    if config.device != "cpu" and hasattr(model, "as_on_a_gpu"):
        model.as_on_a_gpu()  # type: ignore[operator]
    return model


def activations(build: Callable[..., nn.Module], config: TrainerConfig) -> int:
    """Bytes that autograd keeps between forward and backward of one micro-batch, parameters left out.

    A forward pass on a CPU's tensors without memory. Compiled blocks are traced as torch.compile traces them, with its choice
    of what is kept and what is computed again; nothing is generated.
    """
    kept: dict[int, torch.UntypedStorage] = {}
    # First weights are drawn, though into nothing: the run's own generator stays where it is.
    with torch.random.fork_rng(devices=[]):
        model = built(build, config)
    if config.activation_checkpointing:
        model.checkpoint_blocks()  # type: ignore[operator]
    if config.compile:
        model.compile_blocks(backend=TRACER)  # type: ignore[operator]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
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


def gathered(model: nn.Module, config: TrainerConfig, ranks: int) -> int:
    """Bytes that FSDP2 adds to a rank's shards at the fullest moment, in backward: whole parameters, and whole gradients on
    their way to be reduced. 0 under other strategies.

    The root stays gathered; of the other units (`sharded_units`) one is at work and the next is fetched, or all stay.
    Gradients are whole until their unit's backward is through, the root's until the end, and are copied once, in the type of
    the reduction, to be sent. Under accumulation all of them stay whole. An upper bound: activations are partly gone by then.
    """
    if config.strategy.name not in ("fsdp", "hsdp") or ranks == 1:
        return 0
    mixed = config.precision == "bf16-mixed"
    units = [list(unit.parameters()) for unit in sharded_units(model)]
    inner = {p for unit in units for p in unit}
    root = [p for p in model.parameters() if p not in inner]

    def computed(params: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * (2 if mixed else p.itemsize) for p in params)

    def reduced(params: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * (4 if mixed else p.itemsize) for p in params)

    sizes = sorted(map(computed, units), reverse=True)
    held = computed(root) + sum(sizes[:2] if config.strategy.reshard_after_forward else sizes)
    waiting = reduced(model.parameters()) if config.accumulation(ranks) > 1 else computed(root)
    sent = max((computed(unit) + reduced(unit) for unit in units), default=0)
    return held + waiting + sent


@dataclass(frozen=True)
class Work:
    """The work of one rank in a step: flops of the model and of the optimizer's matrices (in fp32 products), bytes that
    elementwise work moves, and bytes communicated."""

    model: float
    oracle: float
    moved: float
    travelling: float

    def seconds(self, device: Device, precision: str) -> float:
        """Seconds on a device, with nothing overlapping; the model at `SHARE` of the peak."""
        peak = device.fp32 if precision == "fp32" else device.bf16
        return (
            self.model / (SHARE * peak)
            + self.oracle / device.fp32
            + self.moved / device.bandwidth
            + self.travelling / (LINK * device.link)
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank. ``lasting`` ones are there all the time; activations, loss and what is ``gathered`` make
    room for ``buffers``.

    Parts that are not known are None, and ``why`` says the reason. ``compiled`` says whether activations are those of
    compiled blocks. What is ``offloaded`` lies in the host's memory.
    """

    lasting: dict[str, int]
    activations: int | None
    loss: int | None
    buffers: int
    gathered: int = 0
    compiled: bool = False
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
        return (self.activations or 0) + (self.loss or 0) + self.gathered

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
    model = built(build, trainer)
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
    memory = _memory(build, model, plan, optimizer, trainer, ranks)
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
    ranks: int,
) -> Memory:
    kept, why, compiled = None, "", False
    # Compiled, then as it is: a model of one's own may do with tensors that hold nothing what cannot be traced, or run.
    for compiled in dict.fromkeys((trainer.compile, False)):
        try:
            kept = activations(build, replace(trainer, compile=compiled))
            break
        except Exception as error:
            why = " ".join(str(error).split())[:200]
    loss = None
    if hasattr(model, "loss_bytes"):
        itemsize = 4 if trainer.precision == "fp32" else 2
        loss = model.loss_bytes(trainer.micro_batch * trainer.sequence_length, itemsize)  # type: ignore[operator]
    default = CPU_BUCKET if trainer.device == "cpu" else GPU_BUCKET
    bucket = default if optimizer.bucket_mb is None else int(optimizer.bucket_mb * 2**20)
    fullest = max(plan.memory(), key=lambda row: sum(row.values()))
    whole = gathered(model, trainer, ranks)
    return Memory(fullest, kept, loss, 3 * bucket, whole, compiled, trainer.strategy.cpu_offload, why)


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
        "gathered": memory.gathered,
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
