"""What all ranks raise together when a rule failed on one of them: the same words everywhere, the cause where it happened."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polargrad_dist.distributed.plan import Entry
from polargrad_dist.distributed.transport import Agreement
from polargrad_dist.errors import ConfigError, PolarError
from polargrad_dist.optim.facts import NOT_FINITE, OUT_OF_MEMORY, REFUSED, Facts


def raise_together(
    facts: Facts, agreement: Agreement | None, entries: Sequence[Entry], device: torch.device
) -> None:
    """Raises the worst failure of a step on all ranks."""
    kind, index = facts.worst()
    worst = kind << 32 | index
    if agreement is not None:
        worst = int(agreement.largest(torch.tensor([worst])))
    if worst:
        kind, index = worst >> 32, worst & 0xFFFFFFFF
        own = facts.error if facts.failure == (kind, index) else None
        raise failure_of(kind, entries[index], own, device) from own


def failure_of(kind: int, entry: Entry, cause: Exception | None, device: torch.device) -> Exception:
    """The error for a failure of this kind at a parameter; ``cause`` was raised on the rank where it was."""
    name, rest = entry.name, "its weights are as they were, the others have been stepped"
    if entry.kind == "elementwise" and any(cut is not None for cut in entry.layout.state_cuts):
        rest = "that shard of it is as it was, the rest has been stepped"
    if kind == NOT_FINITE:
        return PolarError(
            f"the gradient or momentum of {name} is not finite, so {rest}: restore the model and this optimizer from a "
            "checkpoint, and step only when clip_grad_norm_ returns a finite norm"
        )
    words = f"{type(cause).__name__}: {cause}" if cause is not None else "another rank's error tells why"
    if kind == OUT_OF_MEMORY:
        return torch.OutOfMemoryError(
            f"the polar decomposition of {name} ran out of memory on {device.type}, so {rest} ({words}): lower "
            "bucket_mb or the batch"
        )
    if kind == REFUSED:
        return ConfigError(f"{name} was not stepped, the others have been ({words})")
    return PolarError(f"the rule of {name} failed, so {rest} ({words})")
