"""Turns steps into rows of `metrics.jsonl`: means over the steps since the last row, rates and shares of time.

docs/metrics.md describes every field.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from polargrad_dist.optim import PolarGrad
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.phases import Period, memory_gib, peak_flops, shares
from polargrad_dist.trainer.world import World


class Interval:
    """The steps since the last row; ``model`` may have ``flops_per_token(length)``."""

    def __init__(self, config: TrainerConfig, world: World, model: nn.Module, optimizer: PolarGrad):
        self.config, self.world, self.model = config, world, model
        self.optimizer = optimizer
        # The known peaks are bf16's.
        self.peak = peak_flops(world.device) if config.precision != "fp32" else None
        self._parameters = sum(p.numel() for p in model.parameters())
        self._periods: list[Period] = []
        self._losses: list[float] = []
        self._skipped = 0

    def resumed(self, skipped: int) -> None:
        """Records a resume from a checkpoint, before which ``skipped`` steps were skipped."""
        self._skipped = skipped

    def due(self, record: dict[str, Any]) -> bool:
        """Whether a row is due: every ``logging.every`` steps, at the end, and when matrices are diagnosed."""
        step = record["step"]
        return (
            step % self.config.logging.every == 0
            or step == self.config.steps
            or not {"polar", "diagnostics"}.isdisjoint(record)
        )

    def add(self, record: dict[str, Any], period: Period) -> dict[str, Any] | None:
        """Adds a step's figures; returns the row if one is due.

        The row's ``loss`` is the mean over the steps of the interval that were applied, ``loss_last`` that of its last step.
        """
        self._periods.append(period)
        skipped = record.get("skipped", 0)
        if skipped == self._skipped:
            self._losses.append(record["loss"])
        self._skipped = skipped
        return self._row(record) if self.due(record) else None

    def _row(self, record: dict[str, Any]) -> dict[str, Any]:
        seconds, spent = shares(self._periods)
        row = dict(record)
        row["loss_last"] = record["loss"]
        if self._losses:
            row["loss"] = math.fsum(self._losses) / len(self._losses)
        row["lr"] = {group["role"]: group["lr"] for group in self.optimizer.param_groups}
        row["tokens_per_second"] = rate = (
            len(self._periods) * self.config.tokens_per_step / max(seconds, 1e-9)
        )
        if self.peak is not None and hasattr(self.model, "flops_per_token"):
            flops = self.model.flops_per_token(self.config.sequence_length) * rate  # type: ignore[operator]
            row["mfu"] = flops / (self.peak * self.world.size)
        row["memory_gib"] = memory_gib(self.world.device)
        row["share"] = spent
        # Once per start.
        if self._parameters:
            row["parameters"], self._parameters = self._parameters, 0
        self._periods, self._losses = [], []
        return row
