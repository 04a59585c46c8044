"""Checks before data are prepared: everything that needs neither tokens nor weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from polargrad_dist.diagnostics import check_patterns
from polargrad_dist.errors import ConfigError
from polargrad_dist.integrations.deepspeed_checks import refuse_owner_state
from polargrad_dist.optim import OptimizerConfig, route
from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.checkpoint.folder import checkpoints_in
from polargrad_dist.trainer.choices import read_questions
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.metrics import check_packages
from polargrad_dist.trainer.strategies import check_gradients
from polargrad_dist.trainer.world import World

# What may differ between machines: only rank 0 reads text
OF_A_MACHINE = (
    "data.cache",
    "data.paths",
    "data.prefetch",
    "data.validation_paths",
    "data.workers",
    "trainer.device",
)


def preflight(
    config: TrainerConfig,
    optimizer: OptimizerConfig,
    build: Callable[..., nn.Module],
    configuration: dict[str, Any],
    world: int,
    vocab_size: int | None = None,
) -> nn.Module:
    """Checks a run on ``world`` ranks; returns its model on the meta device, of shapes alone.

    build: makes the model, given ``device="meta"``. vocab_size: the tokenizer's, if known already. Nothing is written.
    Raises ``ConfigError`` for the first problem that would end the run later.
    """
    config.check(world)
    optimizer.check()
    check_gradients(optimizer, config.strategy.name)
    check_packages(config.logging)
    folder = Path(config.run_dir)
    check_writable(folder)
    rundir.check(folder, configuration, config.allow_changes, config.checkpoint.resume)
    check_origin(folder, config.checkpoint.resume)
    if config.evaluation.hellaswag is not None:
        read_questions(config.evaluation.hellaswag, 1)
    model = build(device="meta")
    check_lengths(config, model)
    check_patterns(config.diagnostics, [name for name, p in model.named_parameters() if p.dim() >= 2])
    rows = getattr(model, "vocab_size", None)
    if vocab_size is not None and isinstance(rows, int) and rows < vocab_size:
        if (origin := configuration.get("model", {}).get("init_from")) is not None:
            raise ConfigError(
                f"the weights of model.init_from have {rows} tokens, but data.tokenizer has {vocab_size}: set "
                f"data.tokenizer.name to theirs, such as {origin!r}"
            )
        raise ConfigError(
            f"model.vocab_size is {rows}, but data.tokenizer has {vocab_size} tokens: set it to {vocab_size}, or leave it out"
        )
    groups = route(model, optimizer)
    if config.strategy.name == "deepspeed" and config.strategy.zero_stage_or_default > 0:
        for group in groups:
            role = group["role"] if getattr(optimizer, group["role"]) is not None else "embed"
            refuse_owner_state(f"optimizer.{role}", group)
    return model


def same_on_all_ranks(world: World, configuration: dict[str, Any]) -> None:
    """Raises ``ConfigError``, on all ranks, where one was started with another configuration: it would train something else,
    or end the others in the middle of a collective."""
    everywhere = [rundir.leaves(found) for found in world.gather(configuration)]
    for rank, found in enumerate(everywhere):
        for key in everywhere[0] | found:
            first, here = everywhere[0].get(key), found.get(key)
            if first != here and key not in OF_A_MACHINE:
                raise ConfigError(
                    f"{key} is {first!r} on rank 0 and {here!r} on rank {rank}, expected the same on all: start every rank "
                    "with the same command and the same files"
                )


def check_origin(folder: Path, resume: str) -> None:
    """Raises ``ConfigError`` for a run that is to begin at a checkpoint that does not exist.

    A run that has checkpoints of its own resumes from these, wherever it began.
    """
    if resume in ("auto", "never") or checkpoints_in(folder / "checkpoints") or os.path.isdir(resume):
        return
    raise ConfigError(
        f"trainer.checkpoint.resume is {resume!r}, which is no folder on this machine, expected auto, never, or the path of "
        "a checkpoint"
    )


def check_lengths(config: TrainerConfig, model: nn.Module) -> None:
    """Raises ``ConfigError`` for sequences that are longer than the model takes."""
    limit = getattr(model, "max_sequence_length", None)
    if limit is not None and config.sequence_length > limit:
        raise ConfigError(
            f"trainer.sequence_length is {config.sequence_length}, but model.max_sequence_length is {limit}: lower the "
            "one, or raise the other"
        )


def check_writable(folder: Path) -> None:
    """Raises ``ConfigError`` for a run directory that cannot be made or written."""
    there = folder.absolute()
    # `os.path.exists`, which is False where nobody may look; `Path.exists` raises there.
    while not os.path.exists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there):
        raise ConfigError(
            f"trainer.run_dir is {folder}, {'which' if there == folder.absolute() else there} is a file: expected a folder, "
            "or a name for a new one"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{folder} cannot be written (no permission for {there}): choose another trainer.run_dir"
        )
