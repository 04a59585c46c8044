"""What the optimizer refuses, in one sentence each, before anything is built or moved."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.rules import Rule

RULE_KEYS = tuple(Rule.__dataclass_fields__)
GROUP_KEYS = (
    *RULE_KEYS,
    "split_sizes",
    "num_heads",
    "flatten",
    "role",
    "initial_lr",
    "params",
    "param_names",
)
# What owners, travel and state were laid out for; everything else of a group may change between steps.
FIXED = ("algorithm", "momentum", "oracle", "row_sharded", "split_sizes", "num_heads", "flatten", "role")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_keys(group: Mapping[str, Any], where: str) -> None:
    """Raises ``ConfigError`` for a key that no rule reads, with the nearest that one does."""
    for key in group:
        if key not in GROUP_KEYS:
            near = difflib.get_close_matches(str(key), GROUP_KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(GROUP_KEYS)}"
            raise ConfigError(f"{where} has the key {key!r}, which no rule reads: {hint}")


def check_values(group: Mapping[str, Any], where: str) -> None:
    """Raises ``ConfigError`` for a value of a group that cannot be meant."""
    heads, sizes = group["num_heads"], group["split_sizes"]
    if heads is not None and not (isinstance(heads, int) and heads >= 1):
        raise ConfigError(f"{where}.num_heads is {heads!r}, expected null or a whole number >= 1")
    whole = isinstance(sizes, Sequence) and all(isinstance(size, int) and size >= 1 for size in sizes)
    if sizes is not None and not (whole and sizes):
        raise ConfigError(f"{where}.split_sizes is {sizes!r}, expected null or whole numbers >= 1")
    for key in ("lr", "beta", "eps", "lower", "weight_decay", "steps"):
        value = group[key]
        if value is None and key == "steps":
            continue
        if not isinstance(value, int | float | torch.Tensor) or isinstance(value, bool):
            raise ConfigError(f"{where}.{key} is {value!r}, expected a number")
    try:
        Rule(**{key: group[key] for key in RULE_KEYS}).check(where)
    except TypeError as error:
        raise ConfigError(f"{where} has a value of a wrong type: {error}") from error


def check_travel(comm_dtype: torch.dtype | str | None, bucket_mb: float) -> torch.dtype | None:
    """The dtype in which things travel. Raises ``ConfigError`` for a name or a size that cannot be meant."""
    dtype = getattr(torch, comm_dtype, comm_dtype) if isinstance(comm_dtype, str) else comm_dtype
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"comm_dtype is {comm_dtype!r}, expected null, a floating dtype or its name")
    if not (bucket_mb > 0 and math.isfinite(bucket_mb)):
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
    if gradients == "to_owner" and (isinstance(p, DTensor) or not p.requires_grad):
        raise ConfigError(
            f"{name} is {'sharded' if isinstance(p, DTensor) else 'frozen'}, which gradients='to_owner' does not "
            "support: use gradients='all_reduced', or leave frozen parameters out"
        )


def refuse_flat(name: str, p: torch.Tensor) -> None:
    """Raises ``ConfigError`` for a parameter whose matrix has been flattened away by FSDP1 or DeepSpeed ZeRO."""
    if type(p).__name__ == "FlatParameter" or getattr(p, "_is_flat_param", False):
        raise ConfigError(
            f"{name} is an FSDP1 FlatParameter, its matrices are gone: shard with FSDP2's fully_shard instead"
        )
    if hasattr(p, "ds_id"):
        raise ConfigError(
            f"{name} is partitioned by DeepSpeed ZeRO 3, its matrix is gone: use ZeRO stage 0, or FSDP2's fully_shard"
        )


def fixed_part(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The part of a group that must not change after construction."""
    return tuple(tuple(v) if isinstance(v := group[key], list) else v for key in FIXED)


def complaint(groups: Sequence[Mapping[str, Any]], fixed: Sequence[tuple[Any, ...]]) -> ConfigError | None:
    """What keeps this rank from stepping: a value that cannot be meant, one that may not change, a sparse gradient."""
    for number, (group, before) in enumerate(zip(groups, fixed, strict=True)):
        try:
            check_values(group, f"parameter group {number}")
        except ConfigError as error:
            return error
        for key, old, now in zip(FIXED, before, fixed_part(group), strict=True):
            if now != old:
                return ConfigError(
                    f"{key!r} of parameter group {number} became {now!r}, expected {old!r} as at construction: owners "
                    "and state were laid out for it, so build a new optimizer"
                )
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if p.grad is not None and p.grad.layout != torch.strided:
                return ConfigError(
                    f"the gradient of {name} is sparse, expected a dense one: build nn.Embedding with sparse=False (rows "
                    "that are zero stay zero, and on CPUs cost nothing)"
                )
    return None
