"""What a bucket does element by element, in one kernel each: for GPUs, where every launch and pass over memory counts.

Numbers that change from step to step are 0-d tensors: for each float a kernel would be compiled anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polargrad_dist.compiled import run_compiled
from polargrad_dist.optim.member import Travel
from polargrad_dist.optim.parts import selected_ema, selected_step


def averaged(travel: Travel, m: Tensor, grads: Sequence[Tensor], group: dict[str, Any]) -> Tensor:
    """Momentum of stacked shards m (k, slices, rows, columns), updated in place where the step happens; or its look-ahead."""
    assert travel.ok is not None
    stack = torch.stack(list(grads)) if len(grads) > 1 else grads[0].unsqueeze(0)
    shrink = travel.number(1.0) if travel.shrink is None else travel.shrink
    numbers = travel.number(group["beta"]), shrink, travel.ok
    return run_compiled(
        selected_ema, travel.backend, m, stack, *numbers, bool(group["nesterov"]), dynamic=True
    )


def stepped(
    travel: Travel,
    old: Tensor,
    low: Tensor | None,
    step: Tensor,
    scale: Tensor | None,
    ok: Tensor,
    group: dict[str, Any],
) -> Tensor:
    """New weights for old ones (k, slices, rows, columns) where ``ok``; see `selected_step`."""
    rate = group["lr"] * group["weight_decay"]
    decay = travel.number(rate) if rate else None
    options = (old, low, step, scale, travel.number(group["lr"]), decay, ok, group["control"] == "cautious")
    return run_compiled(selected_step, travel.backend, *options, dynamic=True)
