"""A small run of the real trainer that can be killed, asked to leave and started again at any world size.

`python -m tests.chaos.program RUN_DIR [--steps N] …`, alone or under torchrun. Dropout, accumulation and prefetching are on;
every sample that reaches the model is noted in RUN_DIR/samples-RANK.txt, with its step.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from polargrad_dist.optim import OptimizerConfig, muon_rule
from polargrad_dist.trainer import watch
from polargrad_dist.trainer.checkpoint import CheckpointConfig
from polargrad_dist.trainer.cli import run as run_and_exit
from polargrad_dist.trainer.config import EvaluationConfig, LoggingConfig, StrategyConfig, TrainerConfig
from polargrad_dist.trainer.loop import Trainer
from polargrad_dist.trainer.world import World, join

VOCABULARY, LENGTH, GLOBAL_BATCH = 40, 12, 12


@dataclass
class Options:
    """kill_at, leave_at: SIGKILL or SIGTERM to rank 0 itself when its data for this step (from 0) is asked for.

    pause: seconds that every step takes at least. fat: extra parameters in MiB, so that a save takes a while.
    limit: trainer.strategy.timeout_minutes. prepare: seconds that rank 0 prepares data for, while the others wait and say so
    after ``say_every`` seconds. slow_disk: seconds that a flush to the disk takes.
    validation: steps between validations of 40 batches, each of which takes ``pause``; 0: none.
    """

    run_dir: str
    steps: int = 60
    strategy: str = "ddp"
    every: int = 20
    asynchronous: bool = False
    dropout: float = 0.1
    kill_at: int = -1
    leave_at: int = -1
    pause: float = 0.0
    fat: int = 0
    limit: float = 0.5
    prepare: float = 0.0
    say_every: float = 60.0
    validation: int = 0
    slow_disk: float = 0.0


class Block(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(self.up(self.norm(x)).relu()))


class Language(nn.Module):
    """Predicts each token from the one before it: enough for a loss that falls."""

    def __init__(self, dropout: float, fat: int, width: int = 14):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY + fat * 2**20 // 4 // width, width)
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(2)])
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens, targets=None, *, progress: float = 0.0):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x).float()
        return (
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            if targets is not None
            else logits
        )


def sample(index: int) -> torch.Tensor:
    """(LENGTH + 1,) int64: a walk over the vocabulary with steps of 1 to 3, a function of the index alone."""
    generator = torch.Generator().manual_seed(index)
    steps = torch.randint(1, 4, (LENGTH + 1,), generator=generator)
    return (torch.randint(VOCABULARY, (1,), generator=generator) + steps.cumsum(0)) % VOCABULARY


class Samples:
    """Micro-batches of one sample of this rank, made two steps ahead by a thread."""

    bytes_per_token = None

    def __init__(self, options: Options, world: World):
        self.options, self.world = options, world
        self.train = self
        self.validation = self if options.validation else None

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The validation's: 40 of one sample, of which no training step sees any."""
        for number in range(40):
            time.sleep(self.options.pause)
            tokens = sample(-1 - number * self.world.size - self.world.rank)
            yield tokens[None, :-1], tokens[None, 1:]

    def fingerprint(self) -> dict:
        return {"tokenizer": "none", "samples": "walks"}

    def batches_from(self, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        mine = GLOBAL_BATCH // self.world.size
        ready: queue.Queue = queue.Queue(2 * mine)

        def make() -> None:
            step = first // GLOBAL_BATCH
            while True:
                for k in range(mine):
                    index = step * GLOBAL_BATCH + self.world.rank * mine + k
                    tokens = sample(index)
                    ready.put((step, index, tokens[None, :-1], tokens[None, 1:]))
                step += 1

        threading.Thread(target=make, daemon=True).start()
        with open(Path(self.options.run_dir) / f"samples-{self.world.rank}.txt", "a", buffering=1) as seen:
            while True:
                step, index, tokens, targets = ready.get()
                if index % mine == 0:
                    self._at(step)
                seen.write(f"{step} {index}\n")
                yield tokens, targets

    def _at(self, step: int) -> None:
        time.sleep(self.options.pause)
        if self.world.rank == 0 and step == self.options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.world.rank == 0 and step == self.options.leave_at:
            os.kill(os.getpid(), signal.SIGTERM)


def run(options: Options, world: World) -> int:
    """Trains as far as it gets; the exit code."""
    torch.set_num_threads(1)
    config = TrainerConfig(
        run_dir=options.run_dir,
        steps=options.steps,
        global_batch=GLOBAL_BATCH,
        micro_batch=1,
        sequence_length=LENGTH,
        device="cpu",
        strategy=StrategyConfig(
            options.strategy, 2 if options.strategy == "hsdp" else 1, timeout_minutes=options.limit
        ),
        evaluation=EvaluationConfig(every=options.validation, at_end=bool(options.validation)),
        logging=LoggingConfig(every=1, stats_every=0, progress="off"),
        checkpoint=CheckpointConfig(every=options.every, asynchronous=options.asynchronous, keep_best=False),
    )
    model = Language(options.dropout, options.fat)
    configuration = {"trainer": asdict(config), "model": {"dropout": options.dropout}}
    # In bf16 the oracle would turn a rounding difference between world sizes into one of 1e-4 in the loss.
    optimizer = OptimizerConfig(hidden=muon_rule(oracle_dtype="float32"))
    trainer = Trainer(config, optimizer, model, Samples(options, world), world, configuration)
    return trainer.fit().exit_code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    for name, default in vars(Options("")).items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true")
        elif name != "run_dir":
            parser.add_argument(f"--{name}", type=type(default), default=default)
    options = Options(**vars(parser.parse_args()))
    watch.SAY_EVERY = options.say_every
    flush = os.fsync
    os.fsync = lambda file: (time.sleep(options.slow_disk), flush(file))[1]
    world = join("cpu", timeout_minutes=options.limit)
    try:
        if options.prepare:
            print("preparing", flush=True)
            world.meanwhile("prepare the data", lambda: time.sleep(options.prepare))
        return run(options, world)
    finally:
        world.close()


if __name__ == "__main__":
    run_and_exit(main)
