"""The family's names: each builds a `PolarGrad` with the name's defaults; for a model, its hidden matrices get them.

Sources: algorithms C.1-C.4 of Lau, Long, Su (2025); Muon of Jordan et al. (2024) and Liu et al. (2025).
"""

# ruff: noqa: N802 (these functions stand for classes and have the names that the field uses)
from __future__ import annotations

from typing import Any

from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.optimizer import PolarGrad
from polargrad_dist.optim.rules import Rule


def _named(params: Any, lr: float, rule: dict[str, Any], more: dict[str, Any]) -> PolarGrad:
    """A name's rule for all given parameters, or for a model's hidden matrices; its other roles keep their rules."""
    if isinstance(params, nn.Module):
        if "hidden" in more:
            raise ConfigError(
                "hidden is given, but it is the role whose rule this name sets, expected the fields of that rule as "
                "arguments: Muon(model, lr=0.02)"
            )
        fields = {key: more.pop(key) for key in list(more) if key in Rule.__dataclass_fields__}
        return PolarGrad(params, hidden={"lr": lr, "momentum": "none"} | HIDDEN | rule | fields, **more)
    return PolarGrad(params, lr, **(rule | more))


# Where the default rule of hidden matrices differs from PolarGrad's own defaults.
HIDDEN = {"nesterov": False, "scale": "nuclear", "oracle": "auto"}


def PolarGradM(
    params: Any, lr: float = 1e-3, *, polar_first: bool = False, beta: float = 0.95, **more: Any
) -> PolarGrad:
    """PolarGrad with EMA momentum: of the gradient (C.2), or of its polar factor (C.3, ``polar_first``)."""
    return _named(
        params, lr, {"momentum": "polar_first" if polar_first else "momentum_first", "beta": beta}, more
    )


def PolarSGDM(
    params: Any, lr: float = 1e-3, *, polar_first: bool = False, beta: float = 0.5, **more: Any
) -> PolarGrad:
    """PolarGradM for stochastic gradients, with the small momentum that suits them (table D.9)."""
    return PolarGradM(params, lr, polar_first=polar_first, beta=beta, **more)


def PolarHB(params: Any, lr: float = 1e-3, *, beta: float = 0.95, **more: Any) -> PolarGrad:
    """PolarGrad with Polyak's heavy-ball momentum (C.4)."""
    return _named(params, lr, {"momentum": "heavy_ball", "beta": beta}, more)


def PolarMuon(
    params: Any, lr: float = 1e-3, *, beta: float = 0.95, nesterov: bool = False, **more: Any
) -> PolarGrad:
    """Muon with the nuclear norm as its scale and an exact oracle (equation 9, which has no Nesterov momentum)."""
    return _named(params, lr, {"momentum": "momentum_first", "beta": beta, "nesterov": nesterov}, more)


def Muon(
    params: Any,
    lr: float = 0.02,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    scale: str = "muon",
    oracle: str = "newton_schulz",
    **more: Any,
) -> PolarGrad:
    """Muon: five Newton-Schulz steps, scale sqrt(max(1, m/n)), or 0.2 sqrt(max(m, n)) with ``scale="moonlight"``."""
    rule = {
        "momentum": "momentum_first",
        "beta": beta,
        "nesterov": nesterov,
        "scale": scale,
        "oracle": oracle,
    }
    return _named(params, lr, rule, more)
