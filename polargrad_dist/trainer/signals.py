"""SIGTERM, SIGUSR1 and SIGINT become "save and leave at the next step boundary"; a second one leaves at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PREEMPTED = 75  # EX_TEMPFAIL: everything is saved, start me again


class LeaveRequest:
    """Whether this process was asked to leave. Handlers act in the process that installed them, not in its children."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._pid = os.getpid()
        self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if self.signal is not None:
            os._exit(128 + number)  # no clean-up: what is on disk is whole, and nothing may hold this up
        self.signal = signal.Signals(number)

    def close(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
