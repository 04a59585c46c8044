"""Reads checkpoints outside of training: one tensor at a time, in one process, whatever ranks and strategy saved them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from polargrad_dist.errors import CheckpointError, ConfigError
from polargrad_dist.trainer.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    checkpoints_in,
    misplaced,
    read_piece,
    step_of,
    verify,
)
from polargrad_dist.trainer.checkpoint.storage import as_bytes

MODEL, AVERAGE = "model/", "average/"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint and its run directory.

    If the run averages its last weights, the model's tensors are those that it validated, or with ``last`` the last weights.
    """

    folder: Path
    run_dir: Path
    manifest: Manifest
    last: bool = False

    @property
    def averaged(self) -> float:
        """The share of the average in the weights that are read, 0 without an average."""
        average = self.manifest.configuration.get("trainer", {}).get("average") or {}
        start = average.get("start")
        return 0.0 if self.last or start is None or self.step < start else float(average["weight"])

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def progress(self) -> float:
        """The fraction of training that was done, in [0, 1]."""
        steps = self.manifest.configuration.get("trainer", {}).get("steps") or self.step
        return min(1.0, self.step / max(1, steps))

    def names(self, prefix: str = MODEL) -> list[str]:
        """The names of tensors with a prefix, which is removed, in the order of the manifest."""
        return [name.removeprefix(prefix) for name in self.manifest.tensors if name.startswith(prefix)]

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor on the CPU, in its saved dtype. Raises CheckpointError if it is damaged."""
        mean = AVERAGE + name.removeprefix(MODEL)
        if name.startswith(MODEL) and self.averaged and mean in self.manifest.tensors:
            last = self._read(name)
            return torch.lerp(last.float(), self._read(mean), self.averaged).to(last.dtype)
        return self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        saved = self.manifest.tensors[name]
        whole = torch.empty(saved.shape, dtype=saved.dtype)
        for piece in saved.pieces:
            part = whole if piece.shape == saved.shape else torch.empty(piece.shape, dtype=saved.dtype)
            try:
                good = not piece.bytes or read_piece(self.folder, piece, as_bytes(part))
            except OSError as error:
                raise CheckpointError(
                    f"{self.folder / piece.file} cannot be read: {error.strerror}"
                ) from error
            if not good:
                raise CheckpointError(
                    f"{self.folder / piece.file} is damaged at {name}: choose another checkpoint with --step"
                )
            if part is not whole:
                box = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shape, strict=True))
                whole[box] = part
        return whole


def find_checkpoint(path: Path | str, step: int | None = None) -> Checkpoint:
    """Finds a checkpoint by its folder, or in a run directory: that of ``step``, or the newest valid one of this run.

    Raises ``ConfigError`` for a folder that is neither, ``CheckpointError`` if there is no valid checkpoint.
    """
    path = Path(path).absolute()
    if (path / MANIFEST).is_file():
        if step is not None:
            raise ConfigError(
                f"{path} is one checkpoint and --step is {step}, expected only one of the two: name the run directory"
            )
        return Checkpoint(path, path.parent.parent, Manifest.read(path))
    if not (path / "config.yaml").is_file() and (path / "config.json").is_file():
        raise ConfigError(
            f"{path} is a model in Hugging Face's format (it holds config.json), expected the trainer.run_dir of a run: name "
            "the run that it was exported from, or load it with transformers"
        )
    if not (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path} is neither a run directory (it holds no config.yaml) nor a checkpoint (no {MANIFEST}): expected the "
            "trainer.run_dir of a run, or a folder in its checkpoints/"
        )
    found = checkpoints_in(path / "checkpoints")
    if step is not None:
        steps = [step_of(folder) for folder in found]
        found = [folder for folder in found if step_of(folder) == step]
        if steps and not found:
            raise CheckpointError(
                f"{path} holds no checkpoint of step {step}, expected one of {', '.join(map(str, steps))}: name one of them "
                "with --step, or leave it out for the newest valid one"
            )
    problems: list[str] = []
    for folder in reversed(found):
        try:
            manifest = verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        reason = misplaced(folder, manifest, _run_of(path) if manifest.run else None)
        if reason is None:
            return Checkpoint(folder, path, manifest)
        problems.append(f"{folder.name}: {reason}")
    which = "" if step is None else f" of step {step}"
    why = f" ({problems[0]})" if problems else ""
    raise CheckpointError(f"{path} holds no valid checkpoint{which}{why}: expected at least one")


def _run_of(run_dir: Path) -> str | None:
    """The id of a run; None if its directory has none."""
    try:
        return (run_dir / "run_id").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
