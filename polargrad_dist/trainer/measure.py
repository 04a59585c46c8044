"""What a run measures beside its losses: named validation sets, multiple choice, and samples of its text.

Every rank takes part in every forward pass, so that sharded models gather their weights; nothing here moves a weight or a
random generator of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.choices import Question, read_questions, score
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.strategies import Placed
from polargrad_dist.trainer.world import World


class Evaluator:
    """Measures the model as it is. All ranks call every method together."""

    def __init__(self, config: TrainerConfig, placed: Placed, bare: nn.Module, data: Any, world: World):
        """bare: the model without DDP's wrapper. Raises ``ConfigError`` or ``DataError`` for what cannot be measured."""
        self.config, self.placed, self.bare, self.data, self.world = config, placed, bare, data, world
        self.tokenizer: Any = None
        self.questions: list[Question] = []
        evaluation, samples = config.evaluation, config.samples
        if evaluation.hellaswag is None and not samples.every:
            return
        if not hasattr(data, "load_tokenizer"):
            raise ConfigError(
                "trainer.samples and trainer.evaluation.hellaswag need data with load_tokenizer(), and these have none: "
                "leave them out"
            )
        self.tokenizer = data.load_tokenizer()
        if samples.every and not hasattr(bare, "stream"):
            raise ConfigError(
                f"trainer.samples.every is {samples.every}, but the model has no stream(): set it to 0"
            )
        if evaluation.hellaswag is not None:
            self.questions = read_questions(evaluation.hellaswag, evaluation.hellaswag_items)

    def look(self, step: int, last: bool) -> dict[str, Any]:
        """What is due after ``step``: ``hellaswag`` and ``samples``; empty where nothing is."""
        done = step / self.config.steps
        found: dict[str, Any] = {}
        every = self.config.evaluation.hellaswag_every
        if self.questions and ((every and step % every == 0) or last):
            found["hellaswag"] = self.choose(done)
        every = self.config.samples.every
        if every and (step % every == 0 or last):
            found["samples"] = self.sample(done)
        return found

    def named(self, step: int) -> dict[str, Any]:
        """``validation``: of each named validation set the ``loss`` in nats per token and, where its text is known, the
        ``bits_per_byte``. Empty where there are none."""
        found: dict[str, Any] = {}
        for name, tokens in getattr(self.data, "validations", {}).items():
            loss, bits = self._mean_loss(tokens, step / self.config.steps)
            found[name] = {"loss": loss} | ({} if bits is None else {"bits_per_byte": bits})
        return {"validation": found} if found else {}

    @torch.no_grad()
    def _mean_loss(self, validation: Any, done: float) -> tuple[float, float | None]:
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        model = self.placed.model
        model.eval()
        for tokens, targets in validation.batches():
            count = int((targets != -100).sum())
            tokens, targets = tokens.to(self.world.device), targets.to(self.world.device)
            with self.placed.autocast():
                loss = model(tokens, targets, progress=done)
            if count:
                total += torch.stack(
                    [loss.double() * count, torch.full_like(loss, count, dtype=torch.float64)]
                )
        model.train()
        summed, count = self.world.sum(total).tolist()
        bits = validation.bytes_per_token and summed / count / math.log(2) / validation.bytes_per_token
        return summed / count, bits or None

    @torch.no_grad()
    def choose(self, done: float) -> dict[str, float]:
        """Shares of questions answered right: ``acc`` by likelihood, ``acc_norm`` by likelihood per character.

        One question a forward pass, dealt over the ranks, so that the result is the same at every world size.
        """
        right = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        limit = getattr(self.bare, "max_sequence_length", None)
        with self._measuring():
            for start in range(0, len(self.questions), self.world.size):
                mine = min(start + self.world.rank, len(self.questions) - 1)
                plain, normed = score(
                    lambda tokens: self.bare(tokens.to(self.world.device), progress=done),
                    self.questions[mine],
                    self.tokenizer,
                    limit,
                )
                if start + self.world.rank < len(self.questions):
                    right += torch.tensor([plain, normed], dtype=torch.float64, device=self.world.device)
        plain, normed = (self.world.sum(right) / len(self.questions)).tolist()
        return {"acc": plain, "acc_norm": normed, "questions": len(self.questions)}

    def sample(self, done: float) -> list[dict[str, str]]:
        """The configured prompts with their continuations; the same text on every rank."""
        options, found = self.config.samples, []
        with self._measuring():
            for prompt in options.prompts:
                generator = torch.Generator().manual_seed(options.seed)
                start = self.tokenizer.encode(prompt) or [self.data.end_of_text or 0]
                stream = self.bare.stream(  # type: ignore[operator]
                    torch.tensor([start], device=self.world.device),
                    options.tokens,
                    temperature=options.temperature,
                    top_k=options.top_k,
                    top_p=options.top_p,
                    progress=done,
                    generator=generator,
                )
                found.append(
                    {"prompt": prompt, "text": self.tokenizer.decode([int(token) for token in stream])}
                )
        return found

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Evaluation mode, in the run's precision, without compiling for shapes that training does not have."""
        self.bare.eval()
        try:
            with self.placed.autocast(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.bare.train()
