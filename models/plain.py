"""The plain GPT of modded-nanoGPT's optimizer benchmark (track 3): the model for races that others can check.

Biases on every linear layer, RMSNorm with gains, queries and keys normalized without, half of the rotary pairs turn, softmax
scale 0.12, ReLU², untied head, logits soft-capped at 15; plain causal attention over the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from models.attention import Mask, attend
from models.base import LanguageModel
from models.cache import Cache
from models.config import Sizes
from models.gpt2 import HUB_CODE, Turn, gpt_hub_config, norm, rotary, split

# Where projections do not start at zero
STD = {"o": 0.026, "up": 0.031, "down": 0.031}
# A window that no sequence fills
WIDE = 1 << 30


class PlainAttention(nn.Module):
    """Output projection zero at the start."""

    def __init__(self, c: Sizes, layer: int):
        super().__init__()
        self.heads, self.layer = c.heads, layer
        inner = c.heads * c.head_width
        self.q, self.k, self.v = (nn.Linear(c.width, inner) for _ in range(3))
        self.o = nn.Linear(inner, c.width)

    def forward(self, x: torch.Tensor, mask: Mask | None, turn: Turn) -> torch.Tensor:
        """mask: None for plain causal attention among the tokens x (B, T, width) themselves."""
        q, k, v = (split(linear(x), self.heads) for linear in (self.q, self.k, self.v))
        q, k = turn(norm(q)), turn(norm(k))
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.12)
        else:
            y = attend(q, k, v, mask, 0.12, self.layer)
        return self.o(y.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    """ReLU squared, output projection zero at the start."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu().square())


class PlainBlock(nn.Module):
    """Attention and MLP, each on the normalized x."""

    def __init__(self, c: Sizes, layer: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(c.width), nn.RMSNorm(c.width)
        self.attention, self.mlp = PlainAttention(c, layer), PlainMLP(c.width, c.mlp_width)

    def forward(self, x: torch.Tensor, mask: Mask | None, turn: Turn) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x).to(x.dtype), mask, turn)
        return x + self.mlp(self.mlp_norm(x).to(x.dtype))


class PlainGPT(LanguageModel):
    """12 layers of width 768 at full size: 50,304 rows of embedding and head."""

    soft_cap = "algebraic"
    hub_code = HUB_CODE

    def __init__(self, config: Sizes):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.embed_norm, self.norm = nn.RMSNorm(c.width), nn.RMSNorm(c.width)
        self.layers = nn.ModuleList(PlainBlock(c, i) for i in range(c.layers))
        self.head = nn.Linear(c.width, c.vocab_size)
        nn.init.normal_(self.embed.weight)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                std = math.sqrt(0.33 / module.in_features)
                if not c.zero_projections:
                    std = STD.get(name.rpartition(".")[2], std)
                elif name == "head" or name.endswith((".o", ".down")):
                    std = 0.0
                nn.init.normal_(module.weight, std=std)

    def hub_config(self, progress: float) -> dict[str, Any]:
        return gpt_hub_config(self.config, "plain", WIDE) | {"document_token_id": -1}

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    @property
    def tables(self) -> list[nn.Module]:
        """The embedding table, of another dtype than the rest on a GPU."""
        return [self.embed]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def make_cache(self) -> Cache:
        return Cache()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PlainGPT:
        """On a GPU the table is kept in bf16."""
        super()._apply(fn, recurse)
        if self.embed.weight.device.type == "cuda" and self.embed.weight.dtype == torch.float32:
            self.as_on_a_gpu()
        return self

    def as_on_a_gpu(self) -> None:
        self.embed.bfloat16()

    def hidden(self, tokens: torch.Tensor, progress: float, cache: Cache | None = None) -> torch.Tensor:
        first = 0 if cache is None else cache.length
        turn = rotary(tokens.shape[1], self.config.head_width, tokens.device, first)
        mask = None if cache is None else cache.mask(cache.documents(tokens, -1), WIDE)
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.head.weight.dtype
        x = self.embed_norm(self.embed(tokens).to(self.embed_norm.weight.dtype)).to(dtype)
        for block in self.layers:
            x = block(x, mask, turn)
        return self.norm(x).to(dtype)
