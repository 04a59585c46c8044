"""The folder of one run's checkpoints: which to keep, and which to move aside. Only rank 0 calls these functions.

Names: ``step-00001000`` is a checkpoint; ``.saving-…`` one being written; ``.removing-…`` one being deleted;
``aside-…`` one that no run resumes from any more (damaged, or of an abandoned branch), left for the user to
inspect or delete.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polargrad_dist.errors import CheckpointError, ConfigError
from polargrad_dist.trainer.checkpoint.manifest import Manifest, checkpoints_in, step_of

log = logging.getLogger("polargrad_dist.trainer.checkpoint")
SAVING, REMOVING, ASIDE = ".saving-", ".removing-", "aside-"


@dataclass
class CheckpointConfig:
    """When to save, what to keep, and where to resume.

    Args:
        every: steps between saves; 0 saves only at the end and on a signal.
        keep_last: number of newest checkpoints to keep, at least 2.
        keep_every: also keep checkpoints whose step is a multiple of this; 0 for none.
        keep_best: also keep the one with the lowest validation loss.
        asynchronous: copy to host memory, then write in the background while training goes on.
        on_failure: whether a failed save ends the run; null: raise when synchronous, continue when asynchronous.
        threads: threads per rank for hashing, reading and writing.
        resume: "auto" takes the newest valid checkpoint of this run, if any; "never" refuses a run directory with
            checkpoints; anything else is the path of a checkpoint.
        allow_other_data: resume even if the data differ from the checkpoint's.
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    keep_best: bool = True
    asynchronous: bool = False
    on_failure: Literal["raise", "continue"] | None = None
    threads: int = 4
    resume: str = "auto"
    allow_other_data: bool = False

    def __post_init__(self) -> None:
        self.resume = os.path.expanduser(self.resume)
        least = {"every": 0, "keep_last": 2, "keep_every": 0, "threads": 1}
        for key, value in least.items():
            if getattr(self, key) < value:
                raise ConfigError(
                    f"trainer.checkpoint.{key} is {getattr(self, key)}, expected a whole number >= {value}"
                )


def prune(folder: Path, config: CheckpointConfig, losses: dict[str, float | None]) -> None:
    """Removes checkpoints that no ``keep_`` option keeps; ``losses`` caches losses by name."""
    paths = checkpoints_in(folder)
    keep = set(paths[-config.keep_last :])
    if config.keep_every:
        keep |= {path for path in paths if (step_of(path) or 0) % config.keep_every == 0}
    if config.keep_best:
        for path in paths:
            if path.name not in losses:
                losses[path.name] = _validation_loss(path)
        scored = {path: loss for path in paths if (loss := losses[path.name]) is not None}
        keep |= {min(scored, key=scored.__getitem__)} if scored else set()
    for path in paths:
        if path not in keep:
            try:
                # Renamed first, so that a kill in the middle leaves nothing that looks like a checkpoint.
                removed = path.rename(path.with_name(REMOVING + path.name))
            except OSError as error:
                log.warning("the old checkpoint %s cannot be renamed (%s): it stays", path, error.strerror)
                continue
            remove(removed)


def remove(path: Path) -> bool:
    """Deletes a folder, a file or a link (not its target); returns whether it is gone.

    What cannot be deleted stays, with a line in the log: on NFS a file that is open elsewhere persists as ``.nfs…``.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s cannot be deleted (%s): it is ignored from now on", path, error.strerror or error)
    return not os.path.lexists(path)


def finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _validation_loss(path: Path) -> float | None:
    try:
        return finite(Manifest.read(path).validation_loss)
    except CheckpointError:
        return None


def clear_leftovers(folder: Path) -> None:
    """Removes what interrupted saves and removals left behind."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith((SAVING, REMOVING)):
            log.info("removing %s, which a killed run left", path)
            remove(path)


def set_aside(paths: Iterable[Path], why: str) -> None:
    for path in paths:
        target, n = path.with_name(ASIDE + path.name), 1
        while os.path.lexists(target):
            n += 1
            target = path.with_name(f"{ASIDE}{path.name}-{n}")
        log.warning("renaming checkpoint %s to %s: %s", path.name, target.name, why)
        path.rename(target)
