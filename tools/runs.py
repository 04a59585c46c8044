"""A finished or running run, opened from its directory: configuration, model with the newest valid weights, data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import open_data
from data.open import Data
from models import LanguageModel, build_model
from polargrad_dist.errors import CheckpointError
from polargrad_dist.optim.routing import clean_name
from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.checkpoint import CheckpointStore
from polargrad_dist.trainer.loop import identity_of
from polargrad_dist.trainer.metrics import quiet
from train import RunConfig, parse_run


@dataclass
class Run:
    """A run directory with what is in it."""

    folder: Path
    config: RunConfig
    data: Data
    model: LanguageModel
    step: int

    def sample(self, prompt: str, tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
        """Text that the model continues the prompt with."""
        tokenizer = self.data.load_tokenizer()
        start = torch.tensor([tokenizer.encode(prompt) or [self.data.end_of_text]])
        generator = torch.Generator().manual_seed(seed)
        self.model.eval()
        out = self.model.generate(start, tokens, temperature=temperature, top_k=50, generator=generator)
        return tokenizer.decode(out[0].tolist())


def load_run(folder: Path | str, *, step: int | None = None) -> Run:
    """Opens a run directory; weights are those of ``step``, or of the newest valid checkpoint.

    Raises ``CheckpointError`` when there is none, ``ConfigError`` when the folder is no run's.
    """
    folder = Path(folder)
    rundir.expect(folder, "config.yaml")
    config, configuration, _ = parse_run(["--config", str(folder / "config.yaml")])
    trainer = config.trainer
    data = open_data(
        config.data,
        sequence_length=trainer.sequence_length,
        global_batch=trainer.global_batch,
        micro_batch=trainer.micro_batch,
        seed=trainer.seed,
        report=quiet,
    )
    model = build_model(config.model, vocab_size=data.vocab_size, end_of_text=data.end_of_text)
    store = CheckpointStore(folder / "checkpoints", identity=identity_of(configuration, data))
    path = folder / "checkpoints" / f"step-{step:08}" if step is not None else store.newest_valid()
    if path is None or not path.exists():
        raise CheckpointError(
            f"{folder} holds no valid checkpoint{'' if step is None else f' of step {step}'}, expected one"
        )
    loaded = store.load(path, weights(model))
    store.close()
    return Run(folder, config, data, model, loaded.step)


def weights(model: torch.nn.Module) -> dict[str, Any]:
    """A model's tensors under their names in a checkpoint."""
    return {f"model/{clean_name(name)}": p.detach() for name, p in model.named_parameters()}
