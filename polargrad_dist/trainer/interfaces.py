"""The interface of the data that the loop is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

# Keys of the model that older checkpoints do not have
UNSET = (("config", None), ("zero_projections", True))
Batch = tuple[torch.Tensor, torch.Tensor]


class TrainData(Protocol):
    """Micro-batches of this rank, in an order that depends on the sample index alone."""

    def batches_from(self, sample: int) -> Iterator[Batch]: ...


class ValidationData(Protocol):
    """A fixed set of tokens, each on one rank; every rank has the same number of batches. Targets of -100 are padding."""

    bytes_per_token: float | None

    def batches(self) -> Iterator[Batch]: ...


class Data(Protocol):
    """Training data (`TrainData`), validation data (`ValidationData` or None), and their fingerprint."""

    @property
    def train(self) -> Any: ...

    @property
    def validation(self) -> Any: ...

    def fingerprint(self) -> dict[str, Any]: ...


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint. ``sample`` is the index of the next sample.

    validation_owed, look_owed: a validation, or questions and samples, were due when the run was asked to leave; the next
    start does them first.
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
        """Whether a measurement of this step is still to be done."""
        return self.validation_owed or self.look_owed


@dataclass
class Outcome:
    """How a run ended: 0, `PREEMPTED` when it was asked to leave and saved, or 1 if its last weights could not be saved."""

    exit_code: int
    step: int
    validation: dict[str, float]


def identity_of(configuration: dict[str, Any], data: Data) -> dict[str, Any]:
    """What a checkpoint and the run that loads it must share. Other data can be allowed, another tokenizer cannot."""
    fingerprint = dict(data.fingerprint())
    tokenizer = {"tokenizer": fingerprint.pop("tokenizer", None)}
    # The origin of the first weights does not change the model; neither does an unset key that the checkpoint is too old for.
    model = {
        k: v for k, v in configuration.get("model", {}).items() if k != "init_from" and (k, v) not in UNSET
    }
    return {"model": model, "tokenizer": tokenizer, "data": fingerprint}
