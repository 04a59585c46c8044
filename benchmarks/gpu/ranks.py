"""Section 3: `optimizer.step` as each of 8 ranks on one GPU, against AdamW and, on the same matrices, torch's Muon.

A group of PyTorch's "fake" backend has 8 ranks of which this process is one: it does that rank's work, without any
communication. So the longest of the 8 is the cost of a step without communication, which this section does not measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple
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
# Forward and backward of 65,536 tokens on an H100 in modded-nanoGPT's record; the shares below are relative to it.
STEP = 0.148


class Case(NamedTuple):
    """A model and its rules, with limits: the share of a training step that they add to AdamW, and the kernels."""

    architecture: Any
    name: str
    rules: OptimizerConfig
    share: float | None
    kernels: int
    ranks: tuple[int, ...]


def cases() -> tuple[Case, ...]:
    """The paper's three models; for the larger ones only the first and the last rank are run."""
    ends, exact, truncated = adamw_rule(), polarsgdm_rule(), polarsgdm_rule(oracle="qdwh", steps=2)
    every, some = tuple(range(WORLD)), (0, WORLD - 1)
    return (
        Case("gpt2-small", "Muon + AdamW", OptimizerConfig(muon_rule(), ends), 0.03, 400, every),
        Case("gpt2-small", "Muon + PolarSGDM", OptimizerConfig(muon_rule(), exact), 0.05, 400, every),
        Case(
            "gpt2-medium",
            "Muon + PolarSGDM, truncated QDWH",
            OptimizerConfig(muon_rule(), truncated),
            None,
            600,
            some,
        ),
        Case("qwen2.5", "Muon + PolarSGDM", OptimizerConfig(muon_rule(), exact), None, 600, some),
    )


def run(setting: Setting) -> list[Line]:
    """For each model: fused AdamW, torch's Muon, then this optimizer as each rank, or as one rank in the reduced form."""
    lines: list[Line] = []
    for architecture, group in groupby(cases(), lambda case: case.architecture):
        model = with_gradients(architecture, setting)
        baseline = torch.optim.AdamW(model.parameters(), lr=0.0, fused=setting.device.type == "cuda")
        adamw = seconds(baseline.step, setting)
        del baseline
        lines.append(Line(SECTION, architecture, "fused AdamW, all parameters", 1e3 * adamw, "ms"))
        lines += torch_muon(architecture, model, setting)
        for case in group:
            lines += as_each_rank(case, adamw, model, setting)
        del model
    return lines


def with_gradients(architecture: Any, setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = TINY if setting.reduced else {}
    model = build_model(ModelConfig(architecture, **sizes), device=setting.device)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    return model


def torch_muon(architecture: str, model: nn.Module, setting: Setting) -> list[Line]:
    """torch.optim.Muon on all hidden matrices on one GPU, if this version of torch has it."""
    if not hasattr(torch.optim, "Muon"):
        return []
    blocks = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]  # type: ignore[union-attr]
    theirs = torch.optim.Muon(blocks, lr=1e-6)
    return [
        Line(
            SECTION,
            architecture,
            "torch.optim.Muon, all hidden matrices on one rank",
            1e3 * seconds(theirs.step, setting),
            "ms",
        )
    ]


def as_each_rank(case: Case, adamw: float, model: nn.Module, setting: Setting) -> list[Line]:
    times, started = [], []
    for rank in case.ranks[:1] if setting.reduced else case.ranks:
        with fake_group(rank):
            optimizer = PolarGrad.from_config(model, case.rules, process_group=dist.group.WORLD)
            times.append(seconds(partial(whole_step, optimizer), setting, rounds=3))
            started.append(launches_and_idle(partial(whole_step, optimizer), setting)[0])
            del optimizer
    name, over = f"{case.architecture}, {case.name}", (max(times) - adamw) / STEP
    lines = [
        Line(SECTION, name, f"step, the longest of {len(times)} ranks", 1e3 * max(times), "ms"),
        Line(SECTION, name, "step, longest over shortest", max(times) / min(times), ""),
        Line(SECTION, name, "kernels started, the most of these ranks", max(started), "",
             **setting.goal(f"<= {case.kernels}", max(started) <= case.kernels)),
    ]  # fmt: skip
    if case.share is not None:
        goal = setting.goal(f"<= {case.share:g}", over <= case.share)
        lines.append(Line(SECTION, name, "over AdamW, of a 148 ms step", over, "", **goal))
    return lines


def whole_step(optimizer: PolarGrad) -> None:
    """A step as in the trainer: the norm, a flag on the device, clipping while gradients are read."""
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

    # The fake backend refuses to receive more than it sends, and leaves the received data undefined.
    exchange = mock.patch.object(dist, "all_to_all_single", side_effect=receive)
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    try:
        with exchange:
            yield
    finally:
        dist.destroy_process_group()
