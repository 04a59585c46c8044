"""Saving and loading the optimizer's state, by parameter name, at any world size and under any strategy.

`NamedState.named_state` is for checkpoints that many ranks write together (each gives what it holds);
`full_state_dict` is for one file; ``state_dict`` keeps torch's form and holds what this rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from polargrad_dist.distributed.plan import chunk
from polargrad_dist.errors import CheckpointError
from polargrad_dist.optim.update import Work, local


class NamedState:
    """The part of `PolarGrad` that saves and loads; expects ``_works``, ``param_groups`` and ``state``."""

    _works: list[Work]
    param_groups: list[dict[str, Any]]

    def named_state(self) -> dict[str, torch.Tensor]:
        """``{"<parameter>.<state>": tensor}`` of what this rank holds: the tensors themselves, DTensors where sharded.

        All ranks' dicts together hold every element, whoever owns it; elsewhere than at its owner a matrix has no entry.
        Fill them in place to load.
        """
        return {
            f"{work.entry.name}.{key}": value
            for work, key, value in self._states()
            if isinstance(value, DTensor) or value.numel()
        }

    def load_named_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Copies into the state what `named_state` of an optimizer at the same place gave.

        Raises ``CheckpointError`` for a missing or misshapen entry, before anything is changed.
        """
        mine = self.named_state()
        for name, value in mine.items():
            if name not in saved:
                raise CheckpointError(
                    f"the saved optimizer state has no {name!r}, expected the state of the same model"
                )
            if saved[name].shape != value.shape:
                raise CheckpointError(
                    f"the saved {name!r} has shape {tuple(saved[name].shape)}, expected {tuple(value.shape)}"
                )
        for name, value in mine.items():
            local(value).copy_(local(saved[name]))

    def full_state_dict(self) -> dict[str, Any]:
        """Torch's form of state dict with whole tensors, on the CPU of every rank; loads anywhere. A collective."""
        out: dict[str, Any] = {"state": {}, "param_groups": self.state_dict()["param_groups"]}  # type: ignore[attr-defined]
        ids = {n: i for g in out["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
        for work, key, value in self._states():
            out["state"].setdefault(ids[work.entry.name], {})[key] = _gather(work, key, value)
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a `full_state_dict` of any world size, or the ``state_dict`` of the same rank of the same world.

        Parameters are matched by name. Raises ``CheckpointError`` when they differ, or when the state of a matrix that
        this rank owns was saved by a rank that did not.
        """
        names = {
            i: n
            for g in state_dict["param_groups"]
            for i, n in zip(g["params"], g["param_names"], strict=True)
        }
        saved = {names[i]: state for i, state in state_dict["state"].items()}
        parts = []
        for work, key, value in self._states():
            name = work.entry.name
            if name not in saved or key not in saved[name]:
                raise CheckpointError(
                    f"the saved optimizer state has no {key!r} of {name!r}, expected the same model and rules"
                )
            parts.append((local(value), _part(work, key, saved[name][key], local(value))))
        groups = {tuple(g["param_names"]): g for g in state_dict["param_groups"]}
        for group in self.param_groups:
            if tuple(group["param_names"]) not in groups:
                raise CheckpointError(
                    f"the saved optimizer has no group that starts with {group['param_names'][0]!r}, expected the same groups"
                )
        for mine, theirs in parts:
            mine.copy_(theirs)
        for group in self.param_groups:
            theirs = groups[tuple(group["param_names"])]
            group.update({k: v for k, v in theirs.items() if k not in ("params", "param_names")})

    def _states(self) -> Iterator[tuple[Work, str, torch.Tensor]]:
        for work in self._works:
            for key, value in work.state.items():
                yield work, key, value


def _rows(work: Work, key: str) -> tuple[int, int]:
    """The range of the parameter's first dimension of which this rank holds a state."""
    entry, grid = work.entry, work.grid
    first, last = chunk(entry.shape[0], grid.shards, grid.shard)
    if key == "momentum" and entry.kind == "rows":
        low, high = grid.my_rows(last - first)
        return first + low, first + high
    if key == "momentum" and work.owner[0] != grid.replica:
        return first, first
    return first, last


def _part(work: Work, key: str, saved: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """What belongs to this rank of a saved state, whole or already cut."""
    if isinstance(saved, DTensor) or saved.shape == mine.shape != work.entry.shape:
        return local(saved)
    if tuple(saved.shape) == work.entry.shape and mine.ndim:
        first, last = _rows(work, key)
        return saved[first:last].reshape(mine.shape)
    if saved.shape == mine.shape:
        return saved
    raise CheckpointError(
        f"the saved {key!r} of {work.entry.name!r} has shape {tuple(saved.shape)}, expected {work.entry.shape} or this "
        f"rank's part {tuple(mine.shape)}: save with full_state_dict() or named_state(), which do not depend on the rank"
    )


def _gather(work: Work, key: str, value: torch.Tensor) -> torch.Tensor:
    """A state put together from all ranks: each adds the rows that it alone answers for to zeros."""
    if value.ndim == 0 or not work.grid.groups:
        return local(value).detach().cpu().clone().view(work.entry.shape if value.ndim else ())
    mine = local(value)
    wide = mine.dtype if mine.dtype.is_floating_point else torch.int32  # gloo knows no int16
    whole = torch.zeros(work.entry.shape, dtype=wide, device=mine.device)
    first, last = _rows(work, key)
    if first < last and (key == "momentum" or work.grid.replica == 0):
        whole[first:last] = mine.view(whole[first:last].shape)
    for group in work.grid.groups:
        dist.all_reduce(whole, group=group)
    return whole.to(mine.dtype).cpu()
