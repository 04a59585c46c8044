"""The trainer: configuration, distributed setup, loop, checkpoints, metrics. Its caller provides model and data.

Names are imported on first use: inspecting checkpoints needs only torch and numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polargrad_dist.errors import TrainingError
    from polargrad_dist.trainer.config import TrainerConfig
    from polargrad_dist.trainer.interfaces import Outcome
    from polargrad_dist.trainer.loop import Trainer
    from polargrad_dist.trainer.signals import PREEMPTED
    from polargrad_dist.trainer.sinks import RunInfo, Sink, register_sink
    from polargrad_dist.trainer.world import World, join, seed_everything

__all__ = [
    "PREEMPTED",
    "Outcome",
    "RunInfo",
    "Sink",
    "Trainer",
    "TrainerConfig",
    "TrainingError",
    "World",
    "join",
    "register_sink",
    "seed_everything",
]
_HOMES = {
    "PREEMPTED": "trainer.signals",
    "Outcome": "trainer.interfaces",
    "RunInfo": "trainer.sinks",
    "Sink": "trainer.sinks",
    "Trainer": "trainer.loop",
    "TrainerConfig": "trainer.config",
    "TrainingError": "errors",
    "World": "trainer.world",
    "join": "trainer.world",
    "register_sink": "trainer.sinks",
    "seed_everything": "trainer.world",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"polargrad_dist.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'polargrad_dist.trainer' has no attribute {name!r}")
