"""A small model whose shapes ZeRO cuts in the middle of rows, trained under DeepSpeed and natively on the same batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polargrad_dist import PolarGrad

# Sequences per rank and micro-batch
ROWS = 6
CLIP = 0.5
RULES: dict[str, Any] = {
    "hidden": {"lr": 0.01, "nesterov": True, "oracle": "auto", "scale": "nuclear", "weight_decay": 0.1},
    "embed": {"lr": 0.02, "momentum": "momentum_first", "oracle": "auto", "scale": "nuclear"},
    "scalar": {"lr": 0.01},
}  # fmt: skip


class Small(nn.Module):
    """Embedding, a fused projection, experts, a head, norms and biases; ``forward(tokens, targets)`` is the mean loss."""

    def __init__(self, vocabulary: int = 37, width: int = 13):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.fused = nn.Linear(width, 33)
        self.back = nn.Linear(33, width, bias=False)
        self.experts = nn.Parameter(torch.randn(3, width, 7) / 4)
        self.down = nn.Linear(21, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def parameter_hints(self) -> dict[str, dict[str, Any]]:
        return {"fused.weight": {"split_sizes": (11, 11, 11)}, "experts": {"role": "hidden"}}

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.back(torch.relu(self.fused(self.norm(x))))
        x = x + self.down(torch.relu(torch.einsum("bti,eio->bteo", x, self.experts)).flatten(-2))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def batch(step: int, rank: int, vocabulary: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(vocabulary, (ROWS, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def configuration(stage: int, world: int, accumulation: int = 1, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "train_batch_size": ROWS * world * accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0} | zero,
        "steps_per_print": 10**9,
    }


def natively(rank: int, world: int, steps: int, accumulation: int = 1) -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(Small())
    optimizer = PolarGrad(model, **RULES)
    for step in range(steps):
        optimizer.zero_grad()
        for k in range(accumulation):
            (model(*batch(step * accumulation + k, rank)) / accumulation).backward()
        optimizer.clip_grad_norm_(CLIP)
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.module.named_parameters()}


def whole(engine: Any) -> dict[str, torch.Tensor]:
    """Every weight as ZeRO's fp32 vectors hold it. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    values = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
    plain = dict(engine.module.named_parameters())
    return {n: (plain[n].detach() if v is None else v.detach()).clone() for n, v in values.items()}


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of a parameter, relative to its largest element."""
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in b)


def train(engine: Any, steps: range, rank: int, accumulation: int = 1) -> None:
    for step in range(steps.start * accumulation, steps.stop * accumulation):
        engine.backward(engine(*batch(step, rank)))
        engine.step()
