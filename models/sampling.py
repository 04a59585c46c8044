"""The next token from logits: temperature, top-k, top-p (nucleus sampling: Holtzman et al. 2020)."""

from __future__ import annotations

import torch


def choose(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """(B, 1) int64 tokens drawn from logits (B, V) fp32; temperature 0 takes the likeliest.

    top_k keeps the k likeliest tokens; top_p keeps the fewest likeliest ones whose probabilities, after temperature and
    top_k, add up to at least top_p. The generator may live on the CPU whatever the logits' device.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # Relative to the largest, since a small temperature divides beyond fp32
    logits = logits.float() - logits.float().amax(-1, keepdim=True)
    logits = logits / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        # The likeliest token always stays
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered.masked_fill(beyond, 0.0))
    if generator is not None and generator.device != probabilities.device:
        return torch.multinomial(probabilities.to(generator.device), 1, generator=generator).to(logits.device)
    return torch.multinomial(probabilities, 1, generator=generator)
