"""A page about one run, or about several beside each other: `python -m tools.report RUN [RUN ...] [--out FILE.html]`.

One HTML file that needs nothing beside it. `runs` reads run directories, `charts` chooses and thins what is drawn, `page`
writes the HTML; `chart.js`, `page.js` and `style.css` go into it as they stand. The browser draws.
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
"""Bytes of a page. More runs or matrices than fit are thinned further."""


def write_report(folders: list[Path], out: Path) -> Path:
    """Writes the page ``out`` about the runs in ``folders``, whole or not at all, and returns ``out``.

    Raises ``ConfigError`` for a folder that is no run directory, and for a place that cannot be written.
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
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
