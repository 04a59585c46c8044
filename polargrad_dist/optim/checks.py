"""What the optimizer refuses, with a one-line error each, before anything is built or communicated."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from polargrad_dist.distributed.layout import overlap, slices
from polargrad_dist.distributed.plan import Entry, sum_rows
from polargrad_dist.distributed.transport import Agreement
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.matrix import RULES, kept_states, rule_of
from polargrad_dist.optim.member import Member
from polargrad_dist.optim.rules import ROLES, Rule

RULE_KEYS = tuple(key for key in Rule.__dataclass_fields__ if key != "options")
GROUP_KEYS = (
    *RULE_KEYS,
    "split_sizes",
    "num_heads",
    "flatten",
    "transposed",
    "role",
    "initial_lr",
    "params",
    "param_names",
)
# Owners, communication and state depend on these; everything else in a group may change between steps.
FIXED = (
    "algorithm",
    "momentum",
    "precondition",
    "normalize",
    "control",
    "center_rows",
    "oracle",
    "row_sharded",
    "split_sizes",
    "num_heads",
    "flatten",
    "transposed",
    "role",
)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_keys(group: Mapping[str, Any], where: str) -> None:
    """Raises ``ConfigError`` for a key that the group's rule does not read, with the most similar one that it does."""
    known = (*GROUP_KEYS, *getattr(RULES.get(str(group.get("algorithm"))), "options", ()))
    for key in group:
        if key not in known:
            # Roles are arguments of PolarGrad itself. No key here is similar enough to "learning_rate".
            near = (
                ["lr"] if key == "learning_rate" else difflib.get_close_matches(str(key), (*known, *ROLES), 1)
            )
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
            raise ConfigError(f"{where} has the key {key!r}, which no rule reads: {hint}")


def check_values(group: Mapping[str, Any], where: str) -> None:
    """Raises ``ConfigError`` for an invalid value in a group."""
    if missing := [key for key in RULE_KEYS if key not in group]:
        raise ConfigError(f"{where} has lost its {missing[0]!r}, expected every key it had")
    heads, sizes = group["num_heads"], group["split_sizes"]
    if heads is not None and not (isinstance(heads, int) and heads >= 1):
        raise ConfigError(f"{where}.num_heads is {heads!r}, expected null or a whole number >= 1")
    whole = isinstance(sizes, Sequence) and all(isinstance(size, int) and size >= 1 for size in sizes)
    if sizes is not None and not (whole and sizes):
        raise ConfigError(f"{where}.split_sizes is {sizes!r}, expected null or whole numbers >= 1")
    try:
        Rule(**{key: group[key] for key in RULE_KEYS}).check(where)
    except TypeError as error:
        raise ConfigError(f"{where} has a value of a wrong type: {error}") from error


def check_travel(comm_dtype: torch.dtype | str | None, bucket_mb: float | None) -> torch.dtype | None:
    """The dtype that collectives send. Raises ``ConfigError`` for an invalid name or size."""
    dtype = getattr(torch, comm_dtype, comm_dtype) if isinstance(comm_dtype, str) else comm_dtype
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"comm_dtype is {comm_dtype!r}, expected null, a floating dtype or its name")
    if dtype == torch.float16:
        raise ConfigError(
            "comm_dtype is float16, whose range momenta can leave, expected bfloat16 or a wider dtype"
        )
    if bucket_mb is not None and not (bucket_mb > 0 and math.isfinite(bucket_mb)):
        raise ConfigError(f"bucket_mb is {bucket_mb}, expected a size in MiB > 0")
    return dtype


def check_parameter(name: str, p: torch.Tensor, gradients: str) -> None:
    """Raises ``ConfigError`` for a parameter that no rule can step."""
    refuse_flat(name, p)
    if p.dtype not in FLOATS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ConfigError(f"{name} is {p.dtype}, expected one of {known}: keep it out of the optimizer")
    if p.device.type == "meta":
        raise ConfigError(f"{name} is on the meta device, expected real memory: materialize the model first")
    if not (p.to_local() if isinstance(p, DTensor) else p).is_contiguous():
        raise ConfigError(f"{name} is not contiguous in memory, expected it to be: use .contiguous()")
    if gradients == "reduce_scatter" and (isinstance(p, DTensor) or not p.requires_grad):
        raise ConfigError(
            f"{name} is {'sharded' if isinstance(p, DTensor) else 'frozen'}, which gradients='reduce_scatter' does not "
            "support: use gradients='all_reduced', or leave frozen parameters out"
        )
    if p.is_nested:
        raise ConfigError(f"{name} is a nested tensor, expected a dense one: keep it out of the optimizer")


def refuse_flat(name: str, p: torch.Tensor) -> None:
    """Raises ``ConfigError`` for a parameter that FSDP1 or DeepSpeed ZeRO has flattened."""
    if type(p).__name__ == "FlatParameter" or getattr(p, "_is_flat_param", False):
        raise ConfigError(
            f"{name} is an FSDP1 FlatParameter, expected a matrix: shard with FSDP2's fully_shard instead"
        )
    # Set with use_orig_params=True: each rank has some elements of some parameters.
    if getattr(p, "_fsdp_flattened", False):
        raise ConfigError(
            f"{name} is a part of an FSDP1 FlatParameter, expected a matrix: shard with FSDP2's fully_shard instead"
        )
    if hasattr(p, "ds_id"):
        raise ConfigError(
            f"{name} is partitioned by DeepSpeed ZeRO 3, expected a matrix: use ZeroPolarGrad of "
            "polargrad_dist.integrations.deepspeed, or FSDP2's fully_shard"
        )


def refuse_zero(members: Sequence[Member], entries: Sequence[Entry], agreement: Agreement | None) -> None:
    """Raises ``ConfigError``, on all ranks, for a matrix of zeros with control "hyperball". A collective.

    ``entries`` are the parameters of all ranks, ``members`` those that are stored here.
    """
    rows = sum_rows(entries)
    if not rows:
        return
    seen = torch.zeros(len(rows), dtype=torch.int32, device="cpu")
    for m in members:
        if not m.entry.pauses or m.entry.split is None:
            continue
        here, weight = m.entry.rectangles[m.team.place], m.canonical(m.p, m.shard)
        free = m.group["control"] != "hyperball"
        for i, matrix in enumerate(m.entry.split.matrices):
            seen[rows[m.entry.key, i]] = free or bool(weight[slices(overlap(here, matrix))].any())
    if agreement is not None:
        agreement.largest(seen)
    for e in entries:
        if e.pauses and not all(seen[rows[e.key, i]] for i in range(len(e.costs))):
            raise ConfigError(
                f"{e.name} holds a matrix of zeros with control 'hyperball', which keeps norms and could never step it, "
                "expected nonzero weights: initialize it otherwise, or use control 'decay'"
            )


def fixed_part(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The part of a group that must not change after construction."""
    return tuple(tuple(v) if isinstance(v := group[key], list) else v for key in FIXED)


def numbers(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """All of a group that may change between steps."""
    return tuple(
        float(v) if isinstance(v, torch.Tensor) and v.numel() == 1 and v.device.type == "cpu" else v
        for k, v in group.items()
        if k not in ("params", "param_names", "initial_lr", *FIXED)
    )


class Watch:
    """A parameter group as it was at construction, and its numbers when they last passed the checks."""

    def __init__(self, number: int, group: Mapping[str, Any]):
        self.number, self.fixed, self.numbers = number, fixed_part(group), numbers(group)
        self.pauses, self.kept = rule_of(group).pauses(group), kept_states(group).keys()

    def complaint(self, group: Mapping[str, Any]) -> ConfigError | None:
        """The error for an invalid value in the group as it is now, or for one that must not change."""
        where = f"parameter group {self.number}"
        if missing := [key for key in FIXED if key not in group]:
            return ConfigError(f"{where} has lost its {missing[0]!r}, expected every key it had")
        if (now := numbers(group)) != self.numbers:
            try:
                check_values(group, where)
            except ConfigError as error:
                return error
            if rule_of(group).pauses(group) != self.pauses:
                return ConfigError(
                    f"{where} has scale {group['scale']!r} and floor {group['floor']}, which need other sums over ranks than "
                    "at construction, expected scale 'nuclear_shared', or a floor above 0, from construction on or never: "
                    "build a new optimizer"
                )
            if kept_states(group).keys() - self.kept:
                return ConfigError(
                    f"{where} has scale {group['scale']!r}, which keeps state per matrix, expected it from construction on "
                    "or never: build a new optimizer"
                )
            self.numbers = now
        if (fixed := fixed_part(group)) != self.fixed:
            both = zip(FIXED, self.fixed, fixed, strict=True)
            key, old, new = next((k, a, b) for k, a, b in both if a != b)
            return ConfigError(
                f"{key!r} of {where} became {new!r}, expected {old!r} as at construction: build a new optimizer, because "
                "owners and state depend on it"
            )
        return None
