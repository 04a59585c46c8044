"""Notices parameters that others have replaced, unfrozen or added in the model since the optimizer was built from it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.member import Member
from polargrad_dist.optim.names import cleaner, unwrap


class ModelWatch:
    """The model that an optimizer was built from, held weakly, and the parameters there that were frozen at that time."""

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._frozen = [weakref.ref(p) for p in model.parameters() if not p.requires_grad]
        self._warned = False

    def complaint(self, members: Sequence[Member]) -> ConfigError | None:
        """The error for parameters that were replaced in the model since construction: the optimizer would not train it.

        A module that was taken out, or a new one beside the others, is no error: the module of a parameter that has left the
        model must hold a new one that has a gradient and that the optimizer does not hold, or all must have left. Gradients
        of the old parameters tell nothing: ``model.zero_grad()`` no longer reaches them. Parameters of the model that were
        unfrozen or added later and have gradients are no error either, since another optimizer may train them: one warning.
        """
        if (model := self._model()) is None:
            return None
        model = unwrap(model)
        clean = cleaner(model)
        now = {p: clean(name) for name, p in model.named_parameters()}
        held = {m.p for m in members}
        gone = [m.entry.name for m in members if m.p.requires_grad and m.p not in now]
        others = {p: name for p, name in now.items() if p.grad is not None and p not in held}
        frozen = {p for ref in self._frozen if (p := ref()) is not None}
        new = [name for p, name in others.items() if p not in frozen]
        homes = {name.rpartition(".")[0] for name in gone}
        if (
            not gone
            or not new
            or not (len(gone) == len(members) or any(_within(name, homes) for name in new))
        ):
            self._warn(list(others.values()))
            return None
        which = f"{gone[0]} and {len(gone) - 1} more were" if len(gone) > 1 else f"{gone[0]} was"
        return ConfigError(
            f"{which} replaced in the model after the optimizer was built, which would train nothing there, "
            "expected the parameters of construction: build it after fully_shard, load_state_dict(assign=True) and whatever "
            "else replaces parameters; if another optimizer trains the new ones, freeze the old ones (requires_grad_(False))"
        )

    def _warn(self, names: list[str]) -> None:
        if not names or self._warned:
            return
        self._warned = True
        which = f"{names[0]} and {len(names) - 1} more have" if len(names) > 1 else f"{names[0]} has"
        warnings.warn(
            f"{which} a gradient but was frozen or missing in the model when the optimizer was built, so this optimizer does "
            "not train it: pass it to add_param_group, unless another optimizer trains it",
            stacklevel=2,
        )


def _within(name: str, homes: set[str]) -> bool:
    """Whether a parameter is held by one of these modules or lies below it; below the root, only as a parametrization."""
    owner = name.rpartition(".")[0]
    if owner in homes or ("" in homes and name.startswith("parametrizations.")):
        return True
    return any(home and name.startswith(f"{home}.") for home in homes)
