"""Opens a finished or running run from its directory: configuration, model with the newest valid weights, data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from data import open_data
from data.dataset import Data
from data.kept import Kept, kept
from data.tokenizers import Tokenizer
from models import LanguageModel, ModelConfig, build_model
from polargrad_dist.errors import CheckpointError
from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.checkpoint.single import Checkpoint, find_checkpoint
from polargrad_dist.trainer.console import quiet
from polargrad_dist.trainer.initial import fill
from polargrad_dist.trainer.measure import continuation
from train import RunConfig, parse_run


@dataclass
class Run:
    """A checkpoint with its model built, on the CPU."""

    checkpoint: Checkpoint
    model: LanguageModel
    known: Kept

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.checkpoint.run_dir

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @cached_property
    def config(self) -> RunConfig:
        """The run's configuration, from its directory."""
        return parse_run(["--config", str(self.folder / "config.yaml")])[0]

    @cached_property
    def data(self) -> Data:
        """The run's data, prepared if necessary."""
        return data_of(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer. Raises ``DataError`` for a run on shards without one."""
        return self.known.load()

    def prompt(self, text: str) -> torch.Tensor:
        """(1, T) int64: a text's tokens; for an empty text, the token at the start of documents."""
        return torch.tensor([self.tokenizer.encode(text) or [self.known.end_of_text or 0]])

    def sample(self, prompt: str, tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
        """The prompt and its sampled continuation."""
        return self.tokenizer.decode(self.prompt(prompt)[0].tolist()) + "".join(
            self.stream(prompt, tokens, temperature=temperature, top_k=50, seed=seed)
        )

    def stream(
        self,
        prompt: str,
        tokens: int,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """The continuation of a prompt, streamed as it is sampled; whole characters only."""
        before, ids = self.tokenizer.encode(prompt), list[int]()
        shown = ""
        self.model.eval()
        for token in self.model.stream(
            self.prompt(prompt),
            tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            progress=self.checkpoint.progress,
            generator=torch.Generator().manual_seed(seed),
        ):
            ids.append(int(token))
            text = continuation(self.tokenizer, before, ids)
            if text.endswith("\ufffd") and len(ids) < tokens:
                # In the middle of a character
                continue
            yield text[len(shown) :]
            shown = text


def load_run(path: Path | str, *, step: int | None = None) -> Run:
    """Opens a run directory or one of its checkpoints, with the weights of ``step`` or of the newest valid checkpoint.

    Raises ``CheckpointError`` if there is none, ``ConfigError`` if the folder is neither.
    """
    checkpoint = find_checkpoint(path, step)
    known = known_tokens(checkpoint)
    model = build(checkpoint, known)
    fill(model, checkpoint, "the run")
    return Run(checkpoint, model.eval(), known)


def known_tokens(checkpoint: Checkpoint) -> Kept:
    """The run's tokenizer, from its directory.

    Nothing that the run's configuration names is opened, since the directory may be untrusted. Raises ``CheckpointError`` for
    a run of version 0.1, which stored none.
    """
    known = kept(checkpoint.run_dir)
    if known is None:
        raise CheckpointError(
            f"{checkpoint.run_dir} keeps no tokenizer, expected its folder tokenizer/, which runs write since version 0.2: "
            "start the run again with the same command, which adds it"
        )
    return known


def data_of(folder: Path) -> Data:
    """The data of the run in ``folder``, prepared if necessary.

    Raises ``ConfigError`` for a folder that is not a run directory.
    """
    rundir.expect(folder, "config.yaml")
    config = parse_run(["--config", str(folder / "config.yaml")])[0]
    trainer = config.trainer
    return open_data(
        config.data,
        sequence_length=trainer.sequence_length,
        global_batch=trainer.global_batch,
        micro_batch=trainer.micro_batch,
        seed=trainer.seed,
        report=quiet,
    )


def build(checkpoint: Checkpoint, known: Kept, device: str = "cpu") -> LanguageModel:
    """The checkpoint's model with new weights; ``device="meta"`` for names and shapes only."""
    try:
        config = ModelConfig(**checkpoint.manifest.configuration["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder} says nothing of its model that this version understands ({error}): expected a checkpoint "
            "of train.py"
        ) from None
    return build_model(config, vocab_size=known.vocab_size, end_of_text=known.end_of_text, device=device)
