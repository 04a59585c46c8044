"""Pre-trains a language model: `python train.py --config configs/NAME.yaml --optimizer.hidden.lr 0.02 …`.

The same under `torchrun`, `srun`, `accelerate launch` and `deepspeed`. Every key: `python train.py --help`.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data import DataConfig, open_data
from data.checks import check_values
from data.paths import missing_paths
from models import ModelConfig, adopt, build_model
from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.trainer import Outcome, Trainer, TrainerConfig, join, rundir, seed_everything
from polargrad_dist.trainer.checkpoint.single import Checkpoint
from polargrad_dist.trainer.cli import USER_ERROR, DryRun, parse, run
from polargrad_dist.trainer.dry_run import dry_run
from polargrad_dist.trainer.estimate import expected
from polargrad_dist.trainer.initial import checkpoint_of, initialize
from polargrad_dist.trainer.preflight import preflight, same_on_all_ranks
from polargrad_dist.trainer.rates import check_rates

log = logging.getLogger("polargrad_dist.trainer")


@dataclass
class RunConfig:
    """The configuration of a run.

    Args:
        model: the model to train.
        data: the text to train on.
        optimizer: the rule of each role.
        trainer: length, parallelism, evaluation and checkpoints.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def parse_run(args: list[str] | None = None) -> tuple[RunConfig, dict[str, Any], DryRun | None]:
    """Parses the command line into a run's configuration, its JSON-able form, and the dry run or None."""
    given = sys.argv[1:] if args is None else args
    # The environment says it too
    given = [word for word in given if not re.match(r"--local_rank=\d+$", word)]
    given = [re.sub(r"^--profile(?=$|=)", "--trainer.logging.profile", word) for word in given]
    parsed = parse(RunConfig, "Pre-train a language model with polar-gradient optimizers.", given)
    check_rates(parsed[0].optimizer, given)
    return parsed


def report(run_dir: Path) -> Path:
    """Writes the run's report, see `tools.report`."""
    from tools.report import write_report

    return write_report([run_dir], run_dir / "report.html")


WITHOUT_ARGUMENTS = """train.py needs a configuration. Three commands to begin with:

  python train.py --config configs/quickstart.yaml             a small model on a CPU, in minutes
  python train.py --config configs/one-gpu.yaml --dry_run 1    the plan of a run on one GPU; without --dry_run it trains
  python train.py --help                                       every key
"""


def main() -> int:
    if len(sys.argv) == 1:
        print(WITHOUT_ARGUMENTS, end="", file=sys.stderr)
        return USER_ERROR
    config, configuration, show = parse_run()
    if show is not None:
        trainer = config.trainer.for_world(show.ranks)
        adopted, _, build = checked(config, configuration, trainer, show.ranks)
        for key, path in missing_paths(config.data):
            print(f"{key}: {path} does not exist on this machine: a run would be refused here\n")
        if adopted.vocab_size is None and config.data.planned_vocab_size is None:
            print(
                f"model.vocab_size: {build(device='meta').vocab_size:,} assumed, {adopted.architecture}'s own, since the "
                "tokenizer is opened only by a run; set it to the tokenizer's for exact figures\n"
            )
        return dry_run(build, config.optimizer, config.trainer, show.ranks, show.full)
    return pretrain(config, configuration).exit_code


def checked(
    config: RunConfig, configuration: dict[str, Any], trainer: TrainerConfig, world: int
) -> tuple[ModelConfig, Checkpoint | None, Callable[..., Any]]:
    """Checks everything that needs no data; returns the model's configuration, the checkpoint of its initial weights or None,
    and a function that builds the model."""
    origin = checkpoint_of(config.model.init_from)
    kept = Path(trainer.run_dir) / "config.yaml"
    before = rundir.read(kept).get("model") if trainer.resumes and kept.exists() else None
    adopted = adopt(config.model, origin.manifest.configuration["model"] if origin else None, before)
    # The run keeps the model that a hub name stood for at its start
    if adopted != config.model:
        configuration["model"] = asdict(adopted)
    planned = config.data.planned_vocab_size
    build = partial(build_model, adopted, vocab_size=planned)
    check_values(config.data)
    preflight(trainer, config.optimizer, build, configuration, world, planned)
    return adopted, origin, build


def pretrain(config: RunConfig, configuration: dict[str, Any]) -> Outcome:
    """Trains, or resumes, the run that `parse_run` returned, in one of the launcher's processes."""
    world = join(config.trainer.device, config.trainer.strategy.timeout_minutes)
    try:
        same_on_all_ranks(world, configuration)
        trainer = config.trainer.for_world(world.size)
        adopted, origin, build = world.together(lambda: checked(config, configuration, trainer, world.size))
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
        model = build_model(adopted, vocab_size=data.vocab_size, end_of_text=data.end_of_text)
        data.check_vocabulary(model.vocab_size)
        if adopted.init_from is not None and not trainer.resumes:
            initialize(model, adopted.init_from, origin, data, world)
        made = Trainer(trainer, config.optimizer, model, data, world, configuration)
        made.report = report
        made.expect = partial(expected, build, config.optimizer, trainer, world.size, world.device)
        outcome = made.fit()
        if outcome.exit_code == 0 and world.is_main:
            folder = shlex.quote(str(trainer.run_dir))
            log.info("finished; next: python -m tools.report %s (or tools.evaluate, tools.generate)", folder)
        return outcome
    finally:
        world.close()


if __name__ == "__main__":
    run(main)
