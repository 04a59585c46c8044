"""Whole-file checksums of foreign shards, which have no manifest, computed during the first epoch.

At start only some blocks of each file are compared; the rest is checked by reading it whole. Checksums are stored in the
cache, and a file whose checksum changes later ends the run; a cache that cannot be read or written does not.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.files import digest, make_folder, read_json, write_json
from data.shards import sampled_sha256
from polargrad_dist.errors import DataError

BLOCK = 4 * 2**20


@dataclass
class Background:
    """Reads ``paths`` once, with half of a thread's time. ``raise_if_found`` raises the error of a file that has changed;
    ``report`` receives what else goes wrong, one line for each kind of trouble with the cache."""

    paths: Sequence[Path]
    folder: Path
    report: Callable[[str], None]
    _failure: DataError | None = None
    _thread: threading.Thread | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _told: set[str] = field(default_factory=set)

    def start(self) -> None:
        """Again is harmless."""
        if self._thread is None and self.paths:
            self._thread = threading.Thread(target=self._run, daemon=True, name="checksums")
            self._thread.start()

    def raise_if_found(self) -> None:
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Waits until every file is read, or one is found that has changed."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        for path in self.paths:
            try:
                compare(path, self._whole(path), self.folder, self._tell_once)
            except DataError as error:
                self._failure = error
                return
            except OSError as error:
                self.report(f"{path} could not be checked ({error.strerror}); it is read without")

    def _tell_once(self, what: str, details: object) -> None:
        if what not in self._told:
            self._told.add(what)
            self.report(f"{what}: {details}")

    def _whole(self, path: Path) -> str:
        checksum = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                began = time.monotonic()
                checksum.update(block)
                time.sleep(time.monotonic() - began)
        return checksum.hexdigest()


def compare(path: Path, checksum: str, folder: Path, tell: Callable[[str, object], None]) -> None:
    """Stores a file's checksum in ``folder``. Raises DataError if the same file had another one before.

    A stored checksum that cannot be read counts as none. ``tell(what, details)`` receives what could not be read or stored.
    """
    path = path.absolute()
    known = folder / f"{digest(str(path))[:32]}.json"
    sampled = sampled_sha256(path)
    before = None
    try:
        before = read_json(known) if os.path.exists(known) else None
    except DataError:
        tell("a stored checksum cannot be read, so its shard is taken as new", known)
    if isinstance(before, dict) and before.get("sampled") == sampled and "sha256" in before:
        if before["sha256"] != checksum:
            raise DataError(
                f"{path} has changed since it was first trained on, in bytes that the check at start does not read: its "
                f"sha256 is {checksum[:16]}…, expected {str(before['sha256'])[:16]}…: restore it, or delete {known} if "
                "the change is intended"
            )
        return
    try:
        make_folder(folder)
        write_json(known, {"path": str(path), "sampled": sampled, "sha256": checksum})
    except DataError as error:
        tell("checksums of shards cannot be stored, so a later change may go unnoticed", error)
