"""The report's command line."""

from __future__ import annotations

from pathlib import Path

from polargrad_dist.trainer.cli import run
from tools.arguments import Arguments
from tools.report import write_report


def main() -> int:
    parser = Arguments(
        "Write a report on one run, or on several side by side.",
        "runs",
        dict.fromkeys(("output", "o"), "--out FILE"),
        prog="python -m tools.report",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory")
    parser.add_argument(
        "--out",
        help="file to write; default: report.html in the run's directory, or in this folder for several runs",
    )
    parser.add_argument(
        "--bigram",
        action="store_true",
        help="first measure a bigram model on each run's data, as a reference for the loss; stored in run.json",
    )
    options = parser.read()
    folders = [Path(name) for name in options.runs]
    if options.bigram:
        from tools.bigram import measure

        for folder in folders:
            measure(folder)
    default = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    out = write_report(folders, Path(options.out) if options.out else default)
    print(f"wrote {out} ({out.stat().st_size / 1e3:.0f} kB)")
    return 0


if __name__ == "__main__":
    run(main)
