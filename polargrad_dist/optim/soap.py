"""SOAP before the polar factor: the momentum is whitened in the eigenbasis of the gradient's covariance.

L = beta L + (1 - beta) G G', R = beta R + (1 - beta) G'G with orthogonal Q_L, Q_R of their eigenvectors; P = Q_L' M Q_R,
v = beta v + (1 - beta) P^2; the oracle's input is Q_L (P / sqrt(v)) Q_R' at the norm of M. Sources: Vyas et al. (2024),
"SOAP", and their note on SOAP before Muon. modded-nanoGPT's optimization track: on MLPs 3,150 steps to 3.28 instead of 3,225
(3.2776, n = 4), on all hidden matrices part of its record of 2,690.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def shapes(m: int, n: int) -> dict[str, tuple[int, ...]]:
    """The state of an m x n matrix; it includes the momentum, because the basis needs the gradient itself."""
    square = {"left": (m, m), "right": (n, n), "left_basis": (m, m), "right_basis": (n, n)}
    return square | {"momentum": (m, n), "exp_avg_sq": (m, n), "seen": (1,)}


def cost(m: int, n: int) -> float:
    """Flops of a step: two QR decompositions, four products with bases and two covariances."""
    return 4 * (m**3 + n**3) + 8 * m * n * (m + n)


def whitened(
    G: Tensor, state: dict[str, Tensor], group: Any, momentum: Callable[..., Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle's input for gradients G (k, m, n), and the next state; ``momentum`` is the group's.

    The momentum is not whitened until covariances can have full rank, after max(m, n)/min(m, n) steps: earlier bases would
    be arbitrary and would differ between ranks. The first basis is an eigendecomposition; each later one takes a step of
    orthogonal iteration. Whether the first one is due is read back from the device at every step.
    """
    beta, kind = group["betas"][1], state["left"].dtype
    wait = -(-max(G.shape[1:]) // min(G.shape[1:]))
    seen = state["seen"][:, :, None]
    G, fresh, takes = G.to(kind), seen < wait, seen + 1 == wait
    new = {"momentum": state["momentum"].clone(), "seen": state["seen"] + 1}
    M = momentum(new["momentum"], G, group["beta"], group["nesterov"])
    QL, QR = state["left_basis"], state["right_basis"]
    P = QL.mT @ M @ QR
    v = torch.lerp(state["exp_avg_sq"], P.square(), 1 - beta)
    white = QL @ (P / v.clamp_min(group["eps"] ** 2).sqrt()) @ QR.mT
    length = torch.linalg.matrix_norm(M) / torch.linalg.matrix_norm(white).clamp_min(1e-30)
    new["left"] = torch.lerp(state["left"], G @ G.mT, 1 - beta)
    new["right"] = torch.lerp(state["right"], G.mT @ G, 1 - beta)
    first = bool(takes.any())
    for side, other in (("left", -2), ("right", -1)):
        S, Q = new[side], state[f"{side}_basis"]
        order = torch.linalg.vecdot(Q, S @ Q, dim=-2).argsort(-1, descending=True)
        Q = Q.gather(-1, order[:, None, :].expand_as(Q))
        places = order[:, :, None] if other == -2 else order[:, None, :]
        v = v.gather(other, places.expand_as(v))
        new[f"{side}_basis"] = torch.linalg.qr(S @ Q).Q
        if first:
            found = torch.linalg.eigh(S).eigenvectors.flip(-1)
            new[f"{side}_basis"] = torch.where(takes, found, new[f"{side}_basis"])
    new["exp_avg_sq"] = torch.where(fresh, state["exp_avg_sq"], v)
    return torch.where(fresh, M, white * length[:, None, None]), new
