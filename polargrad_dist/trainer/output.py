"""Log lines to the terminal and into the run directory; a closed pipe or a full disk loses lines, never the run."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from pathlib import Path

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.console import file_only

log = logging.getLogger("polargrad_dist.trainer")
# Errors of a place that will stay unwritable, unlike a disk that is full or failing for a while.
_NEVER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR}


class ToTerminal(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line of its own, above the progress bar if there is one."""
        if (bars := sys.modules.get("tqdm")) is None:
            super().emit(record)
            return
        try:
            with bars.tqdm.external_write_mode(file=sys.stderr):
                super().emit(record)
        except (OSError, ValueError, AttributeError):
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Ignores a terminal that is gone and a pipe that nobody reads."""


class ToFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Does nothing: the line stays in the stream's buffer, and is written with a later one once there is room."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def start_log(folder: Path, rank: int) -> None:
    """Sends log messages to the terminal (rank 0) and to the run's log.txt (all ranks, with their number).

    Raises ``ConfigError`` for a log.txt that can never be written.
    """
    root = logging.getLogger("polargrad_dist")
    root.setLevel(logging.INFO)
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [ToTerminal()] if rank == 0 else []
    for handler in handlers:
        handler.addFilter(lambda record: record.name != file_only.name)
    missing = None
    try:
        handlers.append(ToFile(folder / "log.txt"))
    except OSError as error:
        if error.errno in _NEVER:
            raise ConfigError(
                f"{folder / 'log.txt'} cannot be written ({error.strerror}): make it writable or move it away, or choose "
                "another trainer.run_dir"
            ) from error
        missing = error
    for handler in handlers:
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%H:%M:%S")
        )
        root.addHandler(handler)
    if missing is not None:
        log.warning(
            "%s cannot be opened (%s): this start has no log.txt", folder / "log.txt", missing.strerror
        )


def flush() -> None:
    """Flushes stdout and stderr; redirects a closed one to /dev/null, or Python's own flush would make the exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
