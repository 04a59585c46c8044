"""Progress on the console: a bar with a line per interval on a terminal, lines alone elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

# Goes to the run's log.txt alone: the terminal has the line already.
file_only = logging.getLogger("polargrad_dist.trainer.console")
COLUMNS = 120
MEMORY = 0.95
"""Weight of the previous value in the bar's smoothed loss; less at the start, where the loss falls fast."""


class Console:
    """A progress bar on a terminal, one dense line per row elsewhere; silent once stderr cannot be written."""

    def __init__(self, mode: str, steps: int, first: int):
        """mode: as ``trainer.logging.progress``. first: the step that the run resumes from."""
        self.steps, self.first, self.began = steps, first, time.monotonic()
        self._bar: Any = None
        self._smooth: float | None = None
        self._seen = 0
        self._figures: dict[str, float] = {}
        self.mode, self.silent = mode, mode == "off"
        self._unless_gone(self._start)

    def tick(self, record: dict[str, Any]) -> None:
        """Advances the bar by a step, and shows its ``loss`` and ``grad_norm``."""
        if self._bar is not None:
            self._unless_gone(lambda: self._move(record))

    def show(self, row: dict[str, Any]) -> None:
        """A row of the metrics, in a line that stays, on the terminal and in log.txt."""
        if self.silent:
            return
        done = row["step"] - self.first
        left = (self.steps - row["step"]) * (time.monotonic() - self.began) / max(1, done)
        # The bar itself shows the time that is left.
        text = line(row, self.steps, left if self._bar is None else None)
        self._figures |= {name: row[name] for name in ("tokens_per_second", "mfu") if name in row}
        self._unless_gone(lambda: self._print(text))
        file_only.info(text)

    def close(self) -> None:
        if self._bar is not None:
            self._unless_gone(self._bar.close)

    def _start(self) -> None:
        if self.mode == "auto":
            self.mode = "bar" if sys.stderr.isatty() else "lines"
        if self.mode == "bar":
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.steps,
                initial=self.first,
                dynamic_ncols=True,
                smoothing=0.05,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} eta {remaining}{postfix}",
            )

    def _move(self, record: dict[str, Any]) -> None:
        loss = record.get("loss", math.nan)
        if math.isfinite(loss):
            keep = min(MEMORY, self._seen / (self._seen + 4))
            self._smooth = keep * (self._smooth or 0.0) + (1 - keep) * loss
            self._seen += 1
        self._figures |= {name: record[name] for name in ("loss", "grad_norm") if name in record}
        self._bar.set_postfix_str(self._postfix(), refresh=False)
        self._bar.update(record["step"] - self._bar.n)

    def _postfix(self) -> str:
        smooth = {} if self._smooth is None else {"smooth": self._smooth}
        return "  ".join(written(self._figures | smooth, _BAR))

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self.mode == "lines":
            print(text, file=sys.stderr, flush=True)

    def _unless_gone(self, act: Callable[[], Any]) -> None:
        """Ignores a closed pipe, a lost terminal and a full disk behind a redirection: the figures are in metrics.jsonl."""
        try:
            act()
        except (OSError, ValueError, AttributeError):
            # ValueError: a closed stream; AttributeError: None
            self.mode, self._bar = "off", None


def line(row: dict[str, Any], steps: int, left: float | None = None) -> str:
    """A row as text, in lines of at most 120 characters; ``left``: seconds to the end of the run, where known.

    Samples are on lines of their own.
    """
    parts = [f"step {row['step']:>{len(str(steps))}}/{steps}"]
    parts += written(row, _LINE)
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']}")
    for name, found in row.get("validation", {}).items():
        parts.append(f"{name} {found['loss']:.4f}")
    if "hellaswag" in row:
        parts.append("hellaswag {acc_norm:.3f} ({acc:.3f} not normalized)".format_map(row["hellaswag"]))
    if set(row) <= {"step", "time", "elapsed", "tokens", "samples"}:
        parts.append("samples")
    if left is not None and "loss" in row:
        parts.append(f"eta {duration(left)}")
    lines = wrapped("  ".join(part.replace(" ", "\xa0") for part in parts), "    ")
    for sample in row.get("samples", ()):
        lines += wrapped(f"  {sample['prompt']!r} -> {sample['text']!r}", "    ")
    return "\n".join(lines).replace("\xa0", " ")


Forms = dict[str, Callable[[Any], str]]


def written(figures: dict[str, Any], forms: Forms) -> list[str]:
    """The figures that are known, in the order and the form that ``forms`` gives them."""
    return [form(figures[name]) for name, form in forms.items() if name in figures]


def figure(words: str, form: str) -> Callable[[Any], str]:
    """Writes a value into ``words``; null as "?"."""
    return lambda value: words.format("?" if value is None else format(value, form))


def _rate(rates: dict[str, float]) -> str:
    """The learning rate of the hidden matrices, or of the first role where there are none."""
    return f"lr {rates.get('hidden', next(iter(rates.values()))):.2e}"


_LINE: Forms = {
    "loss": figure("loss {}", ".4f"),
    "validation_loss": figure("validation loss {}", ".4f"),
    "bits_per_byte": figure("bits per byte {}", ".4f"),
    "grad_norm": figure("norm {}", ".3g"),
    "lr": _rate,
    "tokens_per_second": figure("{} tok/s", ",.0f"),
    "mfu": figure("mfu {}", ".1%"),
    "memory_gib": figure("{} GiB", ".2f"),
}
_BAR: Forms = {
    "loss": figure("loss {}", ".3f"),
    "smooth": figure("smooth {}", ".3f"),
    "grad_norm": figure("norm {}", ".2g"),
    "tokens_per_second": figure("{} tok/s", ",.0f"),
    "mfu": figure("mfu {}", ".0%"),
}


def wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, subsequent_indent=indent, replace_whitespace=False, drop_whitespace=False
    ) or [text]


def quiet(message: str) -> None:
    """Discards a message."""


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
