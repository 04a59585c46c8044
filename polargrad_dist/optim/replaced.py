"""Notices parameters that others have replaced in the model since the optimizer was built from it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.member import Member
from polargrad_dist.optim.routing import clean_name, unwrap


class ModelWatch:
    """The model that an optimizer was built from, held weakly, and the parameters there that were frozen at that time."""

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._frozen = [weakref.ref(p) for p in model.parameters() if not p.requires_grad]

    def complaint(self, members: Sequence[Member]) -> ConfigError | None:
        """The error for parameters that were replaced in the model since construction: the optimizer would not train it.

        A module that was taken out, or a new one beside the others, is no error: the module of a parameter that has left the
        model must hold a new one that has a gradient and that the optimizer does not hold, or all must have left. Gradients
        of the old parameters tell nothing: ``model.zero_grad()`` no longer reaches them.
        """
        if (model := self._model()) is None:
            return None
        now = {p: clean_name(name) for name, p in unwrap(model).named_parameters()}
        gone = [m.entry.name for m in members if m.p.requires_grad and m.p not in now]
        if not gone:
            return None
        known = {m.p for m in members} | {p for ref in self._frozen if (p := ref()) is not None}
        new = [name for p, name in now.items() if p.grad is not None and p not in known]
        homes = {name.rpartition(".")[0] for name in gone}
        if not new or not (len(gone) == len(members) or any(_within(name, homes) for name in new)):
            return None
        which = f"{gone[0]} and {len(gone) - 1} more were" if len(gone) > 1 else f"{gone[0]} was"
        return ConfigError(
            f"{which} replaced in the model after the optimizer was built, which would train nothing there, "
            "expected the parameters of construction: build it after fully_shard, load_state_dict(assign=True) and whatever "
            "else replaces parameters; if another optimizer trains the new ones, freeze the old ones (requires_grad_(False))"
        )


def _within(name: str, homes: set[str]) -> bool:
    """Whether a parameter is held by one of these modules or lies below it; below the root, only as a parametrization."""
    owner = name.rpartition(".")[0]
    if owner in homes or ("" in homes and name.startswith("parametrizations.")):
        return True
    return any(home and name.startswith(f"{home}.") for home in homes)
