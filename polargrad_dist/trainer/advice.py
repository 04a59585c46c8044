"""Warns early of a learning rate with which a nuclear-scaled role hardly trains.

The rule of thumb and where it comes from: docs/choosing-rules.md.
"""

from __future__ import annotations

from polargrad_dist.optim.rules import ROLES, OptimizerConfig

# Lr times the nuclear norm of the momentum that did best in small runs
STEP = 0.5
# Of it: with less a matrix hardly moves
LOW = 0.1
# Steps between which the rule of thumb was found
FIRST, LAST = 40, 100


def slow_roles(optimizer: OptimizerConfig, stats: dict[str, dict[str, float]], step: int) -> list[str]:
    """A sentence for each rule whose rate is far too low; none outside of the steps that the rule of thumb is about.

    stats: as ``PolarGrad.stats()`` returns them. Where the head has no rule of its own, the embedding's is judged by it.
    """
    if not FIRST <= step <= LAST:
        return []
    shared = {role: "embed" if getattr(optimizer, role) is None else role for role in ROLES}
    found = []
    for name in dict.fromkeys(shared.values()):
        rule, roles = optimizer.rule(name), [role for role in ROLES if shared[role] == name and role in stats]
        if not roles or (rule.algorithm, rule.scale, rule.alpha) != ("polar", "nuclear", 1.0):
            continue
        norm = stats["head" if "head" in roles else roles[0]]["nuclear_norm"]
        if 0 < rule.lr * norm < LOW * STEP:
            found.append(
                f"optimizer.{name}.lr is {rule.lr:g}, with which {' and '.join(roles)} hardly train: times the nuclear "
                f"norm {norm:.3g} it is {rule.lr * norm:.2g}, expected about {STEP}: try {STEP / norm:.2g}, "
                "or scale nuclear_relative with lr 1 (docs/choosing-rules.md)"
            )
    return found
