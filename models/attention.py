"""Causal attention within documents and a sliding window of 128-token blocks: FlexAttention on a GPU, SDPA elsewhere.

The two paths have the same mask; `tests/models` holds them against each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

BLOCK = 128


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees, for one window: ``flex`` a BlockMask or ``dense`` a (B, 1, T, T) boolean."""

    flex: Any = None
    dense: torch.Tensor | None = None


def documents(tokens: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """(B, T) number of the document of each token; an end-of-text token opens the next one."""
    return (tokens == end_of_text).cumsum(1)


def sees(docs: torch.Tensor, window: int) -> Callable[..., torch.Tensor]:
    """FlexAttention's mask function: causal, same document, at most ``window`` tokens back counted in whole blocks."""
    blocks = max(1, window // BLOCK)

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (docs[b, q] == docs[b, k]) & (q // BLOCK - k // BLOCK < blocks)

    return mask


def make_mask(docs: torch.Tensor, window: int, flex: bool) -> Mask:
    """The mask of a batch for windows of ``window`` tokens, a multiple of 128."""
    batch, length = docs.shape
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask

        return Mask(
            flex=create_block_mask(
                sees(docs, window), batch, None, length, length, device=docs.device, BLOCK_SIZE=BLOCK
            )
        )
    at = torch.arange(length, device=docs.device)
    visible = (at[:, None] >= at) & (at[:, None] // BLOCK - at // BLOCK < max(1, window // BLOCK))
    return Mask(dense=(visible & (docs[:, :, None] == docs[:, None, :])).unsqueeze(1))


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float) -> torch.Tensor:
    """Attention of q, k, v (B, heads, T, head_width) under a mask."""
    if mask.flex is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense, scale=scale)
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        return _compiled_flex()(q, k, v, block_mask=mask.flex, scale=scale)
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask.flex, scale=scale)
