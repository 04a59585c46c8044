"""What the loop does around its optimizer's steps: look-ahead and averages of a placed model's weights, and their tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from polargrad_dist.errors import CheckpointError
from polargrad_dist.optim.around import Average, EmaNesterov
from polargrad_dist.optim.routing import clean_name
from polargrad_dist.trainer.checkpoint.manifest import Manifest
from polargrad_dist.trainer.config import TrainerConfig


class Wrapped:
    """EMA-Nesterov and the average of the last weights, each where the configuration asks for it."""

    def __init__(self, model: nn.Module, config: TrainerConfig):
        # As they are now, each rank's shard under FSDP2: during a forward pass the modules hold whole ones.
        parameters = {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.model = model
        self.lookahead = EmaNesterov(parameters, config.lookahead) if config.lookahead.beta else None
        self.average = Average(parameters, config.average) if config.average.start is not None else None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside weights and optimizer."""
        moves = self.lookahead.moves if self.lookahead else {}
        mean = self.average.mean if self.average else {}
        return {f"lookahead/{k}": v for k, v in moves.items()} | {f"average/{k}": v for k, v in mean.items()}

    def check_saved(self, path: Path) -> None:
        """Raises ``CheckpointError`` for a checkpoint without what is configured here, which cannot begin in the middle."""
        saved = {name.partition("/")[0] for name in Manifest.read(path).tensors}
        for kind, key in (("lookahead", "trainer.lookahead.beta"), ("average", "trainer.average.start")):
            if any(name.startswith(f"{kind}/") for name in self.tensors()) and kind not in saved:
                raise CheckpointError(
                    f"{path} was saved without {key}, which cannot begin in the middle of a run: leave it out, or start anew "
                    "in another trainer.run_dir"
                )

    def before(self, step: int, factor: float) -> None:
        """Before the gradients of ``step``, counted from 0."""
        if self.lookahead is not None:
            self._reshard()
            self.lookahead.look_ahead(step, factor)

    def after(self, step: int) -> None:
        """After the optimizer's step, of which there are ``step`` now."""
        if self.lookahead is not None:
            self.lookahead.stepped()
        if self.average is not None:
            self.average.stepped(step)

    def undo(self, step: int) -> None:
        """Instead of `after` where the step is skipped."""
        if self.lookahead is not None:
            self.lookahead.undo()
        if self.average is not None:
            self.average.stepped(step)

    def used(self, step: int) -> AbstractContextManager[None]:
        """The weights that are validated, in place of the last ones."""
        return nullcontext() if self.average is None else self.average.used(step, self._reshard)

    def _reshard(self) -> None:
        """Frees whole copies that FSDP2 kept from the last forward pass, which would hide what happens to the shards."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
