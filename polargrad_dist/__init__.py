"""Polar-gradient optimizers for PyTorch, on one device, under DDP and under FSDP2.

Names are loaded when first used: ``import polargrad_dist`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polargrad_dist.errors import CheckpointError, ConfigError, DataError, PolarError, PolarGradError
    from polargrad_dist.optim import (
        Direction,
        Muon,
        OptimizerConfig,
        Polar,
        PolarGrad,
        PolarGradM,
        PolarHB,
        PolarMuon,
        PolarSGDM,
        Rule,
        muon_rule,
        plan_for,
        register_rule,
        route,
        routing_table,
    )

__version__ = "0.2.0.dev0"
_ERRORS = ("CheckpointError", "ConfigError", "DataError", "PolarError", "PolarGradError")
__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Direction",
    "Muon",
    "OptimizerConfig",
    "Polar",
    "PolarError",
    "PolarGrad",
    "PolarGradError",
    "PolarGradM",
    "PolarHB",
    "PolarMuon",
    "PolarSGDM",
    "Rule",
    "muon_rule",
    "plan_for",
    "register_rule",
    "route",
    "routing_table",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "polargrad_dist.errors" if name in _ERRORS else "polargrad_dist.optim"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'polargrad_dist' has no attribute {name!r}")
