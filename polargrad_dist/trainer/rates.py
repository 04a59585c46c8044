"""A rate belongs to an algorithm and a scale: where a file or the command line changes these, it gives the rate too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from polargrad_dist.optim.rules import ROLES, OptimizerConfig, expect_rate
from polargrad_dist.trainer.cli import mentioned


def check_rates(config: OptimizerConfig, args: list[str]) -> None:
    """Raises ``ConfigError`` for a role that would keep the rate of another rule.

    config: what the arguments were parsed into. Each ``--config`` file is looked at on top of the ones before it, and all
    options together on top of the files.
    """
    rules = {role: OptimizerConfig().rule(role) for role in ROLES}
    # The rule that each role's rate was given for.
    rated = dict(rules)
    own: dict[str, dict[str, Any]] = {role: {} for role in ROLES}
    for layer in _layers(args):
        for role in ROLES:
            given = mentioned(f"optimizer.{role}", layer)
            own[role] |= {key: given[key] for key in ("algorithm", "scale", "lr") if key in given}
            follows = role in ("head", "value_embed")
            if follows and getattr(config, role) is None:
                continue
            changes = {key: value for key, value in own[role].items() if key != "lr"}
            rules[role] = replace(rules["embed"] if follows else rules[role], **changes)
            if "lr" in given:
                rated[role] = replace(rules[role], lr=float(given["lr"]))
            elif follows and "lr" not in own[role]:
                rated[role] = rated["embed"]
            other = "algorithm" if rules[role].algorithm != rated[role].algorithm else "scale"
            # The rule may have changed with the embedding's, and the role not be in the arguments at all.
            because = ", which follows optimizer.embed," if follows and other not in changes else ""
            expect_rate(f"optimizer.{role}{because}", role, rules[role], rated[role])


def _layers(args: list[str]) -> list[list[str]]:
    """The arguments of each ``--config``, then those of all other options."""
    words = [word for one in args for word in one.split("=", 1)]
    files = [i for i, word in enumerate(words[:-1]) if word == "--config"]
    rest = [word for i, word in enumerate(words) if i not in files and i - 1 not in files]
    return [*([*words[i : i + 2]] for i in files), rest]
