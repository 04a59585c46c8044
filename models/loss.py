"""Cross-entropy of the head without the logits of the whole batch: gradients are taken piece by piece in forward.

Where logits outweigh the model (4,096 tokens x 151,936 entries are 2.5 GB in fp32, several times over), keeping a piece
at a time saves them all; taking the gradient at once saves making them again in backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

PIECE = {"cuda": 1 << 28, "cpu": 1 << 24}  # logits that exist at a time: 1 GiB in fp32, and 64 MiB

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def loss_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, logits: Logits
) -> torch.Tensor:
    """Sum of the cross-entropies in nats, fp32 0-d; targets of -100 count nothing.

    hidden: (N, width); weight: (V, width) of the head; targets: (N,) int64; logits: (hidden, weight) -> (N, V) fp32.
    """
    return _LossSum.apply(hidden, weight, targets, logits)


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, logits: Logits
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[:2]
        leaf = weight.detach().requires_grad_(wanted[1])
        rows = max(1, PIECE.get(hidden.device.type, PIECE["cuda"]) // len(weight))
        total = torch.zeros((), device=hidden.device)
        hidden_grads: list[torch.Tensor] = []
        weight_grad: torch.Tensor | None = None
        for piece, target in zip(hidden.detach().split(rows), targets.split(rows), strict=True):
            piece.requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                loss = F.cross_entropy(logits(piece, leaf), target, reduction="sum")
            total += loss.detach()
            inputs = [x for x, needed in zip((piece, leaf), wanted, strict=True) if needed]
            grads = list(torch.autograd.grad(loss, inputs)) if inputs else []
            if wanted[0]:
                hidden_grads.append(grads.pop(0))
            if wanted[1]:  # added up in fp32 whatever the weight's type
                weight_grad = grads[0].float() if weight_grad is None else weight_grad.add_(grads[0])
        ctx.save_for_backward(torch.cat(hidden_grads) if hidden_grads else None, weight_grad)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * grad.to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * grad).to(ctx.dtype),
            None,
            None,
        )
