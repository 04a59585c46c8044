"""What the loop asks of the data that it is handed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

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
