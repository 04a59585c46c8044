"""Each algorithm of the family on one matrix in a few lines of SVD, as the paper prints it; what tests compare against."""

import math

import numpy as np
import torch
from scipy.optimize import brentq


def polar_svd(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh, s.sum()


def homogenized_svd(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """s^3 + s (sum s^2) / 2 proportional to sigma, with sum s^2 = n: by a polynomial root per value inside a root search."""
    u, sigma, vh = torch.linalg.svd(a, full_matrices=False)
    n = len(sigma)

    def solve(factor: float) -> list[float]:
        roots = [np.roots([1.0, 0.0, n / 2, -factor * float(x)]) for x in sigma]
        return [float(r[abs(r.imag).argmin()].real) for r in roots]

    factor = brentq(lambda f: sum(x * x for x in solve(f)) - n, 0.0, 1e9, xtol=1e-15, rtol=1e-14, maxiter=500)
    return u @ torch.tensor(solve(factor), dtype=a.dtype).diag() @ vh, sigma.sum()


def scale_of(name: str, m: int, n: int, nuclear: torch.Tensor) -> torch.Tensor | float:
    return {
        "nuclear": nuclear,
        "muon": math.sqrt(max(1, m / n)),
        "moonlight": 0.2 * math.sqrt(max(m, n)),
        "spectral": math.sqrt(m / n),
        "none": 1.0,
    }[name]


class Reference:
    """One matrix under algorithm C.1 (none), C.2 (momentum_first), C.3 (polar_first) or C.4 (heavy_ball)."""

    def __init__(
        self,
        x: torch.Tensor,
        momentum="none",
        beta=0.9,
        nesterov=False,
        scale="nuclear",
        weight_decay=0.0,
        control="decay",
        spectrum="polar",
    ):
        self.x, self.m = x.clone(), torch.zeros_like(x)
        self.momentum, self.beta, self.nesterov, self.scale = momentum, beta, nesterov, scale
        self.weight_decay, self.control = weight_decay, control
        self.factor = polar_svd if spectrum == "polar" else homogenized_svd

    def step(self, g: torch.Tensor, lr: float) -> None:
        beta = self.beta
        if self.momentum == "momentum_first":
            self.m = beta * self.m + (1 - beta) * g
            source = beta * self.m + (1 - beta) * g if self.nesterov else self.m
        elif self.momentum == "heavy_ball":
            self.m = beta * self.m + g
            source = g + beta * self.m if self.nesterov else self.m
        else:
            source = g
        u, nuclear = self.factor(source)
        scale = scale_of(self.scale, *g.shape, nuclear)
        if self.momentum == "polar_first":
            self.m = beta * self.m + (1 - beta) * u
            u = self.m
        step = -lr * scale * u
        mask = (step * self.x < 0) if self.control == "cautious" else 1.0
        self.x = self.x - lr * self.weight_decay * self.x * mask + step


class ReferenceAdamW:
    """AdamW of Loshchilov and Hutter (2019), algorithm 2."""

    def __init__(self, x: torch.Tensor, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        self.x, self.m, self.v, self.t = x.clone(), torch.zeros_like(x), torch.zeros_like(x), 0
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def step(self, g: torch.Tensor, lr: float) -> None:
        (b1, b2), self.t = self.betas, self.t + 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.x = self.x - lr * self.weight_decay * self.x - lr * m / (v.sqrt() + self.eps)
