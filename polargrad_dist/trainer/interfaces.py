"""What the loop asks of the data that it is handed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

UNSET = (("config", None), ("zero_projections", True))  # keys of the model that older checkpoints do not have
Batch = tuple[torch.Tensor, torch.Tensor]


class TrainData(Protocol):
    """Micro-batches of this rank, in an order that is a function of the sample index alone."""

    def batches_from(self, sample: int) -> Iterator[Batch]: ...


class ValidationData(Protocol):
    """A fixed set of tokens, each on one rank; as many batches on every rank. Targets of -100 are padding."""

    bytes_per_token: float | None

    def batches(self) -> Iterator[Batch]: ...


class Data(Protocol):
    """Training data (`TrainData`), validation data (`ValidationData` or None), and what tells them from others."""

    @property
    def train(self) -> Any: ...

    @property
    def validation(self) -> Any: ...

    def fingerprint(self) -> dict[str, Any]: ...


@dataclass
class Progress:
    """What a run has done; saved with every checkpoint. ``sample`` is the index of the next one.

    validation_owed, look_owed: a validation, or questions and samples, were due when the run was asked to leave; the next
    start makes up for it.
    """

    step: int = 0
    sample: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent: list[float] = field(default_factory=list)
    validation_owed: bool = False
    look_owed: bool = False

    @property
    def owing(self) -> bool:
        """Whether anything is left to be measured at this step."""
        return self.validation_owed or self.look_owed


@dataclass
class Outcome:
    """How a run ended: 0 and its last figures, or `PREEMPTED` when it was asked to leave and saved."""

    exit_code: int
    step: int
    validation: dict[str, float]


def identity_of(configuration: dict[str, Any], data: Data) -> dict[str, Any]:
    """What a checkpoint must share with a run to be loaded by it. Other data may be allowed, another tokenizer not."""
    fingerprint = dict(data.fingerprint())
    tokenizer = {"tokenizer": fingerprint.pop("tokenizer", None)}
    # Where the first weights came from makes no other model, nor does a key that is newer than the checkpoint and not set.
    model = {
        k: v for k, v in configuration.get("model", {}).items() if k != "init_from" and (k, v) not in UNSET
    }
    return {"model": model, "tokenizer": tokenizer, "data": fingerprint}
