"""Checks that ranks agree: on the placement of gradients, the numbers of groups, and the weights and gradients of copies.

Every function is a collective.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from polargrad_dist.distributed.plan import Entry
from polargrad_dist.distributed.transport import Agreement
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.checks import numbers
from polargrad_dist.optim.world import World

# Steps between checks that all ranks have the same learning rates, and that copies are still equal.
RATES_CHECKED = 50
COPIES_CHECKED = 20 * RATES_CHECKED


def redistribute(world: World) -> None:
    """Redistributes gradients whose placement differs from their parameter's (sequence parallelism) to the parameter's."""
    if world.agreement is None:
        return
    here = torch.zeros(len(world.entries), dtype=torch.int32, device="cpu")
    for m in world.members:
        here[m.index] = m.misplaced
    somewhere = world.agreement.largest(here.clone())
    if not somewhere.any():
        return
    unlike = [m.entry.name for m in world.members if somewhere[m.index] and not here[m.index]]
    if int(world.agreement.largest(torch.tensor([len(unlike)], device="cpu"))):
        name = unlike[0] if unlike else world.entries[int(somewhere.nonzero()[0])].name
        raise ConfigError(
            f"the gradient of {name} is missing or has another placement on some ranks, expected the same placement on "
            "all: run the same computation on every rank, or give zero gradients"
        )
    for m in sorted(world.members, key=lambda m: m.index):
        if here[m.index]:
            m.p.grad = m.p.grad.redistribute(m.p.device_mesh, m.p.placements)  # type: ignore[union-attr, attr-defined]


def check_alike(world: World, groups: Sequence[Mapping[str, Any]], step: int) -> None:
    """Checks, at the first two steps and every `RATES_CHECKED` steps, that ranks have not silently diverged.

    Raises ``ConfigError`` on all ranks.
    """
    if world.agreement is None:
        return
    if (unlike := other_numbers(world, world.agreement, groups)) is not None:
        raise ConfigError(
            f"the learning rate or another number of parameter group {unlike.group} differs between ranks, expected "
            "the same on all ranks: step the same scheduler on every rank"
        )
    if step > 2 and step % COPIES_CHECKED:
        return
    what, name = world.differing() or (None, "")
    if what is None:
        return
    if what == 0:
        raise ConfigError(
            f"{name} differs between ranks that hold copies of it, expected equal weights: give the ranks the same weights "
            "before the first step (DistributedDataParallel does so when it wraps the model, fully_shard does not)"
        )
    raise ConfigError(
        f"the gradient of {name} differs between ranks that hold copies of it, expected equal gradients: wrap the model "
        "in DistributedDataParallel, average the gradients before step(), or use gradients='reduce_scatter'; if only "
        "some ranks train together, give their process_group"
    )


def other_numbers(world: World, agreement: Agreement, groups: Sequence[Mapping[str, Any]]) -> Entry | None:
    """The first parameter whose group has different numbers on another rank; ranks may have different groups."""
    nowhere = torch.iinfo(torch.int64).min
    found = torch.full((2, len(world.entries)), nowhere, device="cpu")
    digests = {id(group): zlib.crc32(repr(numbers(group)).encode()) for group in groups}
    for m in world.members:
        found[:, m.index] = torch.tensor([digests[id(m.group)], -digests[id(m.group)]], device="cpu")
    high, low = agreement.largest(found)
    differ = (high != -low) & (high != nowhere)
    return world.entries[int(differ.nonzero()[0])] if differ.any() else None
