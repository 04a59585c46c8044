"""The family's names: each builds a `PolarGrad` with the name's defaults; for a model, its hidden matrices get them.

The names of the paper have its scale, the nuclear norm of the momentum (``scale="nuclear"``), with which the best rate
differs by orders of magnitude between models: their default of 1e-3 is where a sweep begins, not a rate that was found good.
``PolarGrad(model)`` has other rules, and rates that were checked: Muon at 0.02 for hidden matrices, ``nuclear_relative`` at
1.0 for embeddings and heads. A name that is given another ``scale`` or ``algorithm`` needs an ``lr`` too.

Sources: algorithms C.1-C.4 of Lau, Long, Su (2025); Muon of Jordan et al. (2024) and Liu et al. (2025).
"""

# ruff: noqa: N802 (these functions stand for classes and have the names that the field uses)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.optimizer import PolarGrad
from polargrad_dist.optim.rules import Rule, expect_rate

# Where the default rule of hidden matrices differs from PolarGrad's own defaults.
HIDDEN = {"nesterov": False, "scale": "nuclear", "oracle": "auto"}
DEFAULT = Rule(lr=1e-3, scale="nuclear")
DEFAULT_MUON = Rule(lr=0.02, scale="muon")


def _named(
    name: str,
    params: Any,
    lr: float | None,
    rule: dict[str, Any],
    more: dict[str, Any],
    default: Rule = DEFAULT,
) -> PolarGrad:
    """A name's rule for all given parameters, or for a model's hidden matrices; its other roles keep their rules."""
    if lr is None and not _all_rated(params):
        changed = {key: both[key] for both in (rule | more,) for key in ("algorithm", "scale") if key in both}
        expect_rate(name, "hidden", replace(default, **changed), default)
    lr = default.lr if lr is None else lr
    if isinstance(params, nn.Module):
        if "hidden" in more:
            raise ConfigError(
                "hidden is given, but it is the role whose rule this name sets, expected the fields of that rule as "
                "arguments: Muon(model, lr=0.02)"
            )
        fields = {key: more.pop(key) for key in list(more) if key in Rule.__dataclass_fields__}
        return PolarGrad(params, hidden={"lr": lr, "momentum": "none"} | HIDDEN | rule | fields, **more)
    return PolarGrad(params, lr, **(rule | more))


def _all_rated(params: Any) -> bool:
    """Whether these are groups that all have a rate of their own."""
    groups = isinstance(params, list | tuple) and all(isinstance(group, Mapping) for group in params)
    return groups and all("lr" in group for group in params)


def PolarGradM(
    params: Any, lr: float | None = None, *, polar_first: bool = False, beta: float = 0.95, **more: Any
) -> PolarGrad:
    """PolarGrad with EMA momentum: of the gradient (C.2), or of its polar factor (C.3, ``polar_first``).

    lr: multiplies the nuclear norm of the momentum. Defaults to 1e-3, where a sweep begins.
    """
    momentum = "polar_first" if polar_first else "momentum_first"
    return _named("PolarGradM", params, lr, {"momentum": momentum, "beta": beta}, more)


def PolarSGDM(
    params: Any, lr: float | None = None, *, polar_first: bool = False, beta: float = 0.5, **more: Any
) -> PolarGrad:
    """PolarGradM for stochastic gradients, with the small momentum that suits them (table D.9).

    lr: multiplies the nuclear norm of the momentum. Defaults to 1e-3, where a sweep begins: the paper has 5 for embeddings
    and 0.02 for heads. The embeddings and heads of ``PolarGrad(model)`` have ``scale="nuclear_relative"`` and 1.0.
    """
    momentum = "polar_first" if polar_first else "momentum_first"
    return _named("PolarSGDM", params, lr, {"momentum": momentum, "beta": beta}, more)


def PolarHB(params: Any, lr: float | None = None, *, beta: float = 0.95, **more: Any) -> PolarGrad:
    """PolarGrad with Polyak's heavy-ball momentum (C.4).

    lr: multiplies the nuclear norm of the momentum. Defaults to 1e-3, where a sweep begins.
    """
    return _named("PolarHB", params, lr, {"momentum": "heavy_ball", "beta": beta}, more)


def PolarMuon(
    params: Any, lr: float | None = None, *, beta: float = 0.95, nesterov: bool = False, **more: Any
) -> PolarGrad:
    """Muon with the nuclear norm as its scale and an exact oracle (equation 9, which has no Nesterov momentum).

    lr: multiplies the nuclear norm of the momentum. Defaults to 1e-3, where a sweep begins; Muon's 0.02 is for another scale.
    """
    rule = {"momentum": "momentum_first", "beta": beta, "nesterov": nesterov}
    return _named("PolarMuon", params, lr, rule, more)


def Muon(
    params: Any,
    lr: float | None = None,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    scale: str = "muon",
    oracle: str = "newton_schulz",
    **more: Any,
) -> PolarGrad:
    """Muon: five Newton-Schulz steps, scale sqrt(max(1, m/n)), or 0.2 sqrt(max(m, n)) with ``scale="moonlight"``.

    lr: the largest singular value of a square matrix's step. Defaults to 0.02, as in ``PolarGrad(model)``; another scale
    needs a rate of its own, "moonlight" AdamW's.
    """
    rule = {
        "momentum": "momentum_first",
        "beta": beta,
        "nesterov": nesterov,
        "scale": scale,
        "oracle": oracle,
    }
    return _named("Muon", params, lr, rule, more, DEFAULT_MUON)
