"""Learning-rate and momentum schedules as pure functions of the step: no state, so a resume cannot get them wrong.

Each function gives a factor in [0, 1] that multiplies a group's initial learning rate. Step ``t`` of ``T`` counts from 0, so
the first update uses ``factor(0)`` and the last ``factor(T - 1)``.
Sources: linear decay over the last fraction, and the momentum warm-up, as in modded-nanoGPT; WSD from Hu et al. 2024
(MiniCPM) with the 1 − √x cool-down of Hägele et al. 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from polargrad_dist.errors import ConfigError


def warm_up(step: int, steps: int) -> float:
    """Linear from 1/steps at step 0 to 1 at step ``steps - 1``, then 1: the first update is never wasted on a zero rate."""
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


def cosine(step: int, total: int, *, warmup: int = 0, final: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from 1 at the end of the warm-up to ``final`` at step ``total``."""
    if step < warmup:
        return warm_up(step, warmup)
    x = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * x))


def linear_decay(step: int, total: int, *, fraction: float, warmup: int = 0, final: float = 0.0) -> float:
    """Constant, then a straight line to ``final`` at step ``total`` over the last ``fraction`` of the run."""
    x = cooldown_progress(step, total, fraction)
    return warm_up(step, warmup) * (1.0 - (1.0 - final) * x)


def wsd(step: int, total: int, *, fraction: float, warmup: int = 0, final: float = 0.0) -> float:
    """Warm-up, stable, decay: constant, then 1 − √x to ``final`` over the last ``fraction`` of the run."""
    x = cooldown_progress(step, total, fraction)
    return warm_up(step, warmup) * (1.0 - (1.0 - final) * math.sqrt(x))


def cooldown_progress(step: int, total: int, fraction: float) -> float:
    """How far step ``step`` lies in the last ``fraction`` of the run: 0 before it, 1 at step ``total`` and after."""
    length = fraction * total
    return 0.0 if length <= 0 else min(1.0, max(0.0, (step - (total - length)) / length))


@dataclass(frozen=True)
class Schedule:
    """How the learning rate (all roles alike) and the momentum of the hidden matrices move over the run.

    Args:
        shape: "constant"; "cosine" (warm-up, then a cosine to `final`); "linear" (constant, then linear to `final` over
            the last `decay_fraction` of the steps); "wsd" (the same with 1 − √x).
        warmup: Steps of linear learning-rate warm-up, for every shape.
        decay_fraction: Share of the run, in (0, 1], in which "linear" and "wsd" decay.
        final: Learning rate at the very end, as a share of the initial one, in [0, 1].
        momentum_warmup: Steps in which the β of polar rules of role `hidden` goes linearly from `momentum_start` to its own
            value; 0 turns the warm-up off.
        momentum_start: β at step 0 of the momentum warm-up, in [0, 1).
    """

    shape: Literal["constant", "cosine", "linear", "wsd"] = "linear"
    warmup: int = 0
    decay_fraction: float = 0.4
    final: float = 0.0
    momentum_warmup: int = 0
    momentum_start: float = 0.85

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.momentum_warmup < 0:
            raise ConfigError(
                f"schedule.warmup = {self.warmup} and schedule.momentum_warmup = {self.momentum_warmup} count steps; neither "
                "may be negative."
            )
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError(f"schedule.decay_fraction = {self.decay_fraction} is not in (0, 1]; 0.4 decays over the last 40 %.")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.final = {self.final} is not in [0, 1]; it is a share of the initial learning rate.")
        if not 0 <= self.momentum_start < 1:
            raise ConfigError(f"schedule.momentum_start = {self.momentum_start} is not in [0, 1).")

    def factor(self, step: int, total: int) -> float:
        """The learning-rate factor of update ``step`` (0-based) in a run of ``total`` steps."""
        if self.shape == "constant":
            return warm_up(step, self.warmup)
        if self.shape == "cosine":
            return cosine(step, total, warmup=self.warmup, final=self.final)
        decay = linear_decay if self.shape == "linear" else wsd
        return decay(step, total, fraction=self.decay_fraction, warmup=self.warmup, final=self.final)

    def momentum(self, step: int, beta: float) -> float:
        """β at update ``step`` for a rule whose own value is ``beta``."""
        if self.momentum_warmup == 0:
            return beta
        x = min(1.0, step / self.momentum_warmup)
        return self.momentum_start + (beta - self.momentum_start) * x
