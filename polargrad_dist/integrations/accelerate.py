"""Accelerate: ``save_state`` writes what rank 0's optimizer returns, so the state is consolidated there first."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import PolarGrad


def consolidate_before_save(accelerator: Accelerator, *optimizers: Any) -> Any:
    """Has ``accelerator.save_state`` put the state of these optimizers together before it saves; call it after ``prepare``.

    ``load_state`` then resumes on any number of processes. Under FSDP2 nothing is done, since Accelerate saves with
    `torch.distributed.checkpoint`, which takes the parts as they are. Returns the hook's handle, with ``remove()``.

    Raises ``ConfigError`` for an optimizer that is no `PolarGrad`, prepared or not.
    """
    if not optimizers:
        raise ConfigError(
            "consolidate_before_save was given no optimizer, expected those that prepare returned"
        )
    inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
    for optimizer in inner:
        if not isinstance(optimizer, PolarGrad):
            raise ConfigError(
                f"consolidate_before_save was given a {type(optimizer).__name__}, expected a PolarGrad: leave it out, other "
                "optimizers save as they are"
            )

    def consolidate(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if accelerator.distributed_type != DistributedType.FSDP:
            for optimizer in inner:
                optimizer.consolidate_state_dict()

    return accelerator.register_save_state_pre_hook(consolidate)
