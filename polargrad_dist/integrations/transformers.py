"""Transformers: ``Trainer`` saves what rank 0's optimizer returns, so a callback consolidates the state there first."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import PolarGrad


class ConsolidateBeforeSave(TrainerCallback):
    """``Trainer(…, callbacks=[ConsolidateBeforeSave()])``: checkpoints hold the whole state of a `PolarGrad`.

    Every checkpoint then resumes on any number of processes. Under FSDP2 nothing is done, since the Trainer saves with
    `torch.distributed.checkpoint`. With ``save_strategy="best"`` the state is put together at every evaluation. Callbacks
    that ask for a save have to come before this one.

    Raises ``ConfigError`` when training begins with another optimizer, or with ``enable_jit_checkpoint``, which saves on one
    rank's signal while the others compute.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrapped(kwargs["optimizer"])
        if not isinstance(optimizer, PolarGrad):
            raise ConfigError(
                f"ConsolidateBeforeSave found a {type(optimizer).__name__}, expected a PolarGrad: give the Trainer "
                'optimizer_cls_and_kwargs=(PolarGrad, {"model": model}), or leave this callback out'
            )
        if getattr(args, "enable_jit_checkpoint", False) and optimizer.agreement is not None:
            raise ConfigError(
                "enable_jit_checkpoint is true on several processes, whose optimizer state could not be put together at a "
                "signal that reaches each at another moment: set it to false and use save_steps"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._consolidate(args, control, kwargs["optimizer"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._consolidate(args, control, kwargs["optimizer"])

    @staticmethod
    def _consolidate(args: TrainingArguments, control: TrainerControl, optimizer: Any) -> None:
        best = args.save_strategy == "best" and control.should_evaluate
        sharded = getattr(AcceleratorState(), "fsdp_plugin", None) is not None
        if (control.should_save or best) and not args.save_only_model and not sharded:
            unwrapped(optimizer).consolidate_state_dict()


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
