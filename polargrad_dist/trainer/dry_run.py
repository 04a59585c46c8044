"""The plan of a run on N ranks, without starting it: parameters, routing, owners, memory, traffic, time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from polargrad_dist.distributed.plan import Plan
from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.console import duration
from polargrad_dist.trainer.devices import DEVICES
from polargrad_dist.trainer.estimate import SHARE, Estimate, estimate
from polargrad_dist.words import counted

GIB = 2**30


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
    lines.append(f"oracle work per rank, max/mean over {counted(plan.world, 'rank')}: {plan.imbalance:.3f}")
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
    found = estimate(build, optimizer, trainer, ranks)
    count = sum(math.prod(entry.shape) for entry in found.plan.entries)
    print(found.plan.table() if full else by_role(found.plan))
    print(f"\nparameters: {count:,}")
    batches = counted(trainer.accumulation(ranks), "micro-batch", "micro-batches")
    print(
        f"{counted(ranks, 'rank')}, strategy {found.strategy}, "
        f"{batches} of {counted(trainer.micro_batch, 'sequence')} per rank and step, "
        f"{counted(trainer.tokens_per_step, 'token')} per step, {counted(trainer.steps, 'step')}"
    )
    print("\n" + memory_table(found, trainer))
    if ranks > 1:
        print("\n" + traffic_table(found, optimizer, trainer))
    print("\n" + verdicts(found, trainer))
    return 0


def memory_table(found: Estimate, trainer: TrainerConfig) -> str:
    """Bytes of the fullest rank, part by part, and in all."""
    memory, host = found.memory, "in the host's memory" if found.memory.offloaded else ""
    kind = "+".join(sorted({str(e.dtype).removeprefix("torch.") for e in found.plan.entries}))
    passing = memory.passing >= memory.buffers
    aside = "not in the total: at another moment of the step"
    kind_of_blocks = "compiled" if memory.compiled else "uncompiled"
    why = f"not known: the model does not run without memory ({memory.why})"
    rows = [
        (f"parameters ({kind})", memory.lasting["parameters"], host),
        (f"gradients ({kind})", memory.lasting["gradients"], host),
        ("optimizer state", memory.lasting["optimizer"], host),
        (
            f"activations of {trainer.micro_batch} x {counted(trainer.sequence_length, 'token')}",
            memory.activations,
            why if memory.activations is None else kind_of_blocks if passing else aside,
        ),
        (
            "largest piece of the logits",
            memory.loss,
            "not known" if memory.loss is None else "" if passing else aside,
        ),
        *(
            [("gathered by FSDP2 for a moment", memory.gathered, "" if passing else aside)]
            if memory.gathered
            else []
        ),
        ("optimizer's buffers", memory.buffers, aside if passing else ""),
        (
            "total",
            memory.total,
            "estimated, not measured" if memory.whole else "at least: without what is not known",
        ),
    ]
    sums = [sum(row.values()) for row in found.plan.memory()]
    lines = [("memory" if found.ranks == 1 else "memory of a rank", "GiB", "bytes", "")]
    lines += [
        (name, "?" if size is None else f"{size / GIB:,.2f}", "?" if size is None else f"{size:,}", note)
        for name, size, note in rows
    ]
    text = table(lines, "<>><")
    if min(sums) < max(sums):
        text += f"\nof the fullest rank; the emptiest holds {(max(sums) - min(sums)) / GIB:,.2f} GiB less"
    return text


def traffic_table(found: Estimate, optimizer: OptimizerConfig, trainer: TrainerConfig) -> str:
    """Bytes that the busiest rank sends in a step."""
    rows = []
    if optimizer.gradients == "all_reduced":
        what = {
            "ddp": "gradients: DDP's all-reduce",
            "deepspeed": f"gradients: gathers and reductions of ZeRO stage {trainer.strategy.zero_stage_or_default}",
        }.get(found.strategy, "gradients: FSDP2's gathers and reductions")
        rows.append((what, found.gradients))
    rows += [(f"optimizer: {kind.replace('_', '-')}", size) for kind, size in found.plan.traffic().items()]
    lines = [("traffic of a rank per step", "GiB", "bytes")]
    return table([*lines, *((name, f"{size / GIB:,.2f}", f"{size:,}") for name, size in rows)], "<>>")


def verdicts(found: Estimate, trainer: TrainerConfig) -> str:
    """Whether a rank fits into each known GPU, how much is left, and how long steps and run would take there."""
    if trainer.device == "cpu":
        return "GPUs: no verdict, since trainer.device is cpu; set it to auto or cuda for one"
    lines = [("GPU", "GiB", "verdict", "GiB left", "ms/step", "tokens/s", "whole run")]
    for device in DEVICES:
        left = device.memory - found.memory.total
        verdict = "does not fit" if left < 0 else "fits" if found.memory.whole else "not known"
        seconds = found.seconds(device, trainer.precision)
        times = ("?", "?", "?")
        if seconds is not None:
            rate = trainer.tokens_per_step / seconds
            ms = 1e3 * seconds
            times = (
                f"{ms:,.0f}" if ms >= 100 else f"{ms:.2g}",
                f"{rate:,.0f}",
                duration(seconds * trainer.steps),
            )
        name = device.name if found.ranks == 1 else f"{found.ranks} x {device.name}"
        lines.append((name, f"{device.memory / GIB:,.1f}", verdict, f"{left / GIB:,.1f}", *times))
    kind = "fp32" if trainer.precision == "fp32" else "bf16"
    return (
        f"{table(lines, '<><>>>>')}\n"
        f"memory as the data sheets say, of which CUDA itself takes some; the model at {SHARE:.0%} of the peak in {kind},\n"
        "nothing overlapped, all GPUs linked as in one host, kernel launches not counted (they slow small models most):\n"
        "estimated, not measured"
    )


def table(rows: Sequence[tuple[str, ...]], aligned: str) -> str:
    """Rows as columns two spaces apart; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(aligned))]
    cells = [
        [f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)
