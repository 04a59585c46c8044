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
from polargrad_dist.distributed.transport import Agreement
from polargrad_dist.errors import CheckpointError, ConfigError
from polargrad_dist.optim.checks import FIXED, check_values, fixed_part
from polargrad_dist.optim.update import Work, local


class NamedState:
    """The part of `PolarGrad` that saves and loads; expects ``_works``, ``param_groups`` and ``state``."""

    _works: list[Work]
    _agreement: Agreement | None
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
        out: dict[str, Any] = {"state": {}, "param_groups": self.state_dict()["param_groups"]}
        ids = {n: i for g in out["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
        for work, key, value in self._states():
            out["state"].setdefault(ids[work.entry.name], {})[key] = _gather(work, key, value)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Torch's form, of what this rank holds; it says whose it is, and loads only there (see `full_state_dict`)."""
        return super().state_dict() | {"place": self._place()}  # type: ignore[misc]

    def _place(self) -> list[list[Any]]:
        """Where this rank stands, and what it owns: what its own part of the state depends on."""
        grids = {w.grid: None for w in self._works}
        stands = [[g.replicas, g.shards, g.replica, g.shard] for g in grids]
        return [*stands, [w.entry.owner for w in self._works]]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a `full_state_dict` of any world size, or the ``state_dict`` of the same rank of the same world.

        Parameters are matched by name. On several ranks all must call it. Raises ``CheckpointError``, on all of them and
        before anything is changed, when parameters or shapes differ, or when the state is another rank's.
        """
        try:
            found, problem = self._matched(state_dict), None
        except CheckpointError as error:
            found, problem = None, error
        except Exception as error:  # whatever a damaged dict holds: the other ranks wait for this one's word
            found = None
            problem = CheckpointError(f"this is no state of a PolarGrad ({type(error).__name__}: {error})")
        if self._agreement is not None:
            someone = int(self._agreement.largest(torch.tensor([int(problem is not None)])))
            if someone and problem is None:
                problem = CheckpointError(
                    "another rank could not load its optimizer state, so no rank loads: see its error"
                )
        if problem is not None:
            raise problem
        assert found is not None
        parts, groups = found
        for mine, theirs in parts:
            mine.copy_(theirs)
        for group in self.param_groups:
            saved = groups[tuple(group["param_names"])]
            group.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})

    def _matched(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict[tuple, dict[str, Any]]]:
        """(state here, what it becomes) for every state, and the saved groups by their names."""
        try:
            pairs = [
                p for g in state_dict["param_groups"] for p in zip(g["params"], g["param_names"], strict=True)
            ]
            names = dict(pairs)
            saved = {names[i]: state for i, state in state_dict["state"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            lacks = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"this is no state of a PolarGrad ({lacks}), expected one of state_dict() or full_state_dict()"
            ) from error
        place = state_dict.get("place")
        if place is not None and place != self._place():
            raise CheckpointError(
                "this optimizer state holds one rank's part, and another rank's or another placement's: save with "
                "full_state_dict() or named_state(), which do not depend on the rank"
            )
        parts = []
        for work, key, value in self._states():
            name = work.entry.name
            if name not in saved or key not in saved[name]:
                raise CheckpointError(
                    f"the saved optimizer state has no {key!r} of {name!r}, expected the same model and rules"
                )
            parts.append(
                (local(value), _part(work, key, saved[name][key], local(value), whole=place is None))
            )
        groups = {tuple(g["param_names"]): g for g in state_dict["param_groups"]}
        if len(groups) > len(self.param_groups):
            raise CheckpointError(
                f"the saved optimizer has {len(groups)} parameter groups, expected {len(self.param_groups)}: build this one "
                "with the same groups"
            )
        for group in self.param_groups:
            if tuple(group["param_names"]) not in groups:
                raise CheckpointError(
                    f"the saved optimizer has no group that starts with {group['param_names'][0]!r}, expected the same groups"
                )
            theirs = groups[tuple(group["param_names"])]
            try:
                check_values(group | theirs, f"the saved group of {group['param_names'][0]!r}")
            except ConfigError as error:
                raise CheckpointError(str(error)) from error
            for key, here, there in zip(FIXED, fixed_part(group), fixed_part(group | theirs), strict=True):
                if here != there:
                    raise CheckpointError(
                        f"the saved optimizer has {key} {there!r} for the group of {group['param_names'][0]!r}, expected "
                        f"{here!r}: build this one with the same rules"
                    )
        return parts, groups

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


def _part(work: Work, key: str, saved: torch.Tensor, mine: torch.Tensor, whole: bool) -> torch.Tensor:
    """What belongs to this rank of a saved state: a stretch of a whole one, or this rank's own part as it is.

    A DTensor is the rank's own part also where nothing says so: `torch.distributed.checkpoint` hands such states over.
    """
    if isinstance(saved, DTensor) or not whole:
        part = local(saved)
    elif mine.ndim and tuple(saved.shape) == work.entry.shape:
        first, last = _rows(work, key)
        part = saved[first:last].reshape(mine.shape)
    else:
        part = saved
    if part.shape != mine.shape:
        raise CheckpointError(
            f"the saved {key!r} of {work.entry.name!r} has shape {tuple(saved.shape)}, expected {work.entry.shape}: save "
            "with full_state_dict() or named_state(), which do not depend on the rank"
        )
    return part


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
