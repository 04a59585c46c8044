"""Polar-gradient optimizers for PyTorch, on one device, under DDP and under FSDP2.

Names are loaded when first used: ``import polargrad_dist`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polargrad_dist.optim import (
        Muon,
        OptimizerConfig,
        PolarGrad,
        PolarGradM,
        PolarHB,
        PolarMuon,
        PolarSGDM,
        Rule,
        route,
        routing_table,
    )

__version__ = "0.1.0"
__all__ = [
    "Muon",
    "OptimizerConfig",
    "PolarGrad",
    "PolarGradM",
    "PolarHB",
    "PolarMuon",
    "PolarSGDM",
    "Rule",
    "route",
    "routing_table",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("polargrad_dist.optim"), name)
    raise AttributeError(f"module 'polargrad_dist' has no attribute {name!r}")
