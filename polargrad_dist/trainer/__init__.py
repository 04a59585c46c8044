"""The trainer: configuration, the ranks, the loop, checkpoints, metrics. It is handed its model and its data."""

from polargrad_dist.errors import TrainingError
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.loop import Outcome, Trainer
from polargrad_dist.trainer.signals import PREEMPTED
from polargrad_dist.trainer.world import World, join, seed_everything

__all__ = [
    "PREEMPTED",
    "Outcome",
    "Trainer",
    "TrainerConfig",
    "TrainingError",
    "World",
    "join",
    "seed_everything",
]
