"""Counts skipped steps, refuses weights that are not finite, and says from which checkpoint to go on."""

from __future__ import annotations

import logging
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
    """Stands between a run and its checkpoints; every method is called on all ranks.

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
        """A step reached the weights; ``loss`` is its mean over all ranks."""
        self.progress.skipped_in_a_row = 0
        self.progress.recent = [*self.progress.recent, loss][-self.safety.spike_window :]

    def skip(self, step: int, sample: int, reason: str, bad: list[str] | None, own_loss: float) -> None:
        """A step did not reach the weights.

        bad: names whose gradients were not finite on this rank; None for a spike, which has no culprit. sample: the first
        that the step saw. Raises ``TrainingError`` after too many in a row, and where the weights themselves are broken.
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
            raise TrainingError(
                f"{progress.skipped_in_a_row} steps in a row were skipped ({reason}{where}), trainer.safety.max_skipped "
                f"allows fewer; {self.way_back(sample)}"
            )

    def refuse_poisoned(self, tensors: Tensors, what: str, sample: int | None = None) -> None:
        """Raises ``TrainingError`` on all ranks when weights or optimizer state of one are not finite."""
        if (where := poisoned(self.world, tensors)) is not None:
            raise TrainingError(
                f"{what}: {where} is not finite, which no later step can repair; {self.way_back(sample)}"
            )

    def way_back(self, sample: int | None = None) -> str:
        """From which checkpoint to go on, and how; ``sample`` is where the data are suspect, by default the next one."""
        self.store.wait()
        step, change = self.store.last_saved, "lower the learning rates"
        data = f"or look at the data from sample {self.progress.sample if sample is None else sample} on"
        if step is None:
            return f"no checkpoint was saved yet: {change}, {data}, and start again in a new trainer.run_dir"
        path = self.store.folder / folder_name(step)
        return (
            f"the checkpoint of step {step} is intact: {change} ({data}) and go on from it with --trainer.checkpoint.resume "
            f"{path} --trainer.allow_changes true; the command unchanged would end here again"
        )
