"""Cross-entropy of the head without the logits of the whole batch: gradients are taken piece by piece in forward.

Where logits outweigh the model (4,096 tokens x 151,936 entries are 1.2 GB in bf16), keeping a piece at a time saves them
all; taking the gradient at once saves making them again in backward. A piece is three products (logits, and the gradients
of hidden states and weight) and two passes over its logits, whose derivative is written out here: one pass finds the
normalizer, the other overwrites the logits with their gradient. Compiled, each pass is one kernel, and about 12 bytes
move per logit in bf16 (`python -m benchmarks.loss_bytes` counts them).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from polargrad_dist.compiled import Backend, run_compiled

SoftCap = Literal["none", "tanh", "algebraic"]

# Logits that exist at a time: 2 GiB in bf16, and 64 MiB in fp32. Each piece reads the head's weight twice and adds to its
# gradient once, so pieces of few rows would move more bytes for the weight than for the logits.
PIECE = {"cuda": 1 << 30, "cpu": 1 << 24}
CAP = 15.0
IGNORED = -100


def soft_capped(z: torch.Tensor, soft_cap: SoftCap) -> torch.Tensor:
    """Logits z of any shape, kept within ±15: "tanh" 15·tanh(z/15), "algebraic" 15·z/√(z² + 225), "none" z itself."""
    if soft_cap == "tanh":
        return CAP * torch.tanh(z / CAP)
    if soft_cap == "algebraic":
        return CAP * z * torch.rsqrt(z.square() + CAP**2)
    return z


def loss_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    soft_cap: SoftCap = "none",
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Sum of the cross-entropies in nats, fp32 0-d; targets of -100 count nothing.

    Without gradients (`no_grad`, or inputs that need none) only the loss is computed. The weight's gradient is summed over
    pieces in fp32. Second derivatives are refused.

    Args:
        hidden: (N, width), in the weight's dtype or under autocast.
        weight: (V, width) of the head.
        targets: (N,) int64.
        soft_cap: of the logits hidden·weightᵀ.
        backend: of `torch.compile`, "inductor" for one kernel per pass; None runs the passes uncompiled. Where compiling
            finds no compiler, a warning is logged once and they run uncompiled from then on.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LossSum.apply(hidden, weight, targets, soft_cap, backend)
    hidden, weight = _in_one_dtype(hidden.detach(), weight.detach())
    total = torch.zeros((), device=hidden.device)
    for piece, target in _pieces(hidden, weight, targets):
        z = piece @ weight.T
        total += run_compiled(normalizer, backend, z, _chosen(z, target), target, soft_cap)[0]
    return total


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        soft_cap: SoftCap,
        backend: Backend | None,
    ) -> torch.Tensor:
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = _in_one_dtype(hidden.detach(), weight.detach())
        total = torch.zeros((), device=hidden.device)
        hidden_grads: list[torch.Tensor] = []
        weight_grad: torch.Tensor | None = None
        for piece, target in _pieces(hidden, weight, targets):
            z = piece @ weight.T
            loss, lse = run_compiled(normalizer, backend, z, _chosen(z, target), target, soft_cap)
            total += loss
            run_compiled(into_gradient, backend, z, target, lse, soft_cap)
            if for_hidden:
                hidden_grads.append(z @ weight)
            # Added up in fp32 whatever the weight's type
            if for_weight:
                part = z.T @ piece
                weight_grad = part.float() if weight_grad is None else weight_grad.add_(part)
        ctx.save_for_backward(torch.cat(hidden_grads) if hidden_grads else None, weight_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        of_hidden, of_weight = ctx.dtypes
        return (
            None if hidden_grad is None else (hidden_grad * grad.to(hidden_grad.dtype)).to(of_hidden),
            None if weight_grad is None else (weight_grad * grad).to(of_weight),
            None,
            None,
            None,
        )


def normalizer(
    z: torch.Tensor, chosen: torch.Tensor, targets: torch.Tensor, soft_cap: SoftCap
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the losses, fp32 0-d; log of the sum of exponentials (N, 1) fp32) of uncapped logits z (N, V).

    chosen: (N, 1), those of the targets (N,), taken out beforehand: capped again here, they need not be kept capped.
    """
    y = soft_capped(z.float(), soft_cap)
    # Within ±15 nothing overflows, and a pass for the largest is saved.
    bounded = soft_cap != "none"
    lse = y.exp().sum(-1, keepdim=True).log() if bounded else y.logsumexp(-1, keepdim=True)
    losses = lse - soft_capped(chosen.float(), soft_cap)
    return torch.where(targets[:, None] != IGNORED, losses, 0.0).sum(), lse


def into_gradient(z: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, soft_cap: SoftCap) -> None:
    """Overwrites uncapped logits z (N, V) with the gradient of `normalizer`'s loss: (softmax − one-hot)·dy/dz."""
    x = z.float()
    slope: torch.Tensor | None = None
    if soft_cap == "tanh":
        unit = torch.tanh(x / CAP)
        y, slope = CAP * unit, 1 - unit.square()
    elif soft_cap == "algebraic":
        inverse = torch.rsqrt(x.square() + CAP**2)
        y, slope = CAP * x * inverse, inverse.pow(3).mul_(CAP**3)
    else:
        y = x
    gradient = y.sub_(lse).exp_()
    gradient.add_(torch.arange(z.shape[1], device=z.device) == targets[:, None], alpha=-1)
    if slope is not None:
        gradient.mul_(slope)
    z.copy_(gradient.masked_fill_(targets[:, None] == IGNORED, 0.0))


def _chosen(z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The logits (N, 1) of the targets; of an ignored target, any."""
    return z.gather(1, targets.clamp_min(0)[:, None])


def _in_one_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What autocast would make of a product's two factors, once instead of for each piece."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden, weight
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype)


def _pieces(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    rows = max(1, PIECE.get(hidden.device.type, PIECE["cuda"]) // len(weight))
    return zip(hidden.split(rows), targets.split(rows), strict=True)
