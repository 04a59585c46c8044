"""The optimizer family, routing of a model's parameters, and learning-rate schedules."""

from polargrad_dist.optim.family import Muon, PolarGradM, PolarHB, PolarMuon, PolarSGDM
from polargrad_dist.optim.matrix import Direction, Polar, register_rule
from polargrad_dist.optim.optimizer import PolarGrad
from polargrad_dist.optim.planning import plan_for
from polargrad_dist.optim.routing import route, routing_table
from polargrad_dist.optim.rules import (
    OptimizerConfig,
    Rule,
    adamw_rule,
    muon_rule,
    polarsgdm_rule,
    relative_rule,
)

__all__ = [
    "Direction", "Muon", "OptimizerConfig", "Polar", "PolarGrad", "PolarGradM", "PolarHB", "PolarMuon", "PolarSGDM", "Rule",
    "adamw_rule", "muon_rule", "plan_for", "polarsgdm_rule", "register_rule", "relative_rule", "route", "routing_table",
]  # fmt: skip
