"""What a run would be, on N ranks, without building it: parameters, routing, owners, memory, traffic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from polargrad_dist.integrations.fragments import planned
from polargrad_dist.optim import OptimizerConfig, plan_for, route
from polargrad_dist.trainer.config import TrainerConfig


def dry_run(
    build: Callable[..., nn.Module], optimizer: OptimizerConfig, trainer: TrainerConfig, ranks: int
) -> int:
    """Prints the plan of a run on ``ranks`` ranks; ``build(device="meta")`` gives the model's shapes. Returns 0."""
    trainer = trainer.for_world(ranks)
    trainer.check(ranks)
    model = build(device="meta")
    if trainer.precision == "bf16":
        model.to(torch.bfloat16)
    name = trainer.strategy.name if ranks > 1 else "ddp"
    stage = trainer.strategy.zero_stage_or_default
    replicas = {"ddp": ranks, "fsdp": 1, "hsdp": trainer.strategy.replicas, "deepspeed": ranks}[name]
    comm = None if optimizer.comm_dtype is None else getattr(torch, optimizer.comm_dtype)
    groups = route(model, optimizer)
    if name == "deepspeed" and stage > 0:
        plan = planned(groups, stage, ranks, comm)
    else:
        plan = plan_for(
            groups,
            replicas=replicas,
            shards=ranks // replicas,
            gradients=optimizer.gradients,
            comm_dtype=comm,
        )
    count = sum(p.numel() for p in model.parameters())
    print(plan.table())
    print(f"\nparameters: {count:,}")
    print(
        f"{ranks} ranks, strategy {name}, {trainer.accumulation(ranks)} micro-batches of {trainer.micro_batch} sequences per "
        f"rank and step, {trainer.tokens_per_step:,} tokens per step, {trainer.steps:,} steps"
    )
    memory = plan.memory()
    for part in ("parameters", "gradients", "optimizer"):
        sizes = [row[part] for row in memory]
        print(f"bytes per rank, {part}: {min(sizes):,} to {max(sizes):,} ({max(sizes) / 2**30:.2f} GiB)")
    traffic = plan.traffic()
    own = sum(row["parameters"] for row in memory[:1])
    if ranks > 1 and optimizer.gradients == "all_reduced":
        zero = {0: "2P", 1: "3P", 2: "2P", 3: "3P"}[
            stage
        ] + f" in ZeRO stage {stage}'s gathers and reductions"
        what = {"ddp": "2P by DDP's all-reduce", "deepspeed": zero}.get(
            name, "3P in FSDP2's gathers and reductions"
        )
        whole = own if name == "ddp" else count * 4 if name == "deepspeed" else own * (ranks // replicas)
        print(f"communication per step, gradients: {what}, P = {whole:,} bytes")
    for kind, size in traffic.items():
        print(f"communication per step and rank, optimizer's {kind}: {size:,} bytes")
    return 0
