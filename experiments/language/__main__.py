"""`python -m experiments.language paper` (sections 5.4, 5.5, E.1 at small size), `race` (on equal terms), `defaults` (whether
every default rate is good), `rates` (how the best rates change with width, length, batch and vocabulary)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments.language import defaults, paper, race, rates
from experiments.language.runner import spread, workers_here
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.cli import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.language", description=__doc__)
    parser.add_argument("what", choices=["paper", "race", "defaults", "rates"])
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=None,
        help="default: 0 1 2; for the race 2 3 4, after sweeps on 0 and 1",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help="default: 160 for the paper's runs and the race's sweeps, 300 for the defaults",
    )
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=None,
        help="default: 64 128 for the race, 64 128 256 for the defaults",
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=None, help="for the race; default: steps and 4 x steps"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=None,
        help="run only these of the paper's experiments, the racers, the families or the sets of rules",
    )
    parser.add_argument(
        "--workers", type=int, default=workers_here(), help="runs at a time, each on one thread"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/paper-lm"))
    args = parser.parse_args()
    steps = (300 if args.what == "defaults" else 160) if args.steps is None else args.steps
    if args.what == "rates" and (args.steps or args.widths or args.lengths):
        raise ConfigError("rates has its own widths and lengths: leave --steps, --widths and --lengths out")
    widths = args.widths or ([64, 128, 256] if args.what == "defaults" else [64, 128])
    known = {
        "paper": list(paper.EXPERIMENTS),
        "race": [r.name for r in race.RACERS],
        "defaults": list(defaults.FAMILIES),
        "rates": list(rates.RULES),
    }[args.what]
    if strange := set(args.only or ()) - set(known):
        raise ConfigError(f"--only has {min(strange)!r}, expected some of: {', '.join(known)}")
    if steps < 40 or args.workers < 1:
        raise ConfigError(
            f"--steps is {steps} and --workers {args.workers}, expected at least 40 and at least 1"
        )
    if bad := [width for width in widths if width < 16 or width % 16]:
        raise ConfigError(f"--widths has {bad[0]}, expected multiples of 16: heads are 16 wide")
    if args.lengths and min(args.lengths) < 40:
        raise ConfigError(f"--lengths has {min(args.lengths)}, expected at least 40 steps")
    seeds = args.seeds or ([2, 3, 4] if args.what == "race" else [0, 1, 2])
    out = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out is {out}, which cannot be written ({error.strerror}): choose another folder"
        ) from error
    if args.what == "paper":
        report = paper.run(args.only or known, out, seeds, steps, args.workers)
        for name, entries in report.items():
            print(f"\n{paper.EXPERIMENTS[name].title}, {steps} steps, seeds {seeds}: final validation loss")
            for entry, found in entries.items():
                print(f"  {entry:<40}{spread(found['final_validation_loss'])}")
    elif args.what == "defaults":
        report = defaults.run(out, args.only or known, widths, steps, seeds, args.workers)
        print("\n" + defaults.table(report))
    elif args.what == "rates":
        report = rates.run(out, args.only or known, seeds, args.workers)
        print("\n" + rates.table(report))
    else:
        lengths = tuple(args.lengths) if args.lengths else None
        report = race.run(out, seeds, steps, args.workers, args.only, tuple(widths), lengths)
        print("\n" + race.table(report))
    path = out / f"{args.what}.json"
    path.write_text(json.dumps(report, indent=1))
    print(f"\nfigures and curves: {out}")
    return 0


if __name__ == "__main__":
    run(main)
