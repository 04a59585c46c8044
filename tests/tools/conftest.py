"""Small runs through the real entry point, made once for all tests of the tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commandline import ROOT, train

SMALL = (
    *(
        "--model.layers",
        "4",
        "--model.width",
        "32",
        "--model.heads",
        "2",
        "--model.max_sequence_length",
        "128",
    ),
    *("--data.tokenizer.vocab_size", "400", "--data.validation_fraction", "0.1", "--trainer.device", "cpu"),
    *("--trainer.global_batch", "8", "--trainer.micro_batch", "4", "--trainer.sequence_length", "64"),
    *("--trainer.logging.every", "1", "--trainer.logging.progress", "off", "--optimizer.head", "null"),
    *("--optimizer.embed.lr", "0.05", "--optimizer.hidden.oracle_dtype", "float32", "--trainer.steps", "4"),
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Python's documentation topics, one JSON line each."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[:40]))
    return path


@pytest.fixture(scope="session")
def arguments(corpus) -> Callable[..., list[str]]:
    """The command line of a small run in a folder."""

    def make(run: Path, *more: str) -> list[str]:
        data = ["--data.source", "files", "--data.paths", json.dumps([str(corpus)])]
        return [
            *SMALL,
            *data,
            "--data.cache",
            str(corpus.parent / "cache"),
            "--trainer.run_dir",
            str(run),
            *more,
        ]

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory, arguments) -> Callable[[str], Path]:
    """The run directory of an architecture, trained for 4 steps."""
    runs: dict[str, Path] = {}

    def of(architecture: str) -> Path:
        if architecture not in runs:
            run = tmp_path_factory.mktemp(architecture) / "run"
            done = train(*arguments(run, "--model.architecture", architecture))
            assert done.returncode == 0, done.stderr
            runs[architecture] = run
        return runs[architecture]

    return of


def tool(name: str, *args: object, code: int = 0) -> str:
    """What ``python -m NAME ARGS`` prints; its errors, where it has to fail."""
    done = subprocess.run(
        [sys.executable, "-m", name, *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr if code else done.stdout
