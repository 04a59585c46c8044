"""Prints text sampled from a run's model: `python -m tools.generate RUN_OR_CHECKPOINT --prompt "class "`."""

from __future__ import annotations

import math

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.cli import run
from tools.arguments import Arguments
from tools.runs import load_run


def main(args: list[str] | None = None) -> int:
    """Runs the command with ``args``, by default those of the process."""
    parser = Arguments(
        "Continue a prompt with the model of a run.",
        "one run: a prompt is --prompt {}",
        {
            **dict.fromkeys(("max_tokens", "max_new_tokens", "num_tokens", "length", "n"), "--tokens"),
            **dict.fromkeys(("text", "input"), "--prompt"),
        },
    )
    parser.add_argument("run", help="a run directory, or one of its checkpoints")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts a document")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument(
        "--top_k", type=int, default=50, help="sample from the k likeliest tokens only; 0 for all"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens that together have this probability",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--step", type=int, default=None, help="checkpoint to load; default: the newest valid one"
    )
    options = parser.read(args)
    for name, good, expected in (
        ("tokens", options.tokens >= 0, "a whole number >= 0"),
        ("temperature", 0 <= options.temperature < math.inf, "a finite number >= 0"),
        ("top_k", options.top_k >= 0, "a whole number >= 0"),
        ("top_p", 0 < options.top_p <= 1, "a number in (0, 1]"),
        ("seed", 0 <= options.seed < 2**63, "a whole number in [0, 2**63)"),
        ("prompt", _is_utf8(options.prompt), "text in UTF-8"),
    ):
        if not good:
            raise ConfigError(f"--{name} is {getattr(options, name)!r}, expected {expected}")
    opened = load_run(options.run, step=options.step)
    print(options.prompt, end="", flush=True)
    for text in opened.stream(
        options.prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        seed=options.seed,
    ):
        print(text, end="", flush=True)
    print()
    return 0


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        # Bytes of the command line that are not text
        return False
    return True


if __name__ == "__main__":
    run(main)
