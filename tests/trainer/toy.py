"""A small model and a small data set for the trainer's tests, which need neither `models` nor `data`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polargrad_dist.optim import OptimizerConfig, adamw_rule, muon_rule, polarsgdm_rule
from polargrad_dist.trainer import Trainer, TrainerConfig, World, seed_everything
from polargrad_dist.trainer.checkpoint import CheckpointConfig
from polargrad_dist.trainer.config import EvaluationConfig, LoggingConfig, StrategyConfig

VOCABULARY, LENGTH = 48, 16


class ToyModel(nn.Module):
    """Embedding, two blocks with dropout, head."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 16)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, tokens, targets, *, progress: float = 0.0):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(
            self.head(x).flatten(0, 1).float(), targets.flatten(), ignore_index=-100
        )


class ToyLoader:
    """Sample i is a sequence drawn from a generator seeded with i; this rank's share in micro-batches."""

    def __init__(self, config: TrainerConfig, world: World, poison: frozenset[int] = frozenset()):
        self.config, self.world, self.poison = config, world, poison
        self.seen: list[int] = []

    def batches_from(self, sample: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        share = self.config.global_batch // self.world.size
        while True:
            first = sample + self.world.rank * share
            for start in range(first, first + share, self.config.micro_batch):
                indices = range(start, start + self.config.micro_batch)
                self.seen += indices
                yield batch(indices, self.poison)
            sample += self.config.global_batch


def batch(indices, poison=frozenset()) -> tuple[torch.Tensor, torch.Tensor]:
    rows = []
    for i in indices:
        generator = torch.Generator().manual_seed(i)
        start, stride = torch.randint(0, VOCABULARY, (2,), generator=generator).tolist()
        rows.append((start + (1 + stride % 3) * torch.arange(LENGTH + 1)) % VOCABULARY)
    tokens = torch.stack(rows)
    targets = tokens[:, 1:].clone()
    if poison & set(indices):
        # The mean over no targets is NaN
        targets[:] = -100
    return tokens[:, :-1], targets


class ToyValidation:
    bytes_per_token = 2.0

    def __init__(self, world: World):
        self.world = world

    def batches(self):
        tokens, targets = batch(range(10_000 + self.world.rank, 10_012, self.world.size))
        pad = -len(tokens) % (-(-12 // self.world.size))
        yield tokens, targets
        del pad


class ToyData:
    def __init__(self, config: TrainerConfig, world: World, poison: frozenset[int] = frozenset()):
        self.train, self.validation = ToyLoader(config, world, poison), ToyValidation(world)

    def fingerprint(self) -> dict[str, Any]:
        return {"tokenizer": "toy", "length": LENGTH}


def rules() -> OptimizerConfig:
    return OptimizerConfig(
        hidden=muon_rule(0.02, oracle="svd"), embed=polarsgdm_rule(0.02), scalar=adamw_rule(0.01)
    )


def settings(folder: Path | str, **changes: Any) -> TrainerConfig:
    base = TrainerConfig(
        run_dir=str(folder),
        steps=12,
        global_batch=12,
        micro_batch=3,
        sequence_length=LENGTH,
        logging=LoggingConfig(every=1, stats_every=4, progress="off"),
        checkpoint=CheckpointConfig(every=4),
        evaluation=EvaluationConfig(every=0),
        strategy=StrategyConfig(),
        device="cpu",
    )
    return replace(base, **changes)


def trainer(
    config: TrainerConfig,
    world: World | None = None,
    *,
    dropout: float = 0.0,
    poison=frozenset(),
    optimizer=None,
    model=None,
):
    """A trainer of the toy; ``configuration`` is what its run directory keeps."""
    from dataclasses import asdict

    world = world or World()
    seed_everything(config.seed)
    configuration = {"trainer": asdict(config), "dropout": dropout}
    data = ToyData(config, world, frozenset(poison))
    return Trainer(config, optimizer or rules(), model or ToyModel(dropout), data, world, configuration)


def interrupt(run: Trainer, step: int) -> None:
    """Trains until a ``KeyboardInterrupt`` in place of the given step of this start, counted from 1."""
    take, taken = run._step, []

    def interrupted(*args: Any) -> None:
        taken.append(1)
        if len(taken) == step:
            raise KeyboardInterrupt
        take(*args)

    run._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.fit()
