"""Atomic, durable file writes; a full disk is reported in one sentence."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polargrad_dist.errors import DataError

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def write_atomically(path: Path, *parts: Any) -> str:
    """Writes the buffers to a temporary file, syncs and renames it; returns the sha256 in hex.

    Raises DataError if the disk is full, a file-size limit is hit or the folder cannot be written; then neither the file nor
    the temporary one exists.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    digest = hashlib.sha256()
    try:
        try:
            with open(temporary, "wb") as file:
                for part in parts:
                    digest.update(part)
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        size = sum(memoryview(part).nbytes for part in parts)
        if error.errno in _FULL:
            limit = "a file-size limit (ulimit -f)" if error.errno == errno.EFBIG else "no space left"
            raise DataError(
                f"cannot write {path} ({size:,} bytes): {limit}; finished files are kept: free some space and run "
                "the same command again to continue, or choose another folder"
            ) from error
        raise DataError(f"{path} cannot be written ({error.strerror}): choose a folder that can") from error
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises DataError when the file is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist, expected a file that data.prepare wrote") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as JSON ({error}): delete its folder and prepare again"
        ) from error


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex. Raises DataError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): restore it, or prepare again") from error


def digest(value: Any) -> str:
    """The sha256, in hex, of a JSON-able value in a canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path} cannot be made ({error.strerror}): choose another folder") from error


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """A lock, so that one process at a time prepares a folder. It is released when its holder dies."""
    try:
        file = open(folder / ".lock", "wb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error
    with file:
        # Some network file systems have no locks: there two runs must not prepare one folder at once.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
