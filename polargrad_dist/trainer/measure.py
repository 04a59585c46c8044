"""Evaluations besides the validation loss: named validation sets, multiple choice, and text samples.

Every rank takes part in every forward pass, so that sharded models can gather their weights; nothing here changes weights or
the run's random generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.choices import Question, read_questions, score
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.evaluation import BATCHES_BETWEEN_QUESTIONS, evaluate
from polargrad_dist.trainer.strategies import Placed
from polargrad_dist.trainer.world import World

Asked = Callable[[], bool]


def never() -> bool:
    """False: this rank was not asked to leave."""
    return False


def continuation(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` behind the text of ``before``: decoders such as Llama 2's take the space off a first word."""
    whole, start = tokenizer.decode([*before, *ids]), tokenizer.decode(before) if before else ""
    # The bytes of an incomplete character can change what precedes them
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(ids)


class Evaluator:
    """Evaluates the model during training. All ranks call every method together."""

    def __init__(self, config: TrainerConfig, placed: Placed, bare: nn.Module, data: Any, world: World):
        """bare: the model without DDP's wrapper. Raises ``ConfigError`` or ``DataError`` for what cannot be evaluated."""
        self.config, self.placed, self.bare, self.data, self.world = config, placed, bare, data, world
        self.tokenizer: Any = None
        self.questions: list[Question] = []
        evaluation, samples = config.evaluation, config.samples
        if evaluation.hellaswag is None and not samples.every:
            return
        if not hasattr(data, "load_tokenizer"):
            raise ConfigError(
                "trainer.samples or trainer.evaluation.hellaswag is set, but the data have no load_tokenizer(): leave "
                "them out"
            )
        self.tokenizer = data.load_tokenizer()
        if samples.every and not hasattr(bare, "stream"):
            raise ConfigError(
                f"trainer.samples.every is {samples.every}, but the model has no stream(): set it to 0"
            )
        if evaluation.hellaswag is not None:
            self.questions = read_questions(evaluation.hellaswag, evaluation.hellaswag_items)

    def due(self, step: int) -> bool:
        """Whether questions or samples are due after ``step``."""
        return self._questions_due(step) or self._samples_due(step)

    def _questions_due(self, step: int) -> bool:
        every = self.config.evaluation.hellaswag_every
        return bool(self.questions) and (bool(every and step % every == 0) or step == self.config.steps)

    def _samples_due(self, step: int) -> bool:
        every = self.config.samples.every
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def look(self, step: int, asked: Asked = never) -> dict[str, Any] | None:
        """The ``hellaswag`` and ``samples`` that are due after ``step``; empty if nothing is, None if a rank was ``asked`` to
        leave meanwhile."""
        done = step / self.config.steps
        found: dict[str, Any] = {}
        if self._questions_due(step):
            found["hellaswag"] = self.choose(done, asked)
        if self._samples_due(step) and None not in found.values():
            found["samples"] = self.sample(done, asked)
        return None if None in found.values() else found

    def named(self, step: int, asked: Asked = never) -> dict[str, Any] | None:
        """``validation``: for each named validation set the ``loss`` in nats per token and, where its text is known, the
        ``bits_per_byte``. Empty if there are none, None if a rank was ``asked`` to leave meanwhile."""
        found: dict[str, Any] = {}
        for name, tokens in getattr(self.data, "validations", {}).items():
            figures = evaluate(self.placed, tokens, self.world, step / self.config.steps, asked)
            if figures is None:
                return None
            figures["loss"] = figures.pop("validation_loss")
            found[name] = figures
        return {"validation": found} if found else {}

    @torch.no_grad()
    def choose(self, done: float, asked: Asked = never) -> dict[str, float] | None:
        """Fraction of correct answers: ``acc`` by likelihood, ``acc_norm`` by likelihood per character; None if a rank was
        ``asked`` to leave meanwhile.

        Questions are distributed over the ranks, one per forward pass, so that the result is the same at every world size.
        """
        right = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        limit = getattr(self.bare, "max_sequence_length", None)
        with self._measuring():
            for number, start in enumerate(range(0, len(self.questions), self.world.size)):
                self.world.at("multiple choice")
                if number % BATCHES_BETWEEN_QUESTIONS == 0 and self.world.any(asked()):
                    return None
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

    def sample(self, done: float, asked: Asked = never) -> list[dict[str, str]] | None:
        """The configured prompts with their continuations, the same text on every rank; None if a rank was ``asked`` to leave
        meanwhile."""
        options, found = self.config.samples, []
        with self._measuring():
            for prompt in options.prompts:
                self.world.at("samples")
                if self.world.any(asked()):
                    return None
                generator = torch.Generator().manual_seed(options.seed)
                known = self.tokenizer.encode(prompt)
                start = known or [self.data.end_of_text or 0]
                stream = self.bare.stream(  # type: ignore[operator]
                    torch.tensor([start], device=self.world.device),
                    options.tokens,
                    temperature=options.temperature,
                    top_k=options.top_k,
                    top_p=options.top_p,
                    progress=done,
                    generator=generator,
                )
                text = continuation(self.tokenizer, known, [int(token) for token in stream])
                found.append({"prompt": prompt, "text": text})
        return found

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Evaluation mode, in the run's precision, without compilation for shapes that training does not have."""
        self.bare.eval()
        try:
            with self.placed.autocast(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.bare.train()
            self.placed.rest()
