"""Saving and loading the optimizer's state, by parameter name, at any world size and under any sharding.

Every state is a DTensor over optimizer shards, or a plain tensor if each rank has all of it. Every rank has the same keys, so
`torch.distributed.checkpoint` accepts both `NamedState.named_state` and torch's ``get_optimizer_state_dict`` unchanged.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from polargrad_dist.distributed.layout import volume
from polargrad_dist.distributed.teams import local
from polargrad_dist.distributed.transport import Traffic
from polargrad_dist.errors import CheckpointError, ConfigError
from polargrad_dist.optim.checks import FIXED, check_values, fixed_part
from polargrad_dist.optim.matrix import kept_states, rule_of
from polargrad_dist.optim.member import Member
from polargrad_dist.optim.world import World

TORCH_CHECKPOINT = "torch.distributed.checkpoint."
# Keys that groups saved by earlier versions lack, with the values that they implied.
LAYOUT = {"transposed": False}


class NamedState:
    """The part of `PolarGrad` that saves and loads; expects ``_world``, ``_steps``, ``param_groups`` and ``state``."""

    _world: World
    _check_placed: Callable[[], ConfigError | None]
    _steps: int
    param_groups: list[dict[str, Any]]
    _optimizer_load_state_dict_pre_hooks: Any
    _optimizer_load_state_dict_post_hooks: Any
    # The result of consolidate_state_dict(), empty on the other ranks; None once the state has changed.
    _consolidated: dict[int, dict[str, Tensor]] | None = None
    _warned = False

    def named_state(self) -> dict[str, Tensor]:
        """``{"<parameter>.<state>": tensor}``: the tensors themselves, to be filled in place when loading.

        Sharded states are DTensors. All ranks that store a parameter have the same keys.
        """
        self._adopt()
        return {f"{m.entry.name}.{key}": value for m, key, value in self._states()}

    def load_named_state(self, saved: Mapping[str, Tensor]) -> None:
        """Copies a `named_state` of an optimizer on the same rank of the same layout into the state.

        Raises ``CheckpointError`` for a missing or misshapen entry, before anything is changed.
        """
        mine = self.named_state()
        for name, value in mine.items():
            if name not in saved:
                raise CheckpointError(
                    f"the saved optimizer state has no {name!r}, expected the state of the same model and rules"
                )
            if saved[name].shape != value.shape:
                raise CheckpointError(
                    f"the saved {name!r} has shape {tuple(saved[name].shape)}, expected {tuple(value.shape)}"
                )
        for name, value in mine.items():
            local(value).copy_(local(saved[name]))

    def full_state_dict(self) -> dict[str, Any]:
        """A state dict in torch's format with whole tensors on every rank's CPU; loads under any layout. A collective."""
        self._adopt()
        return {"state": self._gathered(True), "param_groups": self._packed()["param_groups"]}

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Assembles the whole state in host memory of rank ``to``, whose ``state_dict()`` then returns it.

        It follows the protocol of torch's ``ZeroRedundancyOptimizer``: all ranks call this before one of them saves. ``to``
        counts the ranks of the optimizer. Each state takes one all-gather. The result is dropped at the next step or load;
        the other ranks' ``state_dict()`` still returns their own part. On one rank there is nothing to do.

        Raises ``CheckpointError``, on all ranks, if rank ``to`` stores no part of some parameter.
        """
        self._adopt()
        if self._world.agreement is None:
            return
        ranks = self._world.plan.ranks or ()
        if not (isinstance(to, int) and 0 <= to < len(ranks)):
            raise CheckpointError(f"to is {to!r}, expected a rank in [0, {len(ranks)})")
        for e in self._world.entries:
            if ranks[to] not in e.ranks:
                raise CheckpointError(
                    f"rank {to} stores no part of {e.name}, expected a part of every parameter on the rank that gets the "
                    "whole state: save with torch.distributed.checkpoint and named_state()"
                )
        self._consolidated = self._gathered(ranks[to] == self._world.rank)

    def _gathered(self, keep: bool) -> dict[int, dict[str, Tensor]]:
        """Every state, whole, on the CPU, by parameter number; empty if this rank does not ``keep`` it. A collective."""
        ids = {
            n: i
            for g in self._packed()["param_groups"]
            for n, i in zip(g["param_names"], g["params"], strict=True)
        }
        out: dict[int, dict[str, Tensor]] = {}
        for m, key, value in self._states():
            whole = self._whole(m, key, value).detach()
            if keep:
                out.setdefault(ids[m.entry.name], {})[key] = whole.cpu().clone()
        return out

    def _packed(self) -> dict[str, Any]:
        """Torch's own state dict of this rank's part."""
        return super().state_dict()  # type: ignore[misc]

    def _whole(self, m: Member, key: str, value: Tensor) -> Tensor:
        """A whole state, by one collective; torch's ``full_tensor`` takes one per mesh dimension, and warns about it."""
        if not isinstance(value, DTensor):
            return value
        if key not in m.elementwise:
            return value.full_tensor()
        here = value.to_local().to(self._world.travel.device)
        out, boxes = here.new_empty(value.shape), m.entry.layout.shards
        each = math.prod(value.shape[len(m.entry.shape) :])
        flat = here.new_zeros(max(map(volume, boxes)) * each)
        flat[: here.numel()] = here.reshape(-1)
        assert m.team.group is not None
        for place, part in zip(m.team.order, Traffic().all_gather(flat, m.team.group).wait(), strict=True):
            where = out[tuple(slice(*cut) for cut in boxes[place])]
            where.copy_(part[: where.numel()].view(where.shape))
        return out

    def state_dict(self) -> dict[str, Any]:
        """A state dict in torch's format: the whole state after `consolidate_state_dict`, else this rank's part.

        A rank's part records its rank and loads only there. On several ranks it warns once, unless
        `torch.distributed.checkpoint` asks, which collects the parts itself.
        """
        self._adopt()
        packed = self._packed()
        if not any(isinstance(value, DTensor) for _, _, value in self._states()):
            # Whole on every rank.
            return packed
        if asked_by_torch_checkpoint():
            # torch.distributed.checkpoint collects each rank's part of a DTensor itself.
            return packed
        if self._consolidated:
            return packed | {"state": {i: dict(states) for i, states in self._consolidated.items()}}
        if self._consolidated is None and self._steps and not self._warned:
            self._warned = True
            warnings.warn(
                "state_dict() holds only this rank's part of the optimizer state, and a checkpoint of one rank loses the "
                "others' parts: call consolidate_state_dict() on all ranks before rank 0 saves state_dict(), or save "
                "full_state_dict() (docs/integrations.md has Accelerate, Transformers and Lightning)",
                stacklevel=2,
            )
        return packed | {"place": self._place_of_rank()}

    def _adopt(self) -> None:
        """Adopts parameters that were replaced before the first step, and creates their state."""
        if (problem := self._check_placed()) is not None:
            raise CheckpointError(str(problem))

    def _place_of_rank(self) -> list[Any]:
        """What this rank's part of the state depends on: its rank and the layouts."""
        return [[m.team.place, *m.entry.layout.sizes] for m in self._world.members]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a `full_state_dict` of any world size, or the ``state_dict`` of the same rank of the same world.

        Parameters are matched by name. All ranks must call it. Raises ``CheckpointError``, on all ranks and before anything
        is changed, if parameters or shapes differ, or if the state is another rank's part.
        """
        try:
            self._adopt()
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                changed = hook(self, state_dict := dict(state_dict))
                state_dict = state_dict if changed is None else changed
            found, problem = self._matched(state_dict), None
        except CheckpointError as error:
            found, problem = None, error
        # Any error of a damaged dict must be reported: the other ranks wait for this rank's answer.
        except Exception as error:
            found = None
            problem = CheckpointError(
                f"this is not the state of a PolarGrad ({type(error).__name__}: {error}), expected one of state_dict() or "
                "full_state_dict()"
            )
            problem.__cause__ = error
        if self._world.agreement is not None:
            someone = int(
                self._world.agreement.largest(torch.tensor([int(problem is not None)], device="cpu"))
            )
            if someone and problem is None:
                problem = CheckpointError(
                    "another rank could not load its optimizer state, so no rank loads: see its error"
                )
        if problem is not None:
            raise problem
        assert found is not None
        self._consolidated = None
        parts, groups = found
        for mine, theirs in parts:
            mine.copy_(theirs)
        for group in self.param_groups:
            saved = groups[tuple(group["param_names"])]
            group.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _matched(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[tuple, dict[str, Any]]]:
        """(state here, its new value) for every state, and the saved groups by their names."""
        try:
            pairs = [
                p for g in state_dict["param_groups"] for p in zip(g["params"], g["param_names"], strict=True)
            ]
            names = dict(pairs)
            saved = {names[i]: state for i, state in state_dict["state"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            lacks = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"this is not the state of a PolarGrad ({lacks}), expected one of state_dict() or full_state_dict()"
            ) from error
        place = state_dict.get("place")
        if place is not None and place != self._place_of_rank():
            raise CheckpointError(
                "this optimizer state is the part of another rank or of another layout, expected this rank's own: save with "
                "full_state_dict() or named_state(), which do not depend on the rank"
            )
        groups = {tuple(g["param_names"]): LAYOUT | _renamed(g) for g in state_dict["param_groups"]}
        if len(groups) > len(self.param_groups):
            raise CheckpointError(
                f"the saved optimizer has {len(groups)} parameter groups, expected {len(self.param_groups)}: build this one "
                "with the same groups"
            )
        for group in self.param_groups:
            self._compare(group, groups)
        parts = []
        for m, key, value in self._states():
            name = m.entry.name
            old = "residual" if key == "low_bits" and "residual" in saved.get(name, {}) else key
            if name not in saved or old not in saved[name]:
                raise CheckpointError(
                    f"the saved optimizer state has no {key!r} of {name!r}, expected the same model and rules"
                )
            theirs = saved[name][old]
            # Until version 0.1 the low bits had this name, as int16.
            if old == "residual":
                theirs = theirs.view(torch.uint8).view(*theirs.shape, 2)
            parts.append((local(value), _part(m, key, theirs, value)))
        return parts, groups

    @staticmethod
    def _compare(group: dict[str, Any], groups: dict[tuple, dict[str, Any]]) -> None:
        """Raises ``CheckpointError`` if a group was saved with other rules, or not at all."""
        first = group["param_names"][0]
        if tuple(group["param_names"]) not in groups:
            raise CheckpointError(
                f"the saved optimizer has no group that starts with {first!r}, expected the same groups"
            )
        theirs = groups[tuple(group["param_names"])]
        try:
            check_values(group | theirs, f"the saved group of {first!r}")
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        scales = group["scale"], theirs.get("scale", group["scale"])
        rules: list[tuple[str, Any, Any]] = list(
            zip(FIXED, fixed_part(group), fixed_part(group | theirs), strict=True)
        )
        if kept_states(group).keys() != kept_states(group | theirs).keys():
            rules.append(("scale", *scales))
        if rule_of(group).pauses(group) != rule_of(group).pauses(group | theirs):
            here, there = ([g[key] for key in ("scale", "control", "floor")] for g in (group, group | theirs))
            rules.append(("scale, control, floor", here, there))
        for key, here, there in rules:
            if here != there:
                raise CheckpointError(
                    f"the saved optimizer has {key} {there!r} for the group of {first!r}, expected "
                    f"{here!r}: build this one with the same rules"
                )

    def _states(self) -> Iterator[tuple[Member, str, Tensor]]:
        for m in self._world.members:
            for key, value in m.state.items():
                yield m, key, value


def _renamed(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group with current keys: until version 0.2 ``control`` was ``cautious``, true or false."""
    if "cautious" not in group:
        return group
    rest = {key: value for key, value in group.items() if key != "cautious"}
    return rest | {"control": "cautious" if group["cautious"] else "decay"}


def _part(m: Member, key: str, saved: Tensor, mine: Tensor) -> Tensor:
    """This rank's part of a saved state: its block of a whole one, or a saved part unchanged.

    A DTensor is this rank's own part: torch passes such states.
    """
    here = local(mine)
    if isinstance(saved, DTensor):
        part = saved.to_local()
    elif isinstance(mine, DTensor) and saved.shape == mine.shape:
        if key in m.rule.states(m.group) or key == "low_bits":
            part = saved[tuple(slice(*cut) for cut in m.entry.layout.shards[m.team.place])]
        # State per matrix, in the order in which matrices were assigned.
        else:
            first = (
                dist.get_rank(m.team.group) * -(-len(saved) // m.entry.layout.world) if m.team.group else 0
            )
            part = saved[first : first + len(here)]
    else:
        part = saved
    if part.shape != here.shape:
        raise CheckpointError(
            f"the saved {key!r} of {m.entry.name!r} has shape {tuple(saved.shape)}, expected {tuple(mine.shape)}: save "
            "with full_state_dict() or named_state(), which do not depend on the rank"
        )
    return part


def asked_by_torch_checkpoint() -> bool:
    """Whether `torch.distributed.checkpoint` is the caller, through any wrapper."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(TORCH_CHECKPOINT):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
