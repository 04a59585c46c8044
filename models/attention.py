"""Causal attention within documents and a sliding window of 128-token blocks: FlexAttention on a GPU, SDPA elsewhere.

Both paths have the same mask; `tests/models` holds them against each other. The window enters as a tensor, never as a
Python number: it grows during training, and each new number would compile every kernel again.
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
    """Which keys each query sees, for one window: ``flex`` a BlockMask or ``dense`` a (B, 1, T, T) boolean.

    With a ``cache`` (see `models.cache`) queries see earlier tokens too, and ``dense`` is (B, 1, T, all tokens).
    """

    flex: Any = None
    dense: torch.Tensor | None = None
    cache: Any = None


def documents(tokens: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """(B, T) number of the document of each token; an end-of-text token opens the next one."""
    return (tokens == end_of_text).cumsum(1)


def make_mask(docs: torch.Tensor, window: int, flex: bool) -> Mask:
    """The mask of a batch with documents docs (B, T): a query sees ``window`` tokens back, counted in whole blocks.

    A window below 128 tokens is one block, the query's own.
    """
    blocks = torch.full((), max(1, window // BLOCK), dtype=torch.int64, device=docs.device)
    if flex:
        return Mask(flex=block_mask(docs, blocks))
    at = torch.arange(docs.shape[1], device=docs.device)
    near = (at[:, None] >= at) & (at[:, None] // BLOCK - at // BLOCK < blocks)
    return Mask(dense=(near & (docs[:, :, None] == docs[:, None, :])).unsqueeze(1))


def block_mask(docs: torch.Tensor, blocks: torch.Tensor) -> Any:
    """FlexAttention's BlockMask for windows of ``blocks`` (0-d), made from the documents at the ends of each block.

    Documents are numbered in order, so their two ends say all about a block: T²/128² entries are made instead of the T² of
    ``create_block_mask``, which at 65,536 tokens is 4 GiB.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (docs[b, q] == docs[b, k]) & (q // BLOCK - k // BLOCK < blocks)

    length = docs.shape[1]
    at = torch.arange(-(-length // BLOCK), device=docs.device)
    first, last = docs[:, at * BLOCK], docs[:, (at * BLOCK + BLOCK - 1).clamp(max=length - 1)]
    near = (at[:, None] >= at) & (at[:, None] - at < blocks)
    seen = near & (first[:, :, None] <= last[:, None, :])
    whole = seen & (at[:, None] > at) & (last[:, :, None] == first[:, None, :])
    # A query block that the sequence does not fill is masked one by one
    whole &= (at < length // BLOCK)[:, None]
    partial = seen & ~whole

    def listed(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = entries.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return entries.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float, layer: int = 0
) -> torch.Tensor:
    """Attention of q, k, v (B, heads, T, head_width) under a mask; ``layer`` finds the mask's cached keys and values."""
    if mask.cache is not None:
        k, v = mask.cache.join(layer, k, v)
    if mask.flex is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense, scale=scale)
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        return _compiled_flex()(q, k, v, block_mask=mask.flex, scale=scale)
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask.flex, scale=scale)
