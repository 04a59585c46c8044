"""What a run would be, on N ranks, without building it: parameters, routing, owners, memory, traffic."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from polargrad_dist.distributed.plan import Plan
from polargrad_dist.integrations.fragments import planned
from polargrad_dist.optim import OptimizerConfig, plan_for, route
from polargrad_dist.trainer.config import TrainerConfig


def by_role(plan: Plan) -> str:
    """A line per role and rule: parameters, matrices, rule, learning rate, oracle work; then the balance."""
    rows: dict[tuple[str, str, float], list[float]] = {}
    for entry in plan.entries:
        sums = rows.setdefault((entry.role, entry.rule, entry.lr), [0, 0, 0.0])
        sums[0] += math.prod(entry.shape)
        sums[1] += len(entry.owners)
        sums[2] += entry.cost
    width = max(len(rule) for _, rule, _ in rows)
    lines = [f"{'role':<12}{'parameters':>15}{'matrices':>10}  {'rule':<{width}}{'lr':>10}{'GFLOP':>12}"]
    for (role, rule, lr), (count, matrices, cost) in sorted(rows.items(), key=lambda row: -row[1][0]):
        lines.append(
            f"{role:<12}{int(count):>15,}{int(matrices):>10,}  {rule:<{width}}{lr:>10.3g}{cost / 1e9:>12,.2f}"
        )
    lines.append(f"oracle work per rank, max/mean over {plan.world} ranks: {plan.imbalance:.3f}")
    lines.append("every matrix with its owner: --dry_run_full in the place of --dry_run")
    return "\n".join(lines)


def dry_run(
    build: Callable[..., nn.Module],
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    ranks: int,
    full: bool = False,
) -> int:
    """Prints the plan of a run on ``ranks`` ranks; ``build(device="meta")`` gives the model's shapes. Returns 0.

    full: every matrix with its owner and cost, in place of a line per role.
    """
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
    print(plan.table() if full else by_role(plan))
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
        what = {
            "ddp": "2P by DDP's all-reduce",
            "deepspeed": f"{3 if stage == 3 else 2}P in the gathers and reductions of ZeRO stage {stage}",
        }.get(name, "3P in FSDP2's gathers and reductions")
        whole = own if name == "ddp" else count * 4 if name == "deepspeed" else own * (ranks // replicas)
        print(f"communication per step, gradients: {what}, P = {whole:,} bytes")
    for kind, size in traffic.items():
        print(f"communication per step and rank, optimizer's {kind}: {size:,} bytes")
    return 0
