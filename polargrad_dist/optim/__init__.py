"""The optimizer family, routing of a model's parameters, learning-rate schedules."""

from polargrad_dist.optim.family import Muon, PolarGradM, PolarHB, PolarMuon, PolarSGDM
from polargrad_dist.optim.optimizer import PolarGrad
from polargrad_dist.optim.routing import route, routing_table
from polargrad_dist.optim.rules import OptimizerConfig, Rule, adamw_rule, muon_rule, polarsgdm_rule

__all__ = [
    "Muon", "OptimizerConfig", "PolarGrad", "PolarGradM", "PolarHB", "PolarMuon", "PolarSGDM", "Rule",
    "adamw_rule", "muon_rule", "polarsgdm_rule", "route", "routing_table",
]  # fmt: skip
