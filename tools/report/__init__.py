"""A report on one run, or on several side by side: `python -m tools.report RUN [RUN ...] [--out FILE.html]`.

One self-contained HTML file. `runs` reads run directories, `charts` selects and thins the curves, `page` writes the HTML,
which includes `chart.js`, `page.js` and `style.css` unchanged. The browser draws.
"""

from __future__ import annotations

import os
from pathlib import Path

from polargrad_dist.errors import ConfigError
from tools.report.charts import charts
from tools.report.page import page
from tools.report.runs import read_runs

__all__ = ["LARGEST", "write_report"]

LARGEST = 1_500_000
"""Largest size of a page in bytes. Curves are thinned further where more runs or matrices would exceed it."""


def write_report(folders: list[Path], out: Path) -> Path:
    """Writes the page ``out`` about the runs in ``folders``, atomically, and returns ``out``.

    Raises ``ConfigError`` for a folder that is not a run directory, and for a file that cannot be written.
    """
    if out.is_dir() or out.suffix not in (".html", ".htm"):
        raise ConfigError(
            f"the report cannot be written to {out}: expected the name of a file that ends in .html"
        )
    runs = read_runs(folders)
    budget = 40_000
    while True:
        text = page(runs, charts(runs, budget)).encode("utf-8", "replace")
        if len(text) <= LARGEST or budget < 1_000:
            break
        budget //= 2
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace(out, text)
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {out} ({error.strerror}): choose another --out"
        ) from error
    return out


def replace(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
