"""``polargrad-checkpoint verify|list|show PATH``: inspects checkpoints and changes nothing.

The same as ``python -m polargrad_dist.trainer.checkpoint``; it needs only torch and numpy.

PATH is one checkpoint, a folder of them, or a run directory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from polargrad_dist.errors import CheckpointError
from polargrad_dist.trainer.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    checkpoints_in,
    misplaced,
    step_of,
    verify,
)
from polargrad_dist.words import counted


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if all checkpoints are valid, 1 if one is damaged, 2 if PATH holds none.

    Ends quietly, with 0, when its output is closed, as by ``| head``.
    """
    try:
        code = _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python's own flush at exit would fail otherwise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="polargrad-checkpoint", description=__doc__)
    parser.add_argument("command", choices=["verify", "list", "show"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=4, help="for verify: files read and hashed at a time")
    options = parser.parse_args(arguments)
    found = _checkpoints(options.path)
    if not found:
        print(
            f"{options.path} holds no checkpoint, expected a checkpoint, a folder of them, or a run directory",
            file=sys.stderr,
        )
        return 2
    if options.command == "list":
        print(
            f"{'checkpoint':<16}{'saved at':<22}{'ranks':>5}{'tensors':>9}{'MiB':>12}{'validation loss':>17}"
        )
    results = [_COMMANDS[options.command](path, options) for path in found]
    return 0 if all(results) else 1


def _checkpoints(path: Path) -> list[Path]:
    if path.is_dir() and (step_of(path) is not None or (path / MANIFEST).exists()):
        return [path]
    return checkpoints_in(path) or checkpoints_in(path / "checkpoints")


def _verify(path: Path, options: argparse.Namespace) -> bool:
    try:
        manifest = verify(path, threads=options.threads)
    except CheckpointError as error:
        print(f"DAMAGED  {error}")
        return False
    if reason := misplaced(path, manifest, None):
        print(f"DAMAGED  {path}: {reason}")
        return False
    print(
        f"valid    {path}: step {manifest.step}, {counted(len(manifest.tensors), 'tensor')}, {manifest.bytes:,} bytes"
    )
    return True


def _list(path: Path, options: argparse.Namespace) -> bool:
    try:
        m = Manifest.read(path)
    except CheckpointError as error:
        print(f"{path.name:<16}{error}")
        return False
    loss = "" if m.validation_loss is None else f"{m.validation_loss:.4f}"
    size = f"{m.bytes / 2**20:.1f}"
    print(f"{path.name:<16}{m.saved_at:<22}{m.world_size:>5}{len(m.tensors):>9}{size:>12}{loss:>17}")
    return True


def _show(path: Path, options: argparse.Namespace) -> bool:
    try:
        m = Manifest.read(path)
    except CheckpointError as error:
        print(error)
        return False
    print(path)
    for key in ("step", "world_size", "saved_at", "validation_loss", "run", "origin", "versions", "files"):
        print(f"{key}: {json.dumps(getattr(m, key))}")
    for key in ("identity", "configuration", "objects"):
        print(f"{key}: {json.dumps(getattr(m, key), indent=2)}")
    for name, t in m.tensors.items():
        shape = " × ".join(map(str, t.shape)) or "scalar"
        print(f"  {name}  {str(t.dtype).removeprefix('torch.')}  {shape}  in {len(t.pieces)}")
    return True


_COMMANDS = {"verify": _verify, "list": _list, "show": _show}

if __name__ == "__main__":
    sys.exit(main())
