"""SIGTERM, SIGINT, SIGUSR1, SIGHUP and SIGQUIT become "save and leave after this step"; so does the death of torchrun.

A second signal leaves at once, unless a checkpoint is being written. A Ctrl-C reaches the workers of torchrun twice, from the
terminal and from torchrun itself, so signals within a second count as one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

log = logging.getLogger("polargrad_dist.trainer")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
# EX_TEMPFAIL: everything is saved, start me again
PREEMPTED = 75
_PARENT = os.getppid()


class LeaveRequest:
    """Whether this process was asked to leave. Handlers act in the process that installed them, not in its children.

    writing: whether a checkpoint is being written, which a second signal must not interrupt. tell: print to stderr what a
    signal does.
    """

    def __init__(self, writing: Callable[[], bool] = lambda: False, tell: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._writing, self._tell = writing, tell
        self._first = 0.0
        self._pid = os.getpid()
        # Only torchrun's workers have to end with their parent: the shell that started a single process may end before it.
        self._has_launcher = "TORCHELASTIC_RUN_ID" in os.environ
        # nohup ignores SIGHUP on purpose.
        wanted = [n for n in SIGNALS if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)]
        # Python lets only the main thread set handlers.
        main = threading.current_thread() is threading.main_thread()
        if not main:
            log.warning(
                "training in a thread: signals end this process unsaved, since only the main thread can handle them"
            )
        self._before = {number: signal.signal(number, self._asked) for number in wanted} if main else {}

    @property
    def asked(self) -> bool:
        return self.signal is not None or self._orphaned

    @property
    def reason(self) -> str:
        """Why this rank leaves, for the log."""
        if self.signal is not None:
            return self.signal.name
        return "torchrun is gone" if self._orphaned else "another rank was asked to"

    @property
    def _orphaned(self) -> bool:
        return self._has_launcher and os.getppid() != _PARENT

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), now
            self._say(
                f"{self.signal.name}: saving and leaving after this step; the same command resumes from there. "
                "A second signal leaves at once, unsaved."
            )
        elif now - self._first > 1.0 and not self._writing():
            self._say("left at once: the newest checkpoint is whole")
            # No clean-up: what is on disk is whole, and nothing may hold this up
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        """Straight to the file: a buffered stream may be in the middle of a line that this signal interrupted."""
        if self._tell:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())

    def close(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
