"""Learning-rate and momentum schedules: pure functions of the step, so a resumed run needs no state for them.

``step`` counts from 0, ``steps`` is the length of the run; factors multiply each group's base value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from polargrad_dist.errors import ConfigError

Kind = Literal["constant", "cosine", "linear", "wsd"]


@dataclass
class RoleSchedule:
    """Changes to the run's schedule for one role, in its section: ``trainer.schedule.hidden`` for example.

    Args:
        kind: defaults to the run's.
        warmup_steps: defaults to the run's.
        decay_fraction: defaults to the run's.
        power: defaults to the run's.
        floor: defaults to the run's.
        momentum_warmup_steps: of this role's momentum; defaults to the run's for hidden, to 0 for the other roles.
        momentum_warmup_start: defaults to the run's.
        momentum_cooldown_steps: of this role's momentum; defaults to the run's for hidden, to 0 for the other roles.
        momentum_cooldown_end: defaults to the run's.
    """

    kind: Kind | None = None
    warmup_steps: int | None = None
    decay_fraction: float | None = None
    power: float | None = None
    floor: float | None = None
    momentum_warmup_steps: int | None = None
    momentum_warmup_start: float | None = None
    momentum_cooldown_steps: int | None = None
    momentum_cooldown_end: float | None = None


@dataclass
class ScheduleConfig:
    """How learning rates and momenta change over the run, for all roles or for one.

    Args:
        kind: "constant"; "cosine" to zero; "linear": constant, then linear to zero over the last part of the run; "wsd":
            warm-up, stable, then decay as 1 - sqrt over the last part.
        warmup_steps: steps of linear warm-up from zero, before anything else.
        decay_fraction: the last part of the run, as a fraction of its steps, in which "linear" and "wsd" decay.
        power: exponent of the remaining part of the decay, under "linear"; 1.2 is the benchmark's PowerCool.
        floor: minimum factor of the learning rate after its warm-up.
        momentum_warmup_steps: steps over which the hidden layers' momentum coefficient grows to its full value; 0 for none.
        momentum_warmup_start: the coefficient at step 0 of that warm-up.
        momentum_cooldown_steps: number of last steps of the run over which it falls again; 0 for none.
        momentum_cooldown_end: the coefficient at the end of the run.
        hidden: changes for the hidden matrices; null for none.
        embed: changes for the embedding.
        head: changes for the head.
        value_embed: changes for the value embeddings.
        scalar: changes for scalars and vectors.
    """

    kind: Kind = "linear"
    warmup_steps: int = 0
    decay_fraction: float = 0.4
    power: float = 1.0
    floor: float = 0.0
    momentum_warmup_steps: int = 0
    momentum_warmup_start: float = 0.85
    momentum_cooldown_steps: int = 0
    momentum_cooldown_end: float = 0.85
    hidden: RoleSchedule | None = None
    embed: RoleSchedule | None = None
    head: RoleSchedule | None = None
    value_embed: RoleSchedule | None = None
    scalar: RoleSchedule | None = None

    def of(self, role: str) -> ScheduleConfig:
        """The complete schedule of a role. The run's momentum schedule applies to the hidden layers only."""
        own: dict[str, Any] = {
            k: v for k, v in asdict(getattr(self, role) or RoleSchedule()).items() if v is not None
        }
        rest: dict[str, Any] = (
            {} if role == "hidden" else {"momentum_warmup_steps": 0, "momentum_cooldown_steps": 0}
        )
        changes: dict[str, Any] = dict.fromkeys(ROLES) | rest | own
        return replace(self, **changes)

    def check(self, steps: int) -> None:
        """Raises ``ConfigError`` for a value that is invalid in a run of ``steps``."""
        for role in (None, *(role for role in ROLES if getattr(self, role) is not None)):
            (self if role is None else self.of(role))._check(steps, f".{role}" if role else "")

    def _check(self, steps: int, role: str) -> None:
        where = f"trainer.schedule{role}"
        for name, good, expected in (
            ("warmup_steps", 0 <= self.warmup_steps <= steps, f"0 to trainer.steps = {steps}"),
            ("decay_fraction", 0 <= self.decay_fraction <= 1, "a number in [0, 1]"),
            ("power", 0 < self.power < math.inf, "a number > 0"),
            (
                "power",
                self.power == 1 or self.kind == "linear",
                f"1 with kind {self.kind!r}: only 'linear' uses it",
            ),
            ("floor", 0 <= self.floor <= 1, "a number in [0, 1]"),
            ("momentum_warmup_steps", self.momentum_warmup_steps >= 0, "steps >= 0"),
            ("momentum_warmup_start", 0 <= self.momentum_warmup_start < 1, "a coefficient in [0, 1)"),
            ("momentum_cooldown_steps", self.momentum_cooldown_steps >= 0, "steps >= 0"),
            ("momentum_cooldown_end", 0 <= self.momentum_cooldown_end < 1, "a coefficient in [0, 1)"),
        ):
            if not good:
                raise ConfigError(f"{where}.{name} is {getattr(self, name)}, expected {expected}")


ROLES = ("hidden", "embed", "head", "value_embed", "scalar")


def lr_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of a learning rate at ``step`` of a run of ``steps``; ``floor`` after its end, unless constant."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    match config.kind:
        case "constant":
            factor = 1.0
        case "cosine":
            done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
            factor = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        case "linear":
            factor = _left(config, step, steps) ** config.power
        case "wsd":
            factor = 1 - math.sqrt(1 - _left(config, step, steps))
    return max(config.floor, factor)


def _left(config: ScheduleConfig, step: int, steps: int) -> float:
    """The remaining part of the decay: 1 until it begins, 0 at the end of the run."""
    if config.decay_fraction == 0:
        return 1.0
    return min(1.0, max(0.0, (steps - step) / (config.decay_fraction * steps)))


def momentum_at(config: ScheduleConfig, step: int, steps: int, beta: float) -> float:
    """The coefficient at ``step`` for a group with ``beta``: linear from the start value, and to the end value."""
    if step < config.momentum_warmup_steps:
        done = step / config.momentum_warmup_steps
        return (1 - done) * config.momentum_warmup_start + done * beta
    left = steps - step
    if left < config.momentum_cooldown_steps:
        share = left / config.momentum_cooldown_steps
        return share * beta + (1 - share) * config.momentum_cooldown_end
    return beta


class Rates:
    """Sets the learning rates and momenta of an optimizer's groups for a step, from their initial ones."""

    def __init__(self, groups: Sequence[dict[str, Any]], config: ScheduleConfig, steps: int):
        self.groups, self.config, self.steps = groups, config, steps
        self.base = [(group["lr"], group["beta"], tuple(group["betas"])) for group in groups]
        self.schedules = [config.of(group["role"]) for group in groups]

    def set(self, step: int) -> float:
        """Sets them; returns the learning-rate factor of the run's schedule."""
        for group, schedule, (lr, beta, betas) in zip(self.groups, self.schedules, self.base, strict=True):
            group["lr"] = lr * lr_factor(schedule, step, self.steps)
            if group["algorithm"] == "adamw":
                group["betas"] = (momentum_at(schedule, step, self.steps, betas[0]), *betas[1:])
            else:
                group["beta"] = momentum_at(schedule, step, self.steps, beta)
        return lr_factor(self.config, step, self.steps)
