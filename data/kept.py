"""A copy of a run's tokenizer in its directory, so that the run can be used without its data or their cache.

``tokenizer/info.json`` describes it, ``tokenizer/tokenizer.json`` is the tokenizer itself; tiktoken's are stored by name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.files import make_folder, write_atomically, write_json
from data.shards import TOKENIZER_FIELDS, check_fields
from data.tokenizers import Tokenizer, TokenizerInfo
from polargrad_dist.errors import DataError

FOLDER, INFO, TOKENIZER = "tokenizer", "info.json", "tokenizer.json"


@dataclass(frozen=True)
class Kept:
    """The tokenizer in a run directory. ``info`` is None for foreign shards without a tokenizer."""

    info: TokenizerInfo | None
    end_of_text: int | None
    folder: Path

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary size; None without a tokenizer."""
        return self.info.vocab_size if self.info else None

    def load(self) -> Tokenizer:
        """The tokenizer. Raises DataError if there is none."""
        if self.info is None:
            raise DataError(
                f"{self.folder.parent} was trained on shards without a tokenizer, expected one to read or write text: "
                "train with data.tokenizer.name set"
            )
        try:
            return self.info.load(self.folder)
        except DataError as error:
            if self.info.file is None:
                raise
            raise DataError(f"{error}: start the run once more, which writes it anew") from error


def keep(folder: Path, tokenizer: Tokenizer | None, end_of_text: int | None) -> None:
    """Writes a run's tokenizer into its directory, unless it is there already, undamaged: runs do not change theirs."""
    if _whole(folder):
        return
    folder = folder / FOLDER
    make_folder(folder)
    info: dict[str, Any] | None = None
    if tokenizer is not None:
        text = tokenizer.json()
        info = asdict(tokenizer.info) | {"file": None if text is None else TOKENIZER}
        if text is not None:
            write_atomically(folder / TOKENIZER, text.encode())
    write_json(folder / INFO, {"tokenizer": info, "end_of_text": end_of_text})


def _whole(folder: Path) -> bool:
    try:
        known = kept(folder)
        if known is not None and known.info is not None:
            known.info.check(known.folder)
    except DataError:
        return False
    return known is not None


def kept(folder: Path) -> Kept | None:
    """Reads what `keep` wrote; None for runs of older versions. Raises DataError if it is damaged."""
    folder = folder / FOLDER
    if not (folder / INFO).exists():
        return None
    try:
        raw = json.loads((folder / INFO).read_bytes())
        described, end_of_text = raw["tokenizer"], raw["end_of_text"]
        if described is None:
            return Kept(None, end_of_text, folder)
        check_fields(described, TOKENIZER_FIELDS)
        if described.get("file") not in (None, TOKENIZER):
            raise ValueError(f"its tokenizer lies in {described['file']!r}")
        return Kept(TokenizerInfo(**described), end_of_text, folder)
    except (OSError, RecursionError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / INFO} is not a tokenizer's description ({error!r}), expected what a run writes: start the run once "
            "more, which writes it anew"
        ) from error
