"""Which rule steps which parameter: roles are read from the modules, never from a shape or a name alone.

The model may say what its modules do not (``parameter_hints``): a role, how fused matrices split, a decay factor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.checks import refuse_flat
from polargrad_dist.optim.matrix import rule_of
from polargrad_dist.optim.rules import ROLES, OptimizerConfig

_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_checkpoint_wrapped_module)\.")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def clean_name(name: str) -> str:
    """A parameter's name without what DDP, ``torch.compile`` and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP and whole-model ``torch.compile``."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def route(model: nn.Module, config: OptimizerConfig | None = None) -> list[dict[str, Any]]:
    """The parameter groups of a model: one per role and way of splitting, each with its rule's fields.

    A group has ``params``, ``param_names``, ``role``, every field of `Rule`, ``split_sizes``,
    ``num_heads`` and ``flatten``. Frozen parameters (``requires_grad=False``) are left out. Raises ``ConfigError`` for
    flattened parameters (FSDP1, ZeRO), for a hint that names no parameter, and for a rule that matches none.
    """
    config = config or OptimizerConfig()
    config.check()
    model = unwrap(model)
    hints: dict[str, dict[str, Any]] = _call(model, "parameter_hints") or {}
    head = _head(model)
    named = {clean_name(name) for name, _ in model.named_parameters()}
    if unknown := set(hints) - named:
        raise ConfigError(
            f"parameter_hints() names {sorted(unknown)[0]!r}, which is not a parameter of the model"
        )

    grouped: dict[tuple, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, p, modules in _homes(model):
        if name not in named or not p.requires_grad:
            continue
        refuse_flat(name, p)
        hint = hints.get(name, {})
        # A tied weight is an embedding wherever it was declared first.
        roles = [_role(module, p, head) for module in modules]
        role = hint.get("role") or ("embed" if "embed" in roles else roles[0])
        if role not in ROLES:
            raise ConfigError(
                f"parameter_hints() gives {name!r} the role {role!r}, expected one of: {', '.join(ROLES)}"
            )
        split_sizes = tuple(hint["split_sizes"]) if hint.get("split_sizes") else None
        flatten = isinstance(modules[0], _CONVOLUTIONS)
        decay = float(hint.get("weight_decay_scale", 1.0))
        grouped[role, split_sizes, hint.get("num_heads"), flatten, decay][name] = p
    found = {key[0] for key in grouped}
    for role in ("head", "value_embed"):
        if getattr(config, role) is not None and role not in found:
            raise ConfigError(
                f"optimizer.{role} is set, but the model has no parameter of that role (tied weights are stepped as "
                f"embed): set optimizer.{role} to null"
            )
    return [_group(config, key, parameters) for key, parameters in sorted(grouped.items(), key=_order)]


def _homes(model: nn.Module) -> list[tuple[str, torch.Tensor, list[nn.Module]]]:
    """Each parameter once, under its first name, with the modules that hold it: several where it is tied."""
    homes: dict[torch.Tensor, tuple[str, list[nn.Module]]] = {}
    for path, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            homes.setdefault(p, (clean_name(f"{path}.{leaf}" if path else leaf), []))[1].append(module)
    return [(name, p, modules) for p, (name, modules) in homes.items()]


def _call(model: nn.Module, method: str) -> Any:
    """What an optional method of the model says, None without it."""
    return getattr(model, method)() if hasattr(model, method) else None


def _order(item: tuple[tuple, dict]) -> tuple:
    role, *rest = item[0]
    return ROLES.index(role), str(rest)


def _group(config: OptimizerConfig, key: tuple, parameters: dict[str, torch.Tensor]) -> dict[str, Any]:
    role, split_sizes, num_heads, flatten, weight_decay_scale = key
    group = asdict(config.rule(role))
    group |= {
        "params": list(parameters.values()),
        "param_names": list(parameters),
        "role": role,
        "split_sizes": split_sizes,
        "num_heads": num_heads,
        "flatten": flatten,
        "transposed": False,
    }
    group["weight_decay"] *= weight_decay_scale
    return group


def _role(module: nn.Module, p: torch.Tensor, head: nn.Module | None) -> str:
    """A module's parameter is what the module is: an embedding, the head, a weight matrix, or else a scalar."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.sparse:
            raise ConfigError(
                f"an {type(module).__name__} of {module.num_embeddings} rows has sparse=True, expected sparse=False: the "
                "optimizer takes dense gradients"
            )
        return "embed"
    if module is head and p.ndim == 2:
        return "head"
    return "hidden" if p.ndim >= 2 and min(p.shape[0], p[0].numel()) > 1 else "scalar"


def _head(model: nn.Module) -> nn.Module | None:
    """The output embedding: what the model says it is, else the last linear layer as long as an embedding table."""
    if hasattr(model, "get_output_embeddings"):
        return _call(model, "get_output_embeddings")
    vocabularies = {
        m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    }
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linears[-1] if linears and linears[-1].out_features in vocabularies else None


def routing_table(groups: list[dict[str, Any]]) -> str:
    """What went where: one line per parameter with its name, shape, role, rule and learning rate, then totals."""
    names = [name for group in groups for name in group["param_names"]]
    width = max(map(len, names), default=9)
    lines: list[str] = []
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            shape = "x".join(map(str, p.shape)) or "scalar"
            lines.append(
                f"{name:<{width}} {shape:>16} {group['role']:<11} {rule_of(group).describe(group):<44} {group['lr']:.3g}"
            )
            totals[group["role"]][0] += 1
            totals[group["role"]][1] += p.numel()
    for role, (tensors, elements) in totals.items():
        lines.append(f"{role}: {tensors} parameters, {elements:,} elements")
    return "\n".join(lines)
