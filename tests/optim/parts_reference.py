"""Every part of `docs/rules.md` on a list of plain matrices, on one device, by SVD and eigendecomposition alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def polar_svd(a: Tensor) -> tuple[Tensor, Tensor]:
    """A partial isometry: soap's first whitened momentum is a matrix of signs, which need not have full rank."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return u * (s > 1e-4 * s[0]) @ vh, s.sum()


class PartsReference:
    """All matrices of a role under momentum-first (or heavy-ball) polar steps, with the parts that ``rule`` names.

    Written from the formulas of the parts' docstrings, matrix by matrix, with no batching and no shards.
    """

    def __init__(self, weights: list[Tensor], rule: dict):
        self.rule = {
            "beta": 0.95, "nesterov": False, "scale": "nuclear", "alpha": 1.0, "center_rows": False, "normalize": "none",
            "precondition": "none", "control": "decay", "floor": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8,
        } | rule  # fmt: skip
        self.x = [w.clone() for w in weights]
        self.m = [torch.zeros_like(w) for w in weights]
        self.energy = [torch.zeros(len(w), dtype=w.dtype) for w in weights]
        self.seen: list[list[float]] = [[] for _ in weights]
        self.soap: list[dict[str, Tensor] | None] = [None for _ in weights]

    def step(self, grads: list[Tensor], lr: float) -> None:
        rule = self.rule
        beta = rule["beta"]
        steps, norms = [], []
        for i, g in enumerate(grads):
            self.m[i] = beta * self.m[i] + (1 - beta) * g
            source = beta * self.m[i] + (1 - beta) * g if rule["nesterov"] else self.m[i]
            if rule["precondition"] == "soap":
                source = self._whitened(i, source, g)
            if rule["center_rows"]:
                source = source - source.mean(0)
            u, nuclear = polar_svd(source)
            if rule["center_rows"]:
                u = u - u.mean(0)
            if rule["normalize"] == "rows":
                u = self._normalized(i, u)
            m, n = g.shape
            shape = math.sqrt(max(1, m / n))
            power = nuclear ** rule["alpha"]
            scale = {"nuclear": power, "none": 1.0}.get(rule["scale"], shape)
            if rule["scale"] == "nuclear_relative":
                scale = self._relative(i, float(power)) * (
                    math.sqrt(64 / n) if rule.get("role") == "head" else 1
                )
            steps.append(scale * u)
            norms.append(shape * nuclear)
        for i, update in enumerate(steps):
            if rule["scale"] == "nuclear_shared":
                update = update * sum(norms) ** rule["alpha"]
            x = self.x[i]
            if rule["floor"] and update.norm() < rule["floor"] * x.norm():
                update = update * rule["floor"] * x.norm() / update.norm()
            if rule["control"] == "hyperball":
                moved = x - lr * x.norm() * update / update.norm()
                self.x[i] = moved * x.norm() / moved.norm()
                continue
            mask = (update * x > 0) if rule["control"] == "cautious" else 1.0
            self.x[i] = x - lr * rule["weight_decay"] * x * mask - lr * update

    def _relative(self, i: int, power: float) -> float:
        """Over the mean of the first hundred, the t-th of which counts t times; at most 1 while there are not a hundred."""
        seen = self.seen[i]
        learning = len(seen) < 100
        if learning:
            seen.append(power)
        weights = range(1, len(seen) + 1)
        quotient = power * sum(weights) / sum(t * x for t, x in zip(weights, seen, strict=True))
        return min(1.0, quotient) if learning else quotient

    def _normalized(self, i: int, u: Tensor) -> Tensor:
        beta = self.rule["betas"][1]
        self.energy[i] = beta * self.energy[i] + (1 - beta) * (u**2).mean(1)
        d = u / (self.energy[i].sqrt()[:, None] + 1e-10)
        return d * u.norm() / d.norm()

    def _whitened(self, i: int, source: Tensor, g: Tensor) -> Tensor:
        beta, state = self.rule["betas"][1], self.soap[i]
        if state is None:
            square = [torch.zeros(size, size, dtype=g.dtype) for size in g.shape]
            state = self.soap[i] = {"left": square[0], "right": square[1], "v": torch.zeros_like(g)}
        if "ql" not in state:
            state["left"] = beta * state["left"] + (1 - beta) * g @ g.T
            state["right"] = beta * state["right"] + (1 - beta) * g.T @ g
            state["steps"] = state.get("steps", torch.tensor(0)) + 1
            if int(state["steps"]) == math.ceil(max(g.shape) / min(g.shape)):
                state["ql"], state["qr"] = (
                    torch.linalg.eigh(state[side]).eigenvectors.flip(1) for side in ("left", "right")
                )
            return source
        p = state["ql"].T @ source @ state["qr"]
        v = beta * state["v"] + (1 - beta) * p**2
        white = state["ql"] @ (p / v.clamp_min(self.rule["eps"] ** 2).sqrt()) @ state["qr"].T
        white = white * source.norm() / white.norm()
        state["left"] = beta * state["left"] + (1 - beta) * g @ g.T
        state["right"] = beta * state["right"] + (1 - beta) * g.T @ g
        rows = torch.argsort(torch.diag(state["ql"].T @ state["left"] @ state["ql"]), descending=True)
        cols = torch.argsort(torch.diag(state["qr"].T @ state["right"] @ state["qr"]), descending=True)
        state["v"] = v[rows][:, cols]
        state["ql"] = torch.linalg.qr(state["left"] @ state["ql"][:, rows]).Q
        state["qr"] = torch.linalg.qr(state["right"] @ state["qr"][:, cols]).Q
        return white
