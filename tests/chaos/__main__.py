"""`python -m tests.chaos [--kills 25] [--strategy S] [--seed N]`: kills a run over and over; it must end as if untouched."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.harness import chaos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--strategy", choices=["ddp", "fsdp", "hsdp"], default="ddp")
    parser.add_argument("--world", type=int, help="ranks; default: 4 for hsdp, else 2")
    parser.add_argument("--asynchronous", action="store_true", help="every life saves in the background")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = chaos(
            Path(folder),
            options.kills,
            options.seed,
            options.world or (4 if options.strategy == "hsdp" else 2),
            options.strategy,
            options.asynchronous,
            tell=lambda line: print(line, flush=True),
        )
    for (moment, victims), count in sorted(report.kills.items()):
        print(f"{count:4} kills of {victims} while {moment}")
    print(
        f"{report.torn} saves torn, {report.steps_lost} steps done again, {time.monotonic() - started:.0f} s"
    )
    print(
        f"{options.kills} kills, and every parameter, optimizer state, generator and logged loss is as undisturbed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
