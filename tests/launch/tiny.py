"""One tiny run of train.py on two CPU ranks, as every launcher here starts it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.harness import ROOT, last_logged

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it into the wood\n" * 400
STEPS = 120


def options(folder: Path, run: str, **others: object) -> list[str]:
    """The command line of the run that FOLDER/RUN keeps."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(TEXT)
    return [
        *("--model.architecture=gpt2-small", "--model.width=32", "--model.layers=2", "--model.heads=2"),
        *("--data.source=files", f'--data.paths=["{text}"]', f"--data.cache={folder / 'cache'}"),
        *("--data.tokenizer.vocab_size=300", "--data.validation_fraction=0.1"),
        *(f"--trainer.run_dir={folder / run}", f"--trainer.steps={STEPS}", "--trainer.device=cpu"),
        *("--trainer.global_batch=4", "--trainer.micro_batch=2", "--trainer.sequence_length=32"),
        *(
            "--trainer.logging.every=1",
            "--trainer.evaluation.every=0",
            "--trainer.evaluation.at_end=false",
            "--trainer.checkpoint.every=20",
        ),
        *(f"--trainer.{name}={value}" for name, value in others.items()),
    ]


def wait_for_step(run_dir: Path, step: int, tell: Callable[[], str]) -> None:
    """Returns once the run has logged ``step``; fails with what ``tell`` says after 90 s."""
    deadline = time.monotonic() + 90
    while last_logged(run_dir) < step:
        assert time.monotonic() < deadline, tell()[-2000:]
        time.sleep(0.05)


def launch(out: Path, arguments: list[str], **settings: object) -> subprocess.Popen:
    """launch/torchrun.sh with ``settings`` as its environment, its output appended to ``out``."""
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in settings.items()}
    )
    with out.open("ab") as log:
        return subprocess.Popen(
            ["launch/torchrun.sh", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
