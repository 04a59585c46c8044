"""Learning-rate and momentum schedules: pure functions of the step, so that a resumed run needs no state of theirs.

``step`` counts from 0, ``steps`` is the length of the run; factors multiply each group's base value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from polargrad_dist.errors import ConfigError


@dataclass
class ScheduleConfig:
    """How the learning rates of all roles change over the run.

    Args:
        kind: "constant"; "cosine" to zero; "linear": constant, then linear to zero over the last part of the run; "wsd":
            warm-up, stable, then decay as 1 - sqrt over the last part.
        warmup_steps: steps of linear warm-up from zero, before anything else.
        decay_fraction: the last part of the run, as a fraction of its steps, in which "linear" and "wsd" decay.
        momentum_warmup_steps: steps over which the hidden layers' momentum coefficient grows to its own value; 0 for none.
        momentum_warmup_start: the coefficient at step 0 of that warm-up.
    """

    kind: Literal["constant", "cosine", "linear", "wsd"] = "linear"
    warmup_steps: int = 0
    decay_fraction: float = 0.4
    momentum_warmup_steps: int = 0
    momentum_warmup_start: float = 0.85

    def check(self, steps: int) -> None:
        """Raises ``ConfigError`` for a value that makes no sense in a run of ``steps``."""
        if not 0 <= self.warmup_steps <= steps:
            raise ConfigError(
                f"trainer.schedule.warmup_steps is {self.warmup_steps}, expected 0 to trainer.steps = {steps}"
            )
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(
                f"trainer.schedule.decay_fraction is {self.decay_fraction}, expected a number in [0, 1]"
            )
        if self.momentum_warmup_steps < 0 or not 0 <= self.momentum_warmup_start < 1:
            raise ConfigError(
                f"trainer.schedule.momentum_warmup_steps and _start are {self.momentum_warmup_steps} and "
                f"{self.momentum_warmup_start}, expected steps >= 0 and a coefficient in [0, 1)"
            )


def lr_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of every learning rate at ``step`` of a run of ``steps``; 0 after its end, unless constant."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    match config.kind:
        case "constant":
            return 1.0
        case "cosine":
            done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        case "linear":
            return _left(config, step, steps)
        case "wsd":
            return 1 - math.sqrt(1 - _left(config, step, steps))


def _left(config: ScheduleConfig, step: int, steps: int) -> float:
    """The part of the decay that lies ahead: 1 until it begins, 0 at the end of the run."""
    if config.decay_fraction == 0:
        return 1.0
    return min(1.0, max(0.0, (steps - step) / (config.decay_fraction * steps)))


def momentum_at(config: ScheduleConfig, step: int, beta: float) -> float:
    """The momentum coefficient at ``step`` of a group whose own is ``beta``: linear from the start value, then ``beta``."""
    if step >= config.momentum_warmup_steps:
        return beta
    done = step / config.momentum_warmup_steps
    return (1 - done) * config.momentum_warmup_start + done * beta
