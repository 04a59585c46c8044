"""Text from a run's newest weights: `python -m tools.generate RUN_DIR --prompt "class "`."""

from __future__ import annotations

import argparse

from polargrad_dist.trainer.cli import run
from tools.runs import load_run


def main() -> int:
    parser = argparse.ArgumentParser(description="Continue a prompt with the model of a run.")
    parser.add_argument("run_dir", help="the run's directory")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts a document")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token each time"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--step", type=int, default=None, help="checkpoint to load; default: the newest valid one"
    )
    options = parser.parse_args()
    opened = load_run(options.run_dir, step=options.step)
    print(opened.sample(options.prompt, options.tokens, options.temperature, options.seed))
    return 0


if __name__ == "__main__":
    run(main)
