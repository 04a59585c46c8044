"""A module that is a bag of parameters of awkward shapes, with gradients of chosen spectra that differ between samples.

The loss of sample i is the sum over parameters of <p, C_i> + |p|^2 / 20: its gradient goes through autograd, DDP and FSDP2
as any model's does, and its mean over the global batch has the condition number that the test asks for.
"""

from functools import lru_cache

import torch
from torch import nn

SHAPES = {
    "wide": (3, 11),
    "square": (8, 8),
    "square2": (8, 8),
    "narrow": (13, 5),
    "row": (1, 6),
    "tall": (50, 4),
    "fused": (12, 6),
    "heads": (8, 5),
    "experts": (3, 4, 6),
    "bias": (7,),
    "conv": (6, 2, 3, 3),
}
SAMPLES = 48
OWN = {"fused": {"split_sizes": (6, 4, 2)}, "heads": {"num_heads": 2}}


def spectrum(shape: tuple[int, ...], condition: float, generator: torch.Generator) -> torch.Tensor:
    """A random fp64 tensor whose matrices have log-spaced singular values from 1 to 1/condition."""
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    if a.ndim < 2:
        return a
    u, s, vh = torch.linalg.svd(a.flatten(1) if a.ndim > 3 else a, full_matrices=False)
    count = s.shape[-1]
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), count, dtype=torch.float64)
    return ((u * values.expand_as(s).unsqueeze(-2)) @ vh).view(shape)


@lru_cache(maxsize=64)
def _coefficients(shapes: tuple, condition: float, seed: int, step: int) -> dict[str, torch.Tensor]:
    out = {}
    for i, (name, shape) in enumerate(shapes):
        generator = torch.Generator().manual_seed(1000 * step + i + 7919 * seed)
        mean = spectrum(shape, condition, generator)
        noise = torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)
        out[name] = mean + (noise - noise.mean(0))
    return out


class Bag(nn.Module):
    """``forward(samples, step)`` is the mean loss of these samples at this step."""

    def __init__(self, shapes=None, condition=1e2, dtype=torch.float64, seed=0, unused=()):
        super().__init__()
        self.shapes = shapes or SHAPES
        self.condition, self.seed, self.unused = condition, seed, unused
        generator = torch.Generator().manual_seed(seed)
        for name, shape in self.shapes.items():
            start = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(start.to(dtype)))

    def coefficients(self, step: int) -> dict[str, torch.Tensor]:
        """(samples, *shape) per parameter."""
        return _coefficients(tuple(self.shapes.items()), self.condition, self.seed, step)

    def forward(self, samples: list[int], step: int) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for name, c in self.coefficients(step).items():
            if name not in self.unused:
                p = getattr(self, name).to(torch.float64)
                loss = loss + (p * c[samples].mean(0)).sum() + 0.05 * p.square().sum()
        return loss


def groups(model: nn.Module, **rule) -> list[dict]:
    """The bag's parameter groups: one rule for matrices, splits where they belong, AdamW for the vector."""
    named = dict(model.named_parameters())
    named = {name.removeprefix("module."): p for name, p in named.items()}
    out = [
        {"params": [p], "param_names": [name], **OWN[name], **rule}
        for name, p in named.items()
        if name in OWN
    ]
    rest = {n: p for n, p in named.items() if n not in OWN and n != "bias"}
    out.append({"params": list(rest.values()), "param_names": list(rest), **rule})
    if "bias" in named:
        out.append({"params": [named["bias"]], "param_names": ["bias"], "algorithm": "adamw", "lr": 0.01})
    return out
