"""The interface of a text source: documents, long ones in parts, and the checks on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from data.remote import File, Remote
from polargrad_dist.errors import DataError

PART_CHARACTERS = 2**18


class Part(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    size: int
    """Bytes of the text in UTF-8."""
    validation: bool = False
    begins: bool = True
    """Whether the document begins with this part."""
    ends: bool = True
    """Whether a reader can resume after this part; inside a document it cannot."""


class Source(Protocol):
    @property
    def size(self) -> int | None:
        """Bytes to read in all, where they are known beforehand; only for a progress bar."""
        ...

    def identity(self) -> dict[str, Any]: ...

    def describe(self) -> str: ...

    def documents(self, start: int = 0, cursor: Any = None) -> Iterator[Part]:
        """The documents in order, long ones in several parts, from part number ``start`` on.

        ``cursor``: what ``self.cursor()`` returned after part ``start`` - 1, if anything. Raises DataError with file and line
        for text that cannot be used.
        """
        ...

    @property
    def position(self) -> int:
        """Bytes read so far, of `size`; only for a progress bar."""
        ...

    def cursor(self) -> Any:
        """The position after the last part that was read, for a source that can seek to it; else None."""
        ...


def stamp(path: File) -> list[Any]:
    """What changes whenever a file's content does, without reading it."""
    if isinstance(path, Remote):
        return [path.url, path.size, path.mark]
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def text_field(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        fields = ", ".join(map(str, record)) or "nothing"
        raise DataError(f"{where} has the fields {fields}, expected {field!r}: set data.text_field")
    if not isinstance(record[field], str):
        raise DataError(f"{where}: {field!r} holds a {type(record[field]).__name__}, expected text")
    return record[field]


def split_document(text: str, validation_fraction: float, where: str) -> Iterator[Part]:
    """A document in parts of at most PART_CHARACTERS characters, cut before a space where there is one.

    All parts are for validation if a hash of the whole text falls below the fraction. Parts bound the memory of the
    tokenizer, which takes some hundred bytes for each token of a call.
    """
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), expected Unicode text: remove it"
        ) from error
    validation = validation_fraction > 0 and document_hash(raw) < validation_fraction * 2**64
    if len(text) <= PART_CHARACTERS:
        yield Part(text, len(raw), validation)
        return
    del raw
    start = 0
    while start < len(text):
        stop = start + PART_CHARACTERS
        if stop < len(text):
            space = text.rfind(" ", start + PART_CHARACTERS // 2, stop)
            stop = stop if space < 0 else space
        cut = text[start:stop]
        yield Part(cut, len(cut.encode()), validation, start == 0, stop >= len(text))
        start = stop


def document_hash(text: bytes) -> int:
    """A 64-bit hash of a document's text, which decides between training and validation, whatever file it is read from."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
