"""`python -m tests.trainer.toy_run RUN_DIR [--steps N] [--pause S] [--full_disk]`: a toy run, alone in its process."""

from __future__ import annotations

import argparse
import resource
import threading
import time
from pathlib import Path

from polargrad_dist.trainer.checkpoint import CheckpointConfig
from polargrad_dist.trainer.cli import run
from polargrad_dist.trainer.config import LoggingConfig
from tests.trainer.toy import settings, trainer


def fill_the_disk(path: Path) -> None:
    """For two seconds no file grows beyond a few bytes more than the metrics have now: the next row goes out in part."""
    while not path.exists() or path.stat().st_size < 1000:
        time.sleep(0.01)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    time.sleep(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that every step takes at least")
    parser.add_argument("--full_disk", action="store_true")
    options = parser.parse_args()
    t = trainer(
        settings(
            options.run_dir,
            steps=options.steps,
            logging=LoggingConfig(every=1, stats_every=0, progress="auto"),
            checkpoint=CheckpointConfig(every=0),
        )
    )
    step = t._step

    def slow(*args):
        time.sleep(options.pause)
        return step(*args)

    t._step = slow
    if options.full_disk:
        threading.Thread(target=fill_the_disk, args=(options.run_dir / "metrics.jsonl",), daemon=True).start()
    return t.fit().exit_code


if __name__ == "__main__":
    run(main)
