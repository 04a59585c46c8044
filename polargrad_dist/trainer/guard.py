"""Counts skipped steps, refuses non-finite weights, and names the checkpoint to resume from."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable

import torch

from polargrad_dist.errors import TrainingError
from polargrad_dist.trainer.checkpoint import CheckpointStore, folder_name
from polargrad_dist.trainer.config import SafetyConfig
from polargrad_dist.trainer.health import culprits, poisoned
from polargrad_dist.trainer.interfaces import Progress
from polargrad_dist.trainer.world import World

log = logging.getLogger("polargrad_dist.trainer")
Tensors = dict[str, torch.Tensor]


class Guard:
    """Keeps non-finite weights out of the checkpoints; every method is called on all ranks.

    tensors: everything that a checkpoint of this moment would hold, as this rank holds it.
    """

    def __init__(
        self,
        safety: SafetyConfig,
        world: World,
        progress: Progress,
        store: CheckpointStore,
        tensors: Callable[[], Tensors],
    ):
        self.safety, self.world, self.progress = safety, world, progress
        self.store, self.tensors = store, tensors

    def made(self, loss: float) -> None:
        """Records a step that was applied; ``loss`` is its mean over all ranks."""
        self.progress.skipped_in_a_row = 0
        self.progress.recent = [*self.progress.recent, loss][-self.safety.spike_window :]

    def skip(self, step: int, sample: int, reason: str, bad: list[str] | None, own_loss: float) -> None:
        """Records a step that was skipped.

        bad: names of the parameters with non-finite gradients on this rank; None for a spike of the loss. sample: index of
        the step's first sample. Raises ``TrainingError`` after too many skipped steps in a row, and for non-finite weights.
        """
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        where = ""
        if bad is not None:
            self.refuse_poisoned(self.tensors(), f"step {step} cannot be made", sample)
            where = culprits(self.world, bad, own_loss)
        log.warning("step %d is skipped: %s%s", step, reason, where)
        if progress.skipped_in_a_row >= self.safety.max_skipped:
            many = f"{progress.skipped_in_a_row} steps in a row were"
            raise TrainingError(
                f"{'1 step was' if progress.skipped_in_a_row == 1 else many} skipped ({reason}{where}), "
                f"trainer.safety.max_skipped allows fewer; {self.way_back(sample)}"
            )

    def refuse_poisoned(self, tensors: Tensors, what: str, sample: int | None = None) -> None:
        """Raises ``TrainingError`` on all ranks if weights or optimizer state are not finite on one of them."""
        if (where := poisoned(self.world, tensors)) is not None:
            raise TrainingError(
                f"{what}: {where} is not finite, which no later step can repair; {self.way_back(sample)}"
            )

    def way_back(self, sample: int | None = None) -> str:
        """How to go on, and from which checkpoint; ``sample`` is where to look at the data, by default the next sample."""
        self.store.wait()
        step, change = self.store.last_saved, "lower the learning rates"
        data = f"or look at the data from sample {self.progress.sample if sample is None else sample} on"
        if step is None:
            return f"no checkpoint was saved yet: {change}, {data}, and start again in a new trainer.run_dir"
        path = self.store.folder / folder_name(step)
        return (
            f"the checkpoint of step {step} is intact: {change} ({data}) and go on from it with --trainer.checkpoint.resume "
            f"{shlex.quote(str(path))} --trainer.allow_changes true; the command unchanged would end here again"
        )
