"""Compares the settings of ``accelerate launch`` (ACCELERATE_* and FSDP_* variables) with the run's configuration.

The trainer is configured by its own keys: a contradicting setting of the launcher is refused, never ignored. The launcher's
defaults ("no" precision, no dynamo backend) count as not set.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from polargrad_dist.errors import ConfigError

if TYPE_CHECKING:
    from polargrad_dist.trainer.config import TrainerConfig

# The launcher's precision, and the values of trainer.precision that fit it.
PRECISIONS = {"bf16": ("bf16-mixed", "bf16")}


def check_launcher(config: TrainerConfig, world: int) -> None:
    """Raises ``ConfigError`` for the first setting of ``accelerate launch`` that ``config`` contradicts."""
    precision = said("ACCELERATE_MIXED_PRECISION", "no")
    if precision is not None and config.precision not in PRECISIONS.get(precision, ()):
        known = " or ".join(map(repr, PRECISIONS.get(precision, ())))
        refuse(
            "ACCELERATE_MIXED_PRECISION",
            f"trainer.precision is {config.precision!r}",
            f"{known} beside it" if known else "'no' or 'bf16', the others do not exist here",
        )
    strategy = str(config.strategy.name)
    if on("ACCELERATE_USE_FSDP"):
        _check_fsdp(config, strategy)
    if on("ACCELERATE_USE_DEEPSPEED") and strategy != "deepspeed":
        refuse(
            "ACCELERATE_USE_DEEPSPEED", f"trainer.strategy.name is {strategy!r}", "a launch without DeepSpeed"
        )
    for name, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ):
        if on(name):
            refuse(name, f"trainer.strategy.name is {strategy!r}", f"a launch without {what}")
    backend = said("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend is not None and not (config.compile and backend == "inductor"):
        refuse(
            "ACCELERATE_DYNAMO_BACKEND",
            f"trainer.compile is {config.compile}",
            "no backend, or inductor with compile: true",
        )
    steps, accumulation = said("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), config.accumulation(world)
    if steps is not None and steps != str(accumulation):
        given = f"trainer.global_batch and micro_batch make it {accumulation}"
        refuse("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", given, f"{accumulation}")
    if on("ACCELERATE_USE_CPU") and config.device != "cpu" and torch.cuda.is_available():
        refuse(
            "ACCELERATE_USE_CPU",
            f"trainer.device is {config.device!r}, which takes the GPU",
            "'cpu' beside it",
        )


def _check_fsdp(config: TrainerConfig, strategy: str) -> None:
    if strategy not in ("fsdp", "hsdp"):
        refuse("ACCELERATE_USE_FSDP", f"trainer.strategy.name is {strategy!r}", "'fsdp' or 'hsdp' beside it")
    if said("FSDP_VERSION", "2") is not None:
        refuse("FSDP_VERSION", f"trainer.strategy.name is {strategy!r}, which is FSDP2", "fsdp_version 2")
    for name, key, value in (
        ("FSDP_OFFLOAD_PARAMS", "strategy.cpu_offload", config.strategy.cpu_offload),
        (
            "FSDP_RESHARD_AFTER_FORWARD",
            "strategy.reshard_after_forward",
            config.strategy.reshard_after_forward,
        ),
        ("FSDP_ACTIVATION_CHECKPOINTING", "activation_checkpointing", config.activation_checkpointing),
    ):
        # Other values, such as FULL_SHARD, are FSDP1's.
        if os.environ.get(name, "").lower() in ("true", "false") and on(name) != value:
            refuse(name, f"trainer.{key} is {str(value).lower()}", "the same in both")


def refuse_lone_process() -> None:
    """Raises ``ConfigError`` if several processes on CPUs were requested and ``accelerate launch`` started only one."""
    on_cpus = on("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if on_cpus and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate launch started one process (RANK is not set), expected the several processes on CPUs that were "
            "requested: start with torchrun --nproc_per_node N train.py …"
        )


def on(name: str) -> bool:
    """Whether a variable is true, as Accelerate reads it."""
    return os.environ.get(name, "").lower() in ("true", "1", "yes", "y", "t", "on")


def said(name: str, nothing: str) -> str | None:
    """A variable's value in lower case; None if it is not set or equals ``nothing``."""
    value = os.environ.get(name, "").lower()
    return None if value in ("", nothing) else value


def refuse(name: str, here: str, expected: str) -> None:
    raise ConfigError(
        f"accelerate launch says {name}={os.environ[name]}, but {here}, expected {expected}: change the launcher's setting "
        "(accelerate config, or its option), or the trainer's"
    )
