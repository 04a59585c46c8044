"""Section 3: `optimizer.step` as each of 8 ranks on one GPU, beside AdamW and, on the same matrices, torch's Muon.

A group of PyTorch's "fake" backend has 8 ranks of which this process is one: it does that rank's work, and nothing travels.
So the longest of the 8 is what a step costs beside its communication, which this section says nothing about.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu.measure import Line, Setting, launches_and_idle, seconds
from benchmarks.gpu.steps import TINY
from models import ModelConfig, build_model
from polargrad_dist import OptimizerConfig, PolarGrad
from polargrad_dist.optim import adamw_rule, muon_rule, polarsgdm_rule
from polargrad_dist.optim.elements import shrinking

SECTION = "ranks"
WORLD = 8
LAUNCHES = 400
# Forward and backward of 65,536 tokens on an H100 in modded-nanoGPT's record, which the shares below are of.
STEP = 0.148


def recipes() -> dict[str, tuple[OptimizerConfig, float]]:
    """Three rules and the largest share of a training step that each may cost over AdamW."""
    ends = adamw_rule()
    return {
        "Muon + AdamW": (OptimizerConfig(muon_rule(), ends, ends), 0.03),
        "Muon + PolarSGDM": (OptimizerConfig(), 0.05),
        "PolarGrad": (OptimizerConfig(polarsgdm_rule(beta=0.95), polarsgdm_rule()), 0.05),
    }


def run(setting: Setting) -> list[Line]:
    """GPT-2 small; ranks 0 and 5 stand for all in the reduced form."""
    model = with_gradients(setting)
    ranks = (0, 5) if setting.reduced else range(WORLD)
    baseline = torch.optim.AdamW(model.parameters(), lr=0.0, fused=setting.device.type == "cuda")
    adamw = seconds(baseline.step, setting)
    del baseline
    lines = [
        Line(SECTION, "GPT-2 small", "fused AdamW, all parameters", 1e3 * adamw, "ms"),
        *torch_muon(model, setting),
    ]
    for name, (config, allowed) in recipes().items():
        lines += as_each_rank(name, config, allowed, adamw, model, ranks, setting)
    return lines


def with_gradients(setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = TINY if setting.reduced else {}
    model = build_model(ModelConfig("gpt2-small", **sizes), device=setting.device)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    return model


def torch_muon(model: nn.Module, setting: Setting) -> list[Line]:
    """torch.optim.Muon on the hidden matrices, all of them on one GPU, where this torch has it."""
    if not hasattr(torch.optim, "Muon"):
        return []
    blocks = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]  # type: ignore[union-attr]
    theirs = torch.optim.Muon(blocks, lr=1e-6)
    return [
        Line(
            SECTION,
            "GPT-2 small",
            "torch.optim.Muon, hidden matrices, undealt",
            1e3 * seconds(theirs.step, setting),
            "ms",
        )
    ]


def as_each_rank(
    name: str,
    config: OptimizerConfig,
    allowed: float,
    adamw: float,
    model: nn.Module,
    ranks: Any,
    setting: Setting,
) -> list[Line]:
    times, started = [], []
    for rank in ranks:
        with fake_group(rank):
            optimizer = PolarGrad.from_config(model, config, process_group=dist.group.WORLD)
            times.append(seconds(partial(whole_step, optimizer), setting, rounds=3))
            started.append(launches_and_idle(partial(whole_step, optimizer), setting)[0])
            del optimizer
    over = (max(times) - adamw) / STEP
    return [
        Line(SECTION, name, f"step, the longest of {len(times)} ranks", 1e3 * max(times), "ms"),
        Line(SECTION, name, "step, longest over shortest", max(times) / min(times), ""),
        Line(SECTION, name, "over AdamW, of a 148 ms step", over, "", **setting.goal(f"<= {allowed:g}", over <= allowed)),
        Line(SECTION, name, "kernels started, the most of all ranks", max(started), "",
             **setting.goal(f"<= {LAUNCHES}", max(started) <= LAUNCHES)),
    ]  # fmt: skip


def whole_step(optimizer: PolarGrad) -> None:
    """As the trainer makes it: the norm, a flag on the device, clipping while gradients are read."""
    norm = optimizer.clip_grad_norm_(float("inf"))
    optimizer.step(ok=norm.isfinite(), shrink=shrinking(norm, 1.0))


@contextmanager
def fake_group(rank: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class Done:
        def wait(self, *_: Any) -> bool:
            return True

    def receive(out: torch.Tensor, *_: Any, **__: Any) -> Done:
        out.fill_(1.0)
        return Done()

    # The fake backend refuses to receive more than it sends, and leaves what it would receive undefined.
    exchange = mock.patch.object(dist, "all_to_all_single", side_effect=receive)
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    try:
        with exchange:
            yield
    finally:
        dist.destroy_process_group()
