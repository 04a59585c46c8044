"""Progress of data preparation: a bar on a terminal, a line per minute elsewhere, with rate and remaining time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from polargrad_dist.words import counted

INTERVAL_S = 60.0


class Gauge:
    """Counts bytes of the corpus if its size is known, else tokens towards ``max_tokens``, else tokens alone."""

    def __init__(
        self, size: int | None, max_tokens: int | None, report: Callable[[str], None], begun: int = 0
    ):
        """begun: tokens of an earlier, interrupted preparation."""
        from tqdm import tqdm

        self.in_bytes = size is not None and max_tokens is None
        self.total = size if self.in_bytes else max_tokens
        self._report, self._last, self._first = report, time.monotonic(), begun
        first = 0 if self.in_bytes else begun
        self._bar: Any = tqdm(
            total=self.total,
            initial=first,
            unit="B" if self.in_bytes else "tok",
            unit_scale=True,
            desc="tokenizing",
            disable=not sys.stderr.isatty(),
        )
        self._began, self._at = time.monotonic(), first
        self._start = first

    def show(self, position: int, tokens: int) -> None:
        """position: bytes of the corpus read so far. tokens: training tokens so far."""
        at = position if self.in_bytes else tokens
        self._bar.update(at - self._at)
        self._at = at
        if self._bar.disable and time.monotonic() - self._last >= INTERVAL_S:
            self._last = time.monotonic()
            self._report(self.line(time.monotonic() - self._began, tokens))

    def line(self, seconds: float, tokens: int) -> str:
        """The state after ``seconds`` of work, for a log."""
        rate = max(self._at - self._start, 1) / max(seconds, 1e-9)
        unit = "bytes" if self.in_bytes else "tokens"
        text = f"tokenizing: {counted(tokens, 'token')}, {rate:,.0f} {unit}/s"
        if self.total:
            left = int(max(0, self.total - self._at) / rate)
            text += f", {min(1.0, self._at / self.total):.0%}, about {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return text

    def close(self) -> None:
        self._bar.close()
