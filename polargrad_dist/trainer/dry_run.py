"""The plan of a run on N ranks, without starting it: parameters, routing, owners, memory, traffic, time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from polargrad_dist.distributed.plan import Plan
from polargrad_dist.integrations.fragments import planned
from polargrad_dist.optim import OptimizerConfig, plan_for, route
from polargrad_dist.optim.member import CPU_BUCKET, GPU_BUCKET
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.estimate import DEVICES, SHARE, Work, activations


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
    lines.append("every matrix with its owner: --dry_run_full in place of --dry_run")
    return "\n".join(lines)


def dry_run(
    build: Callable[..., nn.Module],
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    ranks: int,
    full: bool = False,
) -> int:
    """Prints the plan of a run on ``ranks`` ranks; ``build(device="meta")`` gives the model's shapes. Returns 0.

    full: list every matrix with its owner and cost instead of a line per role.
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
    shards = ranks // replicas
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
    lasting = max(sum(row.values()) for row in memory)
    peak = lasting + _for_a_moment(build, model, optimizer, trainer)
    print(f"bytes per rank, at the peak: {peak:,} ({peak / 2**30:.2f} GiB), estimated, not measured")
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
    if hasattr(model, "flops_per_token"):
        tokens = trainer.tokens_per_step / ranks
        gradients = (2 if name == "ddp" else 3) * own * (1 if name == "ddp" else shards) if ranks > 1 else 0
        work = Work(
            model=model.flops_per_token(trainer.sequence_length) * tokens,  # type: ignore[operator]
            oracle=max(plan.loads.values(), default=0.0),
            moved=3.0 * lasting,
            travelling=gradients + sum(traffic.values()),
        )
        for device in DEVICES if trainer.device != "cpu" else ():
            seconds = work.seconds(device, trainer.precision)
            fits = "" if peak < device.memory else "; does not fit into its memory"
            print(
                f"time per step, {ranks} x {device.name}: about {1e3 * seconds:,.0f} ms, "
                f"{trainer.tokens_per_step / seconds:,.0f} tokens/s (model at {SHARE:.0%} of the peak, not measured{fits})"
            )
    return 0


def _for_a_moment(
    build: Callable[..., nn.Module], model: nn.Module, optimizer: OptimizerConfig, trainer: TrainerConfig
) -> int:
    """Temporary bytes of a step: activations and a piece of the logits, or the optimizer's buffers."""
    try:
        kept = activations(build, trainer)
        print(f"bytes per rank, activations of a micro-batch: {kept:,} ({kept / 2**30:.2f} GiB), uncompiled")
    except Exception as error:  # a custom model may do anything with meta tensors
        reason = " ".join(str(error).split())[:200]
        print(
            f"bytes per rank, activations: not known, since the model does not run on meta tensors ({reason})"
        )
        kept = 0
    piece = 0
    if hasattr(model, "loss_bytes"):
        itemsize = 4 if trainer.precision == "fp32" else 2
        piece = model.loss_bytes(trainer.micro_batch * trainer.sequence_length, itemsize)  # type: ignore[operator]
        print(f"bytes per rank, a piece of the logits: {piece:,}")
    default = CPU_BUCKET if trainer.device == "cpu" else GPU_BUCKET
    buffers = 3 * (default if optimizer.bucket_mb is None else int(optimizer.bucket_mb * 2**20))
    print(f"bytes per rank, the optimizer's buffers: {buffers:,}")
    return max(kept + piece, buffers)
