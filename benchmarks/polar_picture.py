"""Direction error against condition number, one line per polar method: `python -m benchmarks.polar_picture docs/polar.svg`.

fp32 matrices of 384×96 with log-spaced singular values; the error is ‖U − U*‖_F/√n against an fp64 SVD of the same matrix.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from polargrad_dist.polar import polar

METHODS: dict[str, dict] = {
    "svd": {"method": "svd", "lower": 1e-7},
    "gram, strict": {"method": "gram", "lower": 1e-7},
    "gram, default": {"method": "gram"},
    "qdwh": {"method": "qdwh", "lower": 1e-7},
    "zolo": {"method": "zolo", "lower": 1e-7},
    "newton": {"method": "newton", "lower": 1e-7},
    "qdwh, steps=2": {"method": "qdwh", "steps": 2},
    "polar_express, 8 steps": {"method": "polar_express", "steps": 8, "lower": 1e-3},
    "newton_schulz (Muon)": {"method": "newton_schulz"},
}
CONDITIONS = torch.logspace(0.3, 6, 24, dtype=torch.float64).tolist()
SAMPLES = 3


def matrix(condition: float, seed: int, m: int = 384, n: int = 96) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    P, _ = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64, generator=draw))
    V, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=draw))
    return ((P * condition ** -torch.linspace(0, 1, n, dtype=torch.float64)) @ V.mT).float()


def errors() -> dict[str, list[float]]:
    lines: dict[str, list[float]] = {name: [] for name in METHODS}
    for condition in CONDITIONS:
        a = torch.stack([matrix(condition, seed) for seed in range(SAMPLES)])
        P, _, Vh = torch.linalg.svd(a.double(), full_matrices=False)
        for name, options in METHODS.items():
            error = torch.linalg.matrix_norm(polar(a, **options).U.double() - P @ Vh) / a.shape[-1] ** 0.5
            lines[name].append(float(error.median()))
    return lines


def main() -> None:
    import matplotlib as mpl

    mpl.use("svg")
    # The same picture gives the same file.
    mpl.rcParams["svg.hashsalt"] = "polar"
    from matplotlib import pyplot as plt

    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("polar.svg")
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    styles = ["-", "-", "--", "-", ":", "-.", "-", "-", "-"]
    for (name, line), style in zip(errors().items(), styles, strict=True):
        axes.loglog(CONDITIONS, line, style, label=name)
    axes.set(xlabel="condition number κ", ylabel="direction error of U", ylim=(1e-8, 2))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
