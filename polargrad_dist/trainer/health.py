"""When to skip a step or refuse a save: non-finite losses, gradients and weights, and where they came from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor

from polargrad_dist.trainer.config import SafetyConfig
from polargrad_dist.trainer.world import World


def reason_to_skip(loss: float, norm: float, recent: Sequence[float], safety: SafetyConfig) -> str | None:
    """Why a step must be skipped, from figures that all ranks share; None if it may be applied."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    if safety.spike_sigma is not None and len(recent) == safety.spike_window:
        mean = sum(recent) / len(recent)
        spread = math.sqrt(sum((x - mean) ** 2 for x in recent) / len(recent))
        if loss > mean + safety.spike_sigma * spread:
            return f"the loss {loss:.4f} is a spike above {mean:.4f} + {safety.spike_sigma} x {spread:.4f}"
    return None


@torch.no_grad()
def magnitudes(tensors: Mapping[str, torch.Tensor]) -> tuple[list[str], list[torch.Tensor]]:
    """Names, and the largest magnitude of each tensor's part on this rank: one number for each name, in a few tensors, one
    for every device and dtype, in the order of the names. Nothing is read from the device.

    Unlike a sum of squares it cannot overflow where every element is finite.
    """
    kinds: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if part.is_floating_point() and part.numel():
            kinds[part.device, part.dtype][name] = part
    largest = [torch.stack(torch._foreach_norm(list(named.values()), math.inf)) for named in kinds.values()]
    return [name for named in kinds.values() for name in named], largest


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors whose part on this rank holds a NaN or an infinity; one read from the device per dtype."""
    names, largest = magnitudes(tensors)
    finite = [good for x in largest for good in x.isfinite().tolist()]
    return [name for name, good in zip(names, finite, strict=True) if not good]


def culprits(world: World, bad: Sequence[str], own_loss: float) -> str:
    """Names the ranks and parameters that made a step non-finite; every rank calls it with its own bad gradients."""
    found = world.gather((math.isfinite(own_loss), len(bad), bad[:1]))
    losses = [rank for rank, (finite, _, _) in enumerate(found) if not finite]
    parts = [f"; loss of rank {', '.join(map(str, losses))}"] if losses else []
    parts += [
        f"; on rank {rank} the gradient of {named(count, first)}"
        for rank, (_, count, first) in enumerate(found)
        if count
    ]
    return "".join(parts)


def poisoned(world: World, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Names what is not finite on any rank; None if every rank's tensors are finite. Every rank calls it."""
    bad = not_finite(tensors)
    found = world.gather((len(bad), bad[:1]))
    parts = [f"{named(count, first)} on rank {rank}" for rank, (count, first) in enumerate(found) if count]
    return "; ".join(parts) if parts else None


def named(count: int, first: Iterable[str]) -> str:
    return " ".join(first) + (f" and {count - 1} more" if count > 1 else "")
