"""Pre-trains a language model: `python train.py --config configs/NAME.yaml --optimizer.hidden.lr 0.02 …`.

The same under `torchrun`, `srun` and `accelerate launch`. Every key: `python train.py --help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data import DataConfig, open_data
from models import ModelConfig, build_model
from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.trainer import Outcome, Trainer, TrainerConfig, join, seed_everything
from polargrad_dist.trainer.cli import parse, run
from polargrad_dist.trainer.dry_run import dry_run


@dataclass
class RunConfig:
    """A whole run.

    Args:
        model: what is trained.
        data: on which text.
        optimizer: by which rule, role by role.
        trainer: for how long, on which ranks, and what is kept.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def parse_run(args: list[str] | None = None) -> tuple[RunConfig, dict[str, Any], int | None]:
    """The run that a command line describes, its JSON-able form, and the ranks of a dry run or None."""
    return parse(RunConfig, "Pre-train a language model with polar-gradient optimizers.", args)


def main() -> int:
    config, configuration, ranks = parse_run()
    if ranks is not None:
        build = partial(build_model, config.model, vocab_size=config.data.planned_vocab_size)
        return dry_run(build, config.optimizer, config.trainer, ranks)
    return pretrain(config, configuration).exit_code


def pretrain(config: RunConfig, configuration: dict[str, Any]) -> Outcome:
    """Runs, or resumes, what `parse_run` returned, as one of the processes that the launcher started."""
    world = join(config.trainer.device, config.trainer.strategy.timeout_minutes)
    try:
        trainer = config.trainer.for_world(world.size)
        trainer.check(world.size)
        config.optimizer.check()
        data = open_data(
            config.data,
            sequence_length=trainer.sequence_length,
            global_batch=trainer.global_batch,
            micro_batch=trainer.micro_batch,
            rank=world.rank,
            world=world.size,
            seed=trainer.seed,
            all_gather=world.gather,
            meanwhile=world.meanwhile,
        )
        seed_everything(trainer.seed)
        model = build_model(config.model, vocab_size=data.vocab_size, end_of_text=data.end_of_text)
        data.check_vocabulary(model.vocab_size)
        return Trainer(trainer, config.optimizer, model, data, world, configuration).fit()
    finally:
        world.close()


if __name__ == "__main__":
    run(main)
