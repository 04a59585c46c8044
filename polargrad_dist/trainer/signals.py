"""SIGTERM, SIGUSR1 and SIGINT become "save and leave at the next step boundary"; a second one leaves at once.

A Ctrl-C reaches the workers of a torchrun twice, from the terminal and handed on: signals within a second are one.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PREEMPTED = 75  # EX_TEMPFAIL: everything is saved, start me again


class LeaveRequest:
    """Whether this process was asked to leave. Handlers act in the process that installed them, not in its children."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._first = 0.0
        self._pid = os.getpid()
        self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), now
        elif now - self._first > 1.0:
            os._exit(128 + number)  # no clean-up: what is on disk is whole, and nothing may hold this up

    def close(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
