"""What of DeepSpeed does not fit `ZeroPolarGrad`, refused by name: in its configuration, and in what it makes of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.matrix import kept_states

TESTED = ("0.19",)
ONE_BIT = ("onebitadam", "onebitlamb", "zerooneadam")
WAY_OUT = "use ZeRO stages 0 to 3 without it, or this trainer's own strategies 'fsdp' and 'hsdp'"
# Classes of DeepSpeed that say that a parameter is not what it seems.
FOREIGN = {
    "PipelineModule": "pipeline parallelism",
    "MoE": "mixture of experts (deepspeed.moe)",
    "AutoEPMoELayer": "mixture of experts (AutoEP)",
    "TensorParallel_Layer": "tensor parallelism (AutoTP)",
}


def check_version() -> None:
    """Raises ``ConfigError`` for a DeepSpeed that is missing, or of a minor version that was not tested."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise ConfigError("DeepSpeed is not installed: pip install deepspeed") from None
    if ".".join(found.split(".")[:2]) not in TESTED:
        raise ConfigError(
            f"DeepSpeed is {found}, tested is {' and '.join(TESTED)}: its private names change from version to version, so "
            f"install 'deepspeed=={TESTED[-1]}.*'"
        )


def refuse_unknown(
    model: nn.Module | None, stage: int, params: Sequence[Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Raises ``ConfigError`` for what of DeepSpeed changes which rank holds what, beyond ZeRO stages 0 to 3."""
    found = [
        name
        for module in (model.modules() if model is not None else ())
        for kind in type(module).__mro__
        if (name := FOREIGN.get(kind.__name__)) and kind.__module__.startswith("deepspeed")
    ]
    if any(group.get("moe") for group in groups) or any(not getattr(p, "allreduce", True) for p in params):
        found.append("mixture of experts")
    zero: Any = getattr(params[0], "_z3_optimizer", None) or getattr(params[0], "_zero_optimizer", None)
    if stage == 3:
        if type(zero).__name__ != "DeepSpeedZeroOptimizer_Stage3":
            found.append(type(zero).__name__)
        if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
            found.append("NVMe offload")
        if zero.zero_hpz_partition_size > 1:
            found.append("hpZ (zero_hpz_partition_size)")
    if getattr(zero, "zenflow", False):
        found.append("ZenFlow")
    sharers = zero.dp_process_group if stage == 3 else getattr(params[0], "_dp_group", None)
    if not found and sharers is not None and dist.get_world_size(sharers) != dist.get_world_size():
        found.append(f"sharding over {dist.get_world_size(sharers)} of {dist.get_world_size()} ranks")
    if found:
        raise ConfigError(f"DeepSpeed runs with {found[0]}, which ZeroPolarGrad does not support: {WAY_OUT}")


def refuse_owner_state(what: str, group: Mapping[str, Any]) -> None:
    """Raises ``ConfigError`` for a rule that keeps state with whole matrices, which ZeRO's flat vectors have no room for."""
    if not kept_states(group):
        return
    parts = {"scale": "nuclear_relative", "normalize": "rows", "precondition": "soap"}
    key = next((key for key, value in parts.items() if group[key] == value), "algorithm")
    way = {
        "scale": "set scale to 'nuclear' with a rate of its own (docs/choosing-rules.md)",
        "algorithm": "use another rule",
    }.get(key, f"set {key} to 'none'")
    raise ConfigError(
        f"{what} has {key} {group[key]!r}, which keeps state with whole matrices, expected a rule whose state fits the flat "
        f"vectors of ZeRO stages 1 to 3: {way}, or use ZeRO stage 0"
    )


def check_config(config: Mapping[str, Any] | str) -> None:
    """Raises ``ConfigError`` for what ZeroPolarGrad does not support, in DeepSpeed's configuration as a dict or a JSON file.

    What it lets pass is looked at again when the optimizer is bound; an ``optimizer`` section, a 1-bit one included, is seen
    only here, since DeepSpeed ignores it beside a client optimizer.
    """
    if isinstance(config, str):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    assert isinstance(config, Mapping)
    kind = str((config.get("optimizer") or {}).get("type", ""))
    if kind.lower() in ONE_BIT:
        raise ConfigError(
            f"DeepSpeed's optimizer is {kind}, a 1-bit optimizer, expected no such section: remove it"
        )
    if kind:
        raise ConfigError(
            f"DeepSpeed's optimizer is {kind}, which it ignores beside ZeroPolarGrad, expected no such section: remove it"
        )
    zero = config.get("zero_optimization") or {}
    devices = [(zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")]
    for there, what in (
        ("nvme" in devices, "NVMe offload"),
        (zero.get("zero_hpz_partition_size", 1) > 1, "hpZ (zero_hpz_partition_size)"),
        (zero.get("mics_shard_size", -1) > 0, "MiCS (mics_shard_size)"),
        (zero.get("zenflow") is not None, "ZenFlow"),
        (bool(zero.get("round_robin_gradients")), "round_robin_gradients"),
        ((config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1, "tensor parallelism (AutoTP)"),
        ("expert_parallel" in config or "autoep" in config, "mixture of experts (AutoEP)"),
        (
            (zero.get("offload_optimizer") or {}).get("ratio", 1.0) != 1.0,
            "partial offload (offload_optimizer.ratio)",
        ),
    ):
        if there:
            raise ConfigError(
                f"DeepSpeed is configured with {what}, which ZeroPolarGrad does not support: {WAY_OUT}"
            )
