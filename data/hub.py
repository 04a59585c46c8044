"""Data sets on the Hugging Face hub, or in a local folder of that format, through `datasets`.

The position of a streamed data set (file and row) is saved after each chunk, so that an interrupted preparation continues
there without rereading.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import HubConfig
from data.documents import Part, split_document, stamp, text_field
from data.hub_probe import first_line, offline, unreachable
from polargrad_dist.errors import DataError


class HubSource:
    """The rows of one split, streamed over the network while they are tokenized, or downloaded first."""

    size: int | None = None
    position = 0

    def __init__(self, hub: HubConfig, field: str, validation_fraction: float) -> None:
        self._hub, self._text_field, self._fraction = hub, field, validation_fraction
        self._rows: Any = None

    def identity(self) -> dict[str, Any]:
        hub = self._hub
        local = sorted(path for path in Path(hub.name).rglob("*") if path.is_file())
        return {
            "source": "hub",
            "files": [stamp(path) for path in local],
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

    def documents(self, start: int = 0, cursor: Any = None) -> Iterator[Part]:
        rows = self._rows = self._open()
        if cursor is not None:
            rows.load_state_dict(cursor)
        elif start:
            rows = rows.skip(start)
        number = start
        try:
            for number, row in enumerate(rows, start):
                where = f"{self._hub.name}, row {number}"
                yield from split_document(text_field(row, self._text_field, where), self._fraction, where)
        except OSError as error:
            # What fsspec, requests and httpx raise when the network goes away
            raise DataError(
                f"{self._hub.name} could not be read beyond row {number} ({type(error).__name__}: {error}); finished "
                "shards are kept: run the same command again to continue"
            ) from error

    def cursor(self) -> Any:
        return self._rows.state_dict()

    def _open(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DataError(
                "data.source is 'hub', but the package datasets is not installed: pip install '.[train]'"
            ) from error
        hub = self._hub
        # Checked first, since the clients' own retries take minutes. Offline, an earlier download may suffice.
        ask = not Path(hub.name).is_dir() and not offline()
        if ask and (reason := unreachable(f"api/datasets/{hub.name}")) is not None:
            raise DataError(self._cannot(reason))
        try:
            rows = load_dataset(
                hub.name, hub.subset, split=hub.split, revision=hub.revision, streaming=hub.streaming
            )
        except Exception as error:
            # Anything from a missing subset to a script that `datasets` no longer runs
            raise DataError(self._cannot(f"{type(error).__name__}: {first_line(error)}")) from error
        return rows if hub.streaming else rows.to_iterable_dataset()

    def _cannot(self, reason: str) -> str:
        return (
            f"the data set {self._hub.name} cannot be fetched from the Hugging Face hub ({reason}): without a network set "
            "data.source to files with data.paths of local text, JSON lines or parquet, or to shards with ready-made "
            ".bin files"
        )
