"""Look-ahead and weight averages around the optimizer's steps of a placed model, and their tensors in checkpoints."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from polargrad_dist.errors import CheckpointError
from polargrad_dist.optim.around import Average, EmaNesterov
from polargrad_dist.optim.names import cleaner
from polargrad_dist.trainer.checkpoint.manifest import Manifest
from polargrad_dist.trainer.config import TrainerConfig


class Wrapped:
    """EMA-Nesterov and the average of the last weights, each if configured."""

    def __init__(self, model: nn.Module, config: TrainerConfig):
        # Taken now, while parameters are shards under FSDP2: during a forward pass the modules hold whole ones.
        clean = cleaner(model)
        parameters = {clean(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.model = model
        self.lookahead = EmaNesterov(parameters, config.lookahead) if config.lookahead.beta else None
        self.average = Average(parameters, config.average) if config.average.start is not None else None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint besides weights and optimizer state."""
        moves = self.lookahead.moves if self.lookahead else {}
        mean = self.average.mean if self.average else {}
        return {f"lookahead/{k}": v for k, v in moves.items()} | {f"average/{k}": v for k, v in mean.items()}

    def check_saved(self, path: Path) -> None:
        """Raises ``CheckpointError`` for a checkpoint without what is configured: it cannot begin in mid-run."""
        manifest = Manifest.read(path)
        saved = {name.partition("/")[0] for name in manifest.tensors}
        for kind, key in (("lookahead", "trainer.lookahead.beta"), ("average", "trainer.average.start")):
            if any(name.startswith(f"{kind}/") for name in self.tensors()) and kind not in saved:
                raise CheckpointError(
                    f"{path} was saved without {key}, which cannot begin in the middle of a run: leave it out, or start anew "
                    "in another trainer.run_dir"
                )
        if self.average is not None:
            begins = self.average.config.start or 0
            before = manifest.configuration.get("trainer", {}).get("average", {}).get("start")
            if begins <= manifest.step and before is not None and before > manifest.step:
                raise CheckpointError(
                    f"{path} of step {manifest.step} was saved with trainer.average.start {before}, "
                    f"before its average began, which cannot begin at {begins}: set it to a later step than {manifest.step}"
                )

    def before(self, step: int, factor: float) -> None:
        """Called before the gradients of ``step``, counted from 0."""
        if self.lookahead is not None:
            self._reshard()
            self.lookahead.look_ahead(step, factor)

    def after(self, step: int) -> None:
        """Called after the optimizer's step number ``step``, counted from 1."""
        if self.lookahead is not None:
            self.lookahead.stepped()
        if self.average is not None:
            self.average.stepped(step)

    def undo(self, step: int) -> None:
        """Called instead of `after` if the step is skipped."""
        if self.lookahead is not None:
            self.lookahead.undo()
        if self.average is not None:
            self.average.stepped(step)

    def used(self, step: int) -> AbstractContextManager[None]:
        """Replaces the last weights by those that are validated, within the context."""
        return nullcontext() if self.average is None else self.average.used(step, self._reshard)

    def _reshard(self) -> None:
        """Frees whole parameters that FSDP2 kept from the last forward pass: changes of the shards would not reach them."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
