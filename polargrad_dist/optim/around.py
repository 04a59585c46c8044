"""Wrappers around a whole optimizer of any kind: EMA-Nesterov's look-ahead, and an average of the last weights.

Both keep one fp32 tensor per parameter, placed like the parameter, and know nothing of rules, ranks or gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from polargrad_dist.distributed.teams import local
from polargrad_dist.errors import ConfigError


@dataclass
class LookaheadConfig:
    """EMA-Nesterov around the whole optimizer.

    Args:
        beta: how far to look ahead along the average of past moves, times the learning rate's factor; 0 disables it.
        decay: decay of that average per step.
        start: first step that looks ahead; the average is kept from the first step of the run.
        end: first step that no longer looks ahead; null for no end.
    """

    beta: float = 0.0
    decay: float = 0.99
    start: int = 0
    end: int | None = None


@dataclass
class AverageConfig:
    """An average of the last weights, used instead of the weights for validation, samples and export.

    Args:
        start: step after which the average begins, with the weights of that step; null for no average.
        horizon: number of steps it averages over: its decay is 1 - 1/horizon.
        weight: share of the average in the weights that are used; the last weights make up the rest.
    """

    start: int | None = None
    horizon: float = 150.0
    weight: float = 1.0


def check_around(lookahead: LookaheadConfig, average: AverageConfig, steps: int) -> None:
    """Raises ``ConfigError`` for a value that is invalid in a run of ``steps``."""
    first = lookahead.start if lookahead.beta else 0
    for name, value, good, expected in (
        ("lookahead.beta", lookahead.beta, 0 <= lookahead.beta < 100, "a number in [0, 100)"),
        ("lookahead.decay", lookahead.decay, 0 <= lookahead.decay < 1, "a number in [0, 1)"),
        ("lookahead.start", lookahead.start, lookahead.start >= 0, "a step >= 0"),
        ("lookahead.start", lookahead.start, first < steps, f"a step before the last, trainer.steps = {steps}"),
        ("lookahead.end", lookahead.end, lookahead.end is None or lookahead.end > lookahead.start,
         "null, or a step after start"),
        ("average.start", average.start, average.start is None or average.start >= 0, "null, or a step >= 0"),
        ("average.start", average.start, (average.start or 0) < steps,
         f"null, or a step before the last, trainer.steps = {steps}"),
        ("average.horizon", average.horizon, 1 <= average.horizon < 1e9, "steps >= 1"),
        ("average.weight", average.weight, 0 < average.weight <= 1, "a share in (0, 1]"),
    ):  # fmt: skip
        if not good:
            raise ConfigError(f"trainer.{name} is {value}, expected {expected}")


class EmaNesterov:
    """y = x + beta d before the gradient, the optimizer's step from y to x', then d = decay d + (1 - decay)(x' - x).

    Source: "EMA-Nesterov" (arXiv 2605.25395). modded-nanoGPT's optimization track: Muon at lr 0.035 and weight decay 0.025
    needs 3,125 steps to 3.28 instead of 3,325 (3.2786, n = 20) with beta 0.6, decay 0.99, from step 500 to 2,400.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: LookaheadConfig):
        self.config, self.parameters = config, dict(parameters)
        self.moves = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def look_ahead(self, step: int, factor: float) -> None:
        """Moves the weights to y. ``step`` counts from 0; ``factor`` is the learning rate over its maximum."""
        self._before = {name: local(p).detach().clone() for name, p in self.parameters.items()}
        end = self.config.end
        if self.config.start <= step and (end is None or step < end):
            for name, p in self.parameters.items():
                here = local(p).detach()
                here.copy_(here + self.config.beta * factor * local(self.moves[name]))

    @torch.no_grad()
    def stepped(self) -> None:
        """Adds the whole move to the average, after the optimizer's step."""
        for name, p in self.parameters.items():
            move = local(p).detach().float() - self._before[name].float()
            local(self.moves[name]).lerp_(move, 1 - self.config.decay)
        self._before = {}

    @torch.no_grad()
    def undo(self) -> None:
        """Moves the weights back to x, for a skipped step."""
        for name, p in self.parameters.items():
            local(p).detach().copy_(self._before[name])
        self._before = {}


class Average:
    """a = (1 - 1/horizon) a + x/horizon from the step ``start`` on; the result is (1 - weight) x + weight a.

    modded-nanoGPT's optimization track: 0.6 of an average over 150 steps, from step 2,400 on, 2,720 steps to 3.28 instead of
    2,750 (3.2786, n = 10).
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: AverageConfig):
        self.config, self.parameters = config, dict(parameters)
        self.mean = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}

    def active(self, step: int) -> bool:
        """Whether there is an average after ``step`` steps."""
        return self.config.start is not None and step >= max(1, self.config.start)

    @torch.no_grad()
    def stepped(self, step: int) -> None:
        """Adds the weights after ``step`` steps to the average."""
        if not self.active(step):
            return
        share = 1.0 if step == max(1, self.config.start or 0) else 1 / self.config.horizon
        for name, p in self.parameters.items():
            local(self.mean[name]).lerp_(local(p).detach().float(), share)

    @contextmanager
    def used(self, step: int, moved: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Puts the averaged weights into the parameters inside the context; calls ``moved`` after each change."""
        if not self.active(step):
            yield
            return
        with torch.no_grad():
            kept = {name: local(p).detach().clone() for name, p in self.parameters.items()}
            for name, p in self.parameters.items():
                local(p).detach().copy_(
                    torch.lerp(kept[name].float(), local(self.mean[name]), self.config.weight)
                )
        moved()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    local(p).detach().copy_(kept[name])
            moved()
