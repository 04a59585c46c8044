"""Data sets on the Hugging Face hub, or in a local folder of that form, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data.config import HubConfig
from data.sources import Piece, _field, document_piece
from polargrad_dist.errors import DataError


class HubSource:
    """The rows of one split, streamed over the network while they are tokenized, or downloaded first."""

    size: int | None = None

    def __init__(self, hub: HubConfig, field: str, validation_fraction: float) -> None:
        self._hub, self._text_field, self._fraction = hub, field, validation_fraction

    def identity(self) -> dict[str, Any]:
        hub = self._hub
        return {
            "source": "hub",
            "name": hub.name,
            "subset": hub.subset,
            "split": hub.split,
            "revision": hub.revision,
            "text_field": self._text_field,
            "validation_fraction": self._fraction,
        }

    def describe(self) -> str:
        return (
            f"{self._hub.name} ({self._hub.subset or 'default'}, {self._hub.split}) from the Hugging Face hub"
        )

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        rows = self._open()
        rows = rows.skip(start) if start else rows
        number = start
        try:
            for number, row in enumerate(rows, start):
                where = f"{self._hub.name}, row {number}"
                yield document_piece(_field(row, self._text_field, where), self._fraction, where)
        except (OSError, ConnectionError) as error:
            raise DataError(
                f"{self._hub.name} could not be read on from row {number} ({type(error).__name__}: {error}); what is "
                "finished is kept: run the same command again to continue."
            ) from error

    def _open(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DataError(
                "data.source is hub, which needs datasets: pip install 'polargrad-dist[train]'."
            ) from error
        hub = self._hub
        try:
            return load_dataset(
                hub.name, hub.subset, split=hub.split, revision=hub.revision, streaming=hub.streaming
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"the data set {hub.name} cannot be had from the Hugging Face hub ({type(error).__name__}: {reason[:160]}); "
                "without a network set data.source to files with data.paths of local text, JSON lines or parquet, or to "
                "shards with ready-made .bin files."
            ) from error
