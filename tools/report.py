"""A page about one run, or about several beside each other: `python -m tools.report RUN [RUN ...] [--out FILE.html]`.

The page needs nothing beside it. The folder that is written next to it holds its figures as PNG, for papers and chats.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.cli import run
from tools.report_draw import draw, drawable
from tools.report_figures import every_name, sections
from tools.report_page import page
from tools.report_runs import read_runs

PARAMETERS = 24  # with figures of their own; each takes a fifth of a second and 30 kB


def write_report(folders: list[Path], out: Path, parameters: int = PARAMETERS) -> Path:
    """Writes the page ``out`` about the runs in ``folders`` and its figures into ``<stem>-figures`` beside it.

    parameters: how many parameters' conditioning is drawn; of more, as many are taken evenly from first to last.
    Returns ``out``. Raises ``ConfigError`` for a folder that is no run directory, a missing matplotlib or a place that
    cannot be written; everything is drawn before anything is written, and each file is written whole or not at all.
    """
    drawable()
    if out.is_dir() or out.suffix not in (".html", ".htm"):
        raise ConfigError(
            f"the report cannot be written to {out}: expected the name of a file that ends in .html"
        )
    if parameters < 0:
        raise ConfigError(f"--parameters is {parameters}, expected a number >= 0")
    runs = read_runs(folders)
    known = every_name(runs, "diagnostics")
    chosen = spread(known, parameters)
    parts = sections(runs, chosen)
    drawn = {
        figure.name: draw(figure, [run.label for run in runs]) for part in parts for figure in part.figures
    }
    left_out = ""
    if len(chosen) < len(known):
        left_out = f"{len(chosen)} of the {len(known)} recorded parameters are shown: --parameters {len(known)} shows all."
    text = page(runs, parts, {name: svg for name, (svg, _) in drawn.items()}, left_out)
    pictures = figures_of(out)
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for name, (_, png) in drawn.items():
            replace(pictures / f"{name}.png", png)
        replace(out, text.encode("utf-8", "replace"))
        for stale in pictures.glob("*.png"):
            if stale.stem not in drawn and OURS.fullmatch(stale.stem):
                stale.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {out} ({error.strerror}): choose another --out"
        ) from error
    return out


OURS = re.compile(r"(loss|learning-rates|gradient-norm|throughput|time|(conditioning|polar)-\d+)")


def figures_of(out: Path) -> Path:
    """The folder of a report's PNGs."""
    return out.with_name(f"{out.stem}-figures")


def spread(names: list[str], count: int) -> list[str]:
    """``count`` of the names, evenly from the first to the last."""
    if len(names) <= count:
        return names
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]


def replace(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a page about one run, or about several beside each other."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory")
    parser.add_argument(
        "--out", help="page to write; default: report.html in the run's directory, or here for several runs"
    )
    parser.add_argument(
        "--parameters",
        type=int,
        default=PARAMETERS,
        metavar="N",
        help="parameters to draw the conditioning of, evenly from first to last (default: %(default)s)",
    )
    options = parser.parse_args()
    folders = [Path(name) for name in options.runs]
    default = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    out = write_report(folders, Path(options.out) if options.out else default, options.parameters)
    pictures = figures_of(out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB), and its figures as PNG into {pictures}")
    return 0


if __name__ == "__main__":
    run(main)
