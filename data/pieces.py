"""What every source of text gives: pieces of documents, and the checks on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from polargrad_dist.errors import DataError

DOCUMENT_PIECE = 2**18


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    size: int
    """Bytes of the text in UTF-8."""
    validation: bool = False
    begins: bool = True
    """Whether the document begins with this piece."""
    ends: bool = True
    """Whether reading may begin anew after this piece; in the middle of a document it may not."""


class Source(Protocol):
    @property
    def size(self) -> int | None:
        """Bytes to read in all, where they are known beforehand; only for a progress bar."""
        ...

    def identity(self) -> dict[str, Any]: ...

    def describe(self) -> str: ...

    def pieces(self, start: int = 0, cursor: Any = None) -> Iterator[Piece]:
        """The pieces from number ``start`` on. Raises DataError naming file and line of text it cannot use.

        ``cursor``: what ``self.cursor()`` gave after piece ``start`` - 1, if anything.
        """
        ...

    def cursor(self) -> Any:
        """Where the pieces given out so far end, for a source that can go there faster than by counting; else None."""
        ...


def stamp(path: Path) -> list[Any]:
    """What changes whenever a file's content does, without reading it."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def text_field(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        fields = ", ".join(map(str, record)) or "nothing"
        raise DataError(f"{where} has no field {field!r} but {fields}; set data.text_field.")
    if not isinstance(record[field], str):
        raise DataError(f"{where}: {field!r} holds a {type(record[field]).__name__}, expected text.")
    return record[field]


def document_pieces(text: str, validation_fraction: float, where: str) -> Iterator[Piece]:
    """A document in pieces of at most DOCUMENT_PIECE characters, cut before a space where there is one.

    All are for validation if a hash of the whole text falls below the fraction. A tokenizer takes some hundred bytes of
    memory for each token of what it is given at once.
    """
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), which is no text."
        ) from error
    validation = validation_fraction > 0 and document_hash(raw) < validation_fraction * 2**64
    if len(text) <= DOCUMENT_PIECE:
        yield Piece(text, len(raw), validation)
        return
    del raw
    start = 0
    while start < len(text):
        stop = start + DOCUMENT_PIECE
        if stop < len(text):
            space = text.rfind(" ", start + DOCUMENT_PIECE // 2, stop)
            stop = stop if space < 0 else space
        part = text[start:stop]
        yield Piece(part, len(part.encode()), validation, start == 0, stop >= len(text))
        start = stop


def document_hash(text: bytes) -> int:
    """64 bits of a document's text, by which it falls into training or validation wherever it is read from."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
