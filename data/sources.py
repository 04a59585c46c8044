"""Text sources: documents in a fixed order, long ones in parts, split into training and validation.

A source is independent of tokenizers and shards. Its identity (JSON-able) changes whenever its text may have changed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from data.checks import check_values
from data.config import DataConfig
from data.documents import Part, Source, document_hash, split_document, stamp, text_field
from data.hub import HubSource
from data.paths import LINES, PARQUET, TEXT, find_files, without_validation
from data.remote import File, kind, opened, size_of, unpacked_size
from polargrad_dist.errors import ConfigError, DataError
from polargrad_dist.words import counted

LINE_BYTES = 2**27
# Plain text is read in parts of this size, cut at a line break
PART_BYTES = 2**18
_NO_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def open_source(config: DataConfig, report: Callable[[str], None] = lambda _: None) -> Source:
    """The configured corpus. Raises ConfigError or DataError.

    report: receives a line if files of ``data.paths`` are left out, see `without_validation`.
    """
    check_values(config)
    if config.source == "builtin":
        return BuiltinSource(config.validation_fraction)
    if config.source == "files":
        suffixes = TEXT + LINES + PARQUET
        found = find_files(config.paths, "data.paths", suffixes)
        validation = (
            find_files(config.validation_paths, "data.validation_paths", suffixes)
            if config.validation_paths
            else []
        )
        train = without_validation(found, config, suffixes, report)
        return FileSource(train, validation, config.text_field, config.validation_fraction)
    if config.source == "hub":
        return HubSource(config.hub, config.text_field, config.validation_fraction)
    raise ConfigError(
        f"data.source is {config.source!r}, expected builtin, files or hub: shards need no preparation"
    )


class BuiltinSource:
    """The Python standard library's own sources without tests, and ``pydoc_data.topics``, in sorted order.

    It differs between Python versions, so its sha256 is part of its identity. Validation documents are those with the lowest
    hashes, until they reach the given share of the bytes.
    """

    position = 0

    def __init__(self, validation_fraction: float) -> None:
        self._fraction = validation_fraction
        self._root = Path(sysconfig.get_path("stdlib"))

    @cached_property
    def _documents(self) -> list[tuple[str, bytes]]:
        documents = [*_library_sources(self._root), *_library_topics()]
        if not documents:
            raise DataError(
                f"{self._root} holds no Python sources, expected the standard library's: set data.source to another corpus"
            )
        return documents

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for name, text in self._documents:
            digest.update(name.encode() + b"\0" + text + b"\0")
        return digest.hexdigest()

    @property
    def size(self) -> int:
        return sum(len(text) for _, text in self._documents)

    def identity(self) -> dict[str, Any]:
        return {"source": "builtin", "sha256": self._sha256, "validation_fraction": self._fraction}

    def describe(self) -> str:
        return (
            f"built-in corpus (Python standard library): {counted(len(self._documents), 'document')}, {self.size:,} bytes, "
            f"sha256 {self._sha256}"
        )

    def cursor(self) -> None:
        return None

    def documents(self, start: int = 0, cursor: Any = None) -> Iterator[Part]:
        wanted, kept = self._fraction * self.size, 0
        validation: set[int] = set()
        for index in sorted(range(len(self._documents)), key=lambda i: document_hash(self._documents[i][1])):
            if kept >= wanted:
                break
            validation.add(index)
            kept += len(self._documents[index][1])
        self.position = sum(len(text) for _, text in self._documents[:start])
        for index, (_, text) in enumerate(self._documents[start:], start):
            self.position += len(text)
            yield Part(text.decode(), len(text), index in validation)


def _library_sources(root: Path) -> Iterator[tuple[str, bytes]]:
    # The topics come as text; build configuration and site files differ between machines with the same Python.
    skipped = ("pydoc_data/topics.py", "_sysconfigdata", "sitecustomize", "usercustomize")
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not _NO_SOURCES.intersection(path.relative_to(root).parts[:-1])
    )
    for name in names:
        if name.startswith(skipped):
            continue
        with tokenize.open(root / name) as file:
            text = file.read().encode()
        if text:
            yield name, text


def _library_topics() -> Iterator[tuple[str, bytes]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name].encode()


class FileSource:
    """Local text, JSON lines and parquet files.

    Validation: the files of ``validation`` if given; else documents of JSON lines and parquet by a hash of their text, and
    the last share of the bytes of text files, from a line break on.
    """

    def __init__(
        self, files: list[File], validation: list[File], field: str, validation_fraction: float
    ) -> None:
        self._field = field
        self._fraction = 0.0 if validation else validation_fraction
        self._files, self._validation = files, validation
        self.size: int | None = sum(size_of(path) for path in self._validation + self._files)
        # Bytes of the files that are finished
        self._before = 0
        # The file being read
        self._raw: list[BinaryIO] = []
        text_bytes = sum(unpacked_size(path) for path in self._files if kind(path) in TEXT)
        self._text_split = text_bytes - int(self._fraction * text_bytes)

    def identity(self) -> dict[str, Any]:
        return {
            "source": "files",
            "files": [stamp(path) for path in self._files],
            "validation_files": [stamp(path) for path in self._validation],
            "text_field": self._field,
            "validation_fraction": self._fraction,
        }

    def describe(self) -> str:
        files = counted(len(self._files) + len(self._validation), "file")
        return f"{files}, {self.size:,} bytes, first {self._files[0]}"

    def cursor(self) -> None:
        return None

    @property
    def position(self) -> int:
        """Bytes of the files, as stored, that have been read so far."""
        return self._before + (self._raw[0].tell() if self._raw and not self._raw[0].closed else 0)

    def documents(self, start: int = 0, cursor: Any = None) -> Iterator[Part]:
        return itertools.islice(self._documents(), start, None)

    def _documents(self) -> Iterator[Part]:
        # Validation files come first, so that a limit on training tokens never cuts them off.
        self._before = 0
        for path in self._validation:
            for part in self._read(path, sys.maxsize):
                yield part._replace(validation=True)
            self._before += size_of(path)
        before = 0
        for path in self._files:
            yield from self._read(path, self._text_split - before)
            before += unpacked_size(path) if kind(path) in TEXT else 0
            self._before += size_of(path)

    def _read(self, path: File, split: int) -> Iterator[Part]:
        if kind(path) in TEXT:
            return read_text(path, split, self._raw)
        read = read_json_lines if kind(path) in LINES else read_parquet
        documents = read(path, self._field, self._raw)
        return (part for where, text in documents for part in split_document(text, self._fraction, where))


def read_text(path: File, split: int, raw: list[BinaryIO] | None = None) -> Iterator[Part]:
    """One document in parts that end at line breaks; those from byte ``split`` on are for validation.

    raw: see `data.remote.opened`. Raises DataError if the file has become shorter meanwhile, or is not UTF-8.
    """
    size = unpacked_size(path)
    position, line, was_validation = 0, 1, False
    rest = b""
    with opened(path, raw) as file:
        while position < size:
            stop = position + PART_BYTES
            wanted = min(stop, split if position < split else stop) - position
            block, rest = (rest + file.read(max(0, wanted - len(rest)))), b""
            if len(block) > wanted:
                block, rest = block[:wanted], block[wanted:]
            if not block.endswith(b"\n"):
                more, end = rest, rest.find(b"\n") + 1
                if not end:
                    line_end = file.readline(max(1, PART_BYTES - len(rest)))
                    more += line_end
                    end = len(more)
                    if not line_end and position + len(block) + end < size:
                        raise DataError(
                            f"{path} ends after {position + len(block) + end:,} bytes, expected {size:,}, its size when it "
                            "was opened: prepare again once nothing writes to it"
                        )
                block, rest = block + more[:end], more[end:]
            if not block.endswith(b"\n") and position + len(block) < size:
                cut = _cut_long_line(block)
                block, rest = block[:cut], block[cut:] + rest
            try:
                text = block.decode("utf-8-sig" if position == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(_not_utf8(path, line + block.count(b"\n", 0, error.start), error)) from error
            validation = position >= split
            yield Part(text, len(block), validation, position == 0 or validation != was_validation)
            position, line, was_validation = position + len(block), line + block.count(b"\n"), validation


def _cut_long_line(block: bytes) -> int:
    """Where to cut a block without a line break: before its last space, else before its last character."""
    cut = block.rfind(b" ")
    if cut <= 0:
        cut = len(block) - 1
        while cut > max(len(block) - 4, 1) and block[cut] & 0xC0 == 0x80:
            cut -= 1
    return cut


def _not_utf8(path: File, line: int, error: UnicodeDecodeError) -> str:
    return (
        f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason}): convert the file "
        f"first, for example with iconv -f LATIN1 -t UTF-8"
    )


def read_json_lines(path: File, field: str, raw: list[BinaryIO] | None = None) -> Iterator[tuple[str, str]]:
    """(where, text) of each line that is not blank. raw: see `data.remote.opened`."""
    with opened(path, raw) as file:
        for number in itertools.count(1):
            if not (line := file.readline(LINE_BYTES + 1)):
                return
            where = f"{path}, line {number}"
            if len(line) > LINE_BYTES:
                raise DataError(
                    f"{where} is longer than {LINE_BYTES // 2**20} MiB, expected one document per line: split it"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(_not_utf8(path, number, error)) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON ({error}), expected one object per line") from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{where} holds a {type(record).__name__}, expected an object with {field!r} per line"
                )
            yield where, text_field(record, field, where)


def _rows_at_once(file: Any, group: int) -> int:
    """Rows of a row group that take about 16 MiB together, at most 1,000."""
    known = file.metadata.row_group(group)
    return max(1, min(1000, 2**24 * known.num_rows // max(1, known.total_byte_size)))


def read_parquet(path: File, field: str, raw: list[BinaryIO] | None = None) -> Iterator[tuple[str, str]]:
    """(where, text) of each row. raw: see `data.remote.opened`."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            "parquet files need the package pyarrow, which is not installed: pip install '.[train]'"
        ) from error
    try:
        with opened(path, raw) as whole:
            schema = parquet.read_schema(whole)
            if schema.names.count(field) > 1:
                raise DataError(
                    f"{path} has {schema.names.count(field)} columns named {field!r}, expected one: rename the others"
                )
            whole.seek(0)
            texts = (
                [field] if field in schema.names and str(schema.field(field).type).endswith("string") else []
            )
            # With a dictionary, a text that the file stores once and references a million times is in memory once.
            file = parquet.ParquetFile(whole, read_dictionary=texts)
            if field not in file.schema_arrow.names:
                raise DataError(
                    f"{path} has the columns {', '.join(file.schema_arrow.names)}, expected {field!r}: set data.text_field"
                )
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_rows_at_once(file, group), [group], [field]):
                    for value in batch.column(0):
                        row += 1
                        where = f"{path}, row {row}"
                        yield where, text_field({field: value.as_py()}, field, where)
    except (OSError, ValueError) as error:
        # pyarrow's own errors derive from these
        raise DataError(f"{path} cannot be read as parquet ({error}): write it again") from error
