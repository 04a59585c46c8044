"""Completes parameter groups as a user gives them: a model's by its roles, others by the defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.checks import check_keys
from polargrad_dist.optim.matrix import RULES
from polargrad_dist.optim.routing import route
from polargrad_dist.optim.rules import ROLES, OptimizerConfig, Rule, expect_rate

_RULE = asdict(Rule(lr=1e-3, momentum="none"))
DEFAULTS = {key: value for key, value in _RULE.items() if key != "options"} | {
    "split_sizes": None, "num_heads": None, "flatten": False, "transposed": False, "role": None,
}  # fmt: skip


def routed(
    model: nn.Module, gradients: str, given: dict[str, Any], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """A model's parameter groups, with changes to some roles' rules."""
    if common:
        key = min(common)
        # By default AdamW, which reads these two, is the rule of scalars alone.
        first, *others = (
            sorted(ROLES, key=lambda role: role != "scalar") if key in ("betas", "eps") else ROLES
        )
        raise ConfigError(
            f"{key}={common[key]!r} was given with a model, expected it per role: set "
            f"{first}={{{key!r}: {common[key]!r}}} (or {', '.join(others)}), or "
            "use PolarGrad.from_config(model, OptimizerConfig(…))"
        )
    if gradients == "reduce_scatter" and isinstance(model, nn.parallel.DistributedDataParallel):
        raise ConfigError(
            "gradients='reduce_scatter' was given a model in DistributedDataParallel, which reduces gradients itself, "
            "expected the bare model: pass that, or use gradients='all_reduced'"
        )
    config, options = OptimizerConfig(), {}
    for role, changes in given.items():
        if isinstance(changes, Rule):
            setattr(config, role, changes)
            continue
        if not isinstance(changes, Mapping):
            raise ConfigError(f'{role} is {changes!r}, expected a dict such as {{"lr": 0.02}}, or a Rule')
        base = config.rule(role)
        check_keys({"algorithm": base.algorithm} | dict(changes), role)
        own = {key: value for key, value in changes.items() if key in Rule.__dataclass_fields__}
        options[role] = {key: value for key, value in changes.items() if key not in own}
        rule = replace(base, **own)
        if "lr" not in own:
            expect_rate(role, role, rule, base)
        setattr(config, role, rule)
    groups = route(model, config)
    for group in groups:
        home = (
            "embed" if group["role"] != "embed" and getattr(config, group["role"]) is None else group["role"]
        )
        group |= options.get(home, {})
    return groups


def listed(params: Any) -> list[Any]:
    """Parameters, named parameters or groups as a list with at least one of them."""
    if isinstance(params, torch.Tensor) or not isinstance(params, Iterable):
        raise ConfigError(
            f"params is a {type(params).__name__}, expected a model, or a list of parameters or of parameter groups"
        )
    if not (found := list(params)):
        raise ConfigError(
            "params is empty, expected at least one parameter: a model's `parameters()` can be read only once"
        )
    return found


def completed(given: dict[str, Any], defaults: dict[str, Any], where: str, count: int) -> dict[str, Any]:
    """A copy of a group with every key and a list of named parameters; ``count`` parameters come before it."""
    check_keys(defaults | given, where)
    if "params" not in given:
        raise ConfigError(f"{where} has no key 'params', expected its parameters there")
    params = [given["params"]] if isinstance(given["params"], torch.Tensor) else list(given["params"])
    if not params:
        raise ConfigError("a parameter group is empty, expected at least one parameter")
    names = given.get("param_names")
    named = [isinstance(p, tuple) and len(p) == 2 for p in params]
    for i, p in enumerate(params):
        tensor = p[1] if named[i] else p
        if not isinstance(tensor, torch.Tensor) or named[i] != named[0]:
            raise ConfigError(
                f"{where} holds a {type(p).__name__} at index {i}, expected only parameters,"
                " or only pairs (name, parameter)"
            )
    if named[0]:
        names, params = [name for name, _ in params], [p for _, p in params]
    if names is None:
        names = [f"param.{count + i}" for i in range(len(params))]
    if len(names) != len(params):
        raise ConfigError(f"{where} has {len(names)} names for {len(params)} parameters, expected as many")
    if len(set(map(id, params))) < len(params):
        raise ConfigError(f"{where} holds a parameter twice, expected each parameter once")
    options = getattr(RULES.get(given.get("algorithm", defaults["algorithm"])), "options", {})
    group = defaults | dict(options) | given | {"params": params, "param_names": list(names)}
    group["role"] = group["role"] or ("scalar" if group["algorithm"] == "adamw" else "hidden")
    return group
