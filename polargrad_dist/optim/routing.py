"""Which rule steps which parameter: roles come from the modules (`roles`), and hints of the model override them.

A model's ``parameter_hints`` may give a role, how fused matrices split, and a decay factor.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.checks import refuse_flat
from polargrad_dist.optim.matrix import rule_of
from polargrad_dist.optim.names import cleaner, unwrap
from polargrad_dist.optim.roles import Home, Place, output_layers, place
from polargrad_dist.optim.rules import ROLES, OptimizerConfig
from polargrad_dist.words import counted

log = logging.getLogger("polargrad_dist.optim")
_SPLITS = ("split_sizes", "num_heads", "flatten", "transposed")
_HINTS = ("role", *_SPLITS, "weight_decay_scale")


class Groups(list[dict[str, Any]]):
    """Parameter groups; ``notes`` says what routing guessed, by parameter name."""

    notes: dict[str, str]

    def __init__(self, groups: list[dict[str, Any]], notes: dict[str, str]) -> None:
        super().__init__(groups)
        self.notes = notes


def route(model: nn.Module, config: OptimizerConfig | None = None) -> Groups:
    """The parameter groups of a model: one per role and way of splitting, each with its rule's fields.

    A group has ``params``, ``param_names``, ``role``, every field of `Rule`, ``split_sizes``, ``num_heads``, ``flatten`` and
    ``transposed``. Frozen parameters (``requires_grad=False``) are left out. Guesses are logged in one warning and shown by
    `routing_table`. Raises ``ConfigError`` for a parameter whose role cannot be determined, flattened parameters (FSDP1,
    ZeRO), a hint with an unknown parameter or key, and a rule that matches no parameter.
    """
    config = config or OptimizerConfig()
    config.check()
    model = unwrap(model)
    hints: dict[str, dict[str, Any]] = getattr(model, "parameter_hints", dict)()
    homes = list(_homes(model))
    heads = output_layers(model, (home for _, _, home in homes))
    shared: dict[torch.Tensor, list[Home]] = defaultdict(list)
    for _, p, home in homes:
        shared[p].append(home)
    names = {p: name for name, p, _ in reversed(homes)}
    _check_hints(hints, set(names.values()))

    grouped: dict[tuple, dict[str, torch.Tensor]] = defaultdict(dict)
    notes: dict[str, str] = {}
    for p, its_homes in shared.items():
        if not p.requires_grad:
            continue
        name = names[p]
        refuse_flat(name, p)
        hint = hints.get(name, {})
        found = _hinted(_shared_place([place(home, p, heads) for home in its_homes]), hint)
        if found.role is None:
            raise ConfigError(
                f"{name} of shape {tuple(p.shape)} is a parameter of {type(its_homes[0].module).__name__}, expected a "
                f"module that determines its role: add a hint to the model's parameter_hints(), {{{name!r}: {{'role': "
                "'hidden'} for a stack of matrices (out, in), or 'scalar' for AdamW"
            )
        if found.note:
            notes[name] = found.note
        decay = float(hint.get("weight_decay_scale", 1.0))
        grouped[found.role, *(getattr(found, key) for key in _SPLITS), decay][name] = p
    _check_rules(config, {key[0] for key in grouped})
    if notes:
        # One warning for all ranks; if ranks hold different stages of a model, the other ranks log theirs at level DEBUG.
        main = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        level = logging.WARNING if main else logging.DEBUG
        log.log(
            level, "routing had to guess (parameter_hints() of the model overrides it): %s", _summary(notes)
        )
    return Groups([_group(config, *item) for item in sorted(grouped.items(), key=_order)], notes)


def _homes(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Home]]:
    """Each parameter with its name and the module that holds it; several times where it is tied."""
    clean = cleaner(model)
    bare = {clean(path): module for path, module in model.named_modules()}
    for path, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            name = clean(f"{path}.{leaf}" if path else leaf)
            owner, tensor = name.rpartition(".")[0], leaf
            if isinstance(module, ParametrizationList):
                owner, _, tensor = owner.rsplit(".", 2) if owner.count(".") > 1 else ("", *owner.split("."))
            parent, _, attribute = owner.rpartition(".")
            yield name, p, Home(bare[owner], tensor, bare[parent] if owner else None, attribute)


def _shared_place(places: list[Place]) -> Place:
    """A tied weight is an embedding if one of its modules is; else a head; else what its first module says."""
    for role in ("embed", "head"):
        for found in places:
            if found.role == role:
                return found
    return places[0]


def _hinted(found: Place, hint: dict[str, Any]) -> Place:
    """A place after applying the model's hint."""
    said = {key: hint[key] for key in ("role", *_SPLITS) if key in hint}
    if said:
        either = {"split_sizes": "num_heads", "num_heads": "split_sizes"}
        said = {either[key]: None for key in said if key in either} | said
        found = replace(found, note="", **said)
    if found.split_sizes:
        found = replace(found, split_sizes=tuple(found.split_sizes))
    return Place("scalar", note=found.note) if found.role == "scalar" else found


def _check_hints(hints: dict[str, dict[str, Any]], names: set[str]) -> None:
    for name, hint in hints.items():
        if name not in names:
            raise ConfigError(f"parameter_hints() names {name!r}, expected a parameter of the model")
        if unknown := sorted(set(hint) - set(_HINTS)):
            raise ConfigError(
                f"parameter_hints() gives {name!r} the key {unknown[0]!r}, expected one of: {', '.join(_HINTS)}"
            )
        if (role := hint.get("role", "hidden")) not in ROLES:
            raise ConfigError(
                f"parameter_hints() gives {name!r} the role {role!r}, expected one of: {', '.join(ROLES)}"
            )


def _check_rules(config: OptimizerConfig, found: set[str]) -> None:
    for role in ("head", "value_embed"):
        if getattr(config, role) is not None and role not in found:
            raise ConfigError(
                f"optimizer.{role} is set, expected null: the model has no parameter of that role (tied weights are stepped "
                f"as embed), so set optimizer.{role} to null"
            )


def _summary(notes: dict[str, str]) -> str:
    """Notes with layers merged: each name with * for its numbers, and how many parameters it stands for."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for name, note in notes.items():
        counts[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), note] += 1
    return "; ".join(f"{name}{f' ({n})' if n > 1 else ''}: {note}" for (name, note), n in counts.items())


def _order(item: tuple[tuple, dict]) -> tuple:
    role, *rest = item[0]
    return ROLES.index(role), str(rest)


def _group(config: OptimizerConfig, key: tuple, parameters: dict[str, torch.Tensor]) -> dict[str, Any]:
    role, *splits, weight_decay_scale = key
    group = asdict(config.rule(role))
    group |= group.pop("options")
    group |= {"params": list(parameters.values()), "param_names": list(parameters), "role": role}
    group |= dict(zip(_SPLITS, splits, strict=True))
    group["weight_decay"] *= weight_decay_scale
    return group


def routing_table(groups: list[dict[str, Any]]) -> str:
    """One line per parameter with name, shape, role, rule, learning rate and splits, then totals.

    A note after # says what `route` guessed; only groups from `route` have notes, not those of an optimizer.
    """
    names = [name for group in groups for name in group["param_names"]]
    notes = getattr(groups, "notes", {})
    width = max(map(len, names), default=9)
    lines: list[str] = []
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            shape = "x".join(map(str, p.shape)) or "scalar"
            note = f"# {notes[name]}" if name in notes else ""
            line = (
                f"{name:<{width}} {shape:>16} {group['role']:<11} {rule_of(group).describe(group):<44} {group['lr']:<8.3g} "
                f"{_layout(group):<22} {note}"
            )
            lines.append(line.rstrip())
            totals[group["role"]][0] += 1
            totals[group["role"]][1] += p.numel()
    for role, (tensors, elements) in totals.items():
        lines.append(f"{role}: {counted(tensors, 'parameter')}, {counted(elements, 'element')}")
    return "\n".join(lines)


def _layout(group: dict[str, Any]) -> str:
    """How a group's parameters store their matrices, if not as a linear layer does."""
    along = "columns" if group["transposed"] else "rows"
    words = []
    if group["split_sizes"]:
        words.append(f"{along} {'+'.join(map(str, group['split_sizes']))}")
    if group["num_heads"]:
        words.append(f"{along} in {counted(group['num_heads'], 'head')}")
    if group["transposed"]:
        words.append("(in, out)")
    if group["flatten"]:
        words.append("convolution")
    return ", ".join(words)
