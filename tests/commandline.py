"""`train.py` as a command line: in this process, or on several under torchrun."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]


def train(*args: str) -> SimpleNamespace:
    """`python train.py ARGS` in this process: the import of torch, once per case, would be most of the time."""
    from polargrad_dist.trainer.cli import run
    from train import main

    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["train.py", *args]
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(main)
    except SystemExit as left:
        code = left.code or 0
    finally:
        sys.argv = before
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def torchrun(processes: int, *args: str) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc_per_node PROCESSES train.py ARGS`, whatever becomes of it."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    return subprocess.run(
        [*launcher, "train.py", *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
