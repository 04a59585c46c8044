"""The validation loss: a mean over a fixed set of tokens, each evaluated on exactly one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from polargrad_dist.trainer.strategies import Placed
from polargrad_dist.trainer.world import World

BATCHES_BETWEEN_QUESTIONS = 8


@torch.no_grad()
def evaluate(
    placed: Placed, validation: Any, world: World, done: float, asked: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Nats per token and, where the text's bytes are known, bits per byte; the same on all ranks.

    done: fraction of the run's steps that are done. asked: whether this rank was asked to leave, checked every few batches;
    if one was, all ranks return None.
    """
    model = placed.model
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    try:
        for number, (tokens, targets) in enumerate(validation.batches()):
            world.at("validation")
            count = int((targets != -100).sum())
            tokens, targets = tokens.to(world.device), targets.to(world.device)
            with placed.autocast():
                loss = model(tokens, targets, progress=done)
            if count:
                total += torch.stack(
                    [loss.double() * count, torch.full_like(loss, count, dtype=torch.float64)]
                )
            if number % BATCHES_BETWEEN_QUESTIONS == 0 and world.any(asked()):
                return None
    finally:
        model.train()
        placed.rest()
    summed, count = world.sum(total).tolist()
    out = {"validation_loss": summed / count}
    if validation.bytes_per_token:
        out["bits_per_byte"] = summed / count / math.log(2) / validation.bytes_per_token
    return out
