"""The GPT-2 models of modded-nanoGPT for Transformers (4.57 and 5): ``trust_remote_code=True`` loads this file.

It stands alone and lies beside the weights of an export. Parameter names are those of training. Inference and fine-tuning
compute what training did: attention within documents and within a window of 128-token blocks, fixed at the width that the
checkpoint was trained with last. The cache holds keys and values, and of each token its document and position.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

BLOCK = 128
# The document of padding tokens
PADDING = -1


class PolarGradGPTConfig(PretrainedConfig):
    """Sizes of a GPT-2 "small" or "medium" or of the "plain" GPT, and what inference needs to know of its training.

    window: tokens that a query sees back, in whole blocks of 128. document_token_id: the token that opens a document; -1:
    a sequence is one document.
    """

    model_type = "polargrad_gpt"

    def __init__(
        self,
        variant: str = "small",
        vocab_size: int = 50304,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        head_dim: int = 128,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 65536,
        window: int = 1792,
        document_token_id: int = 50256,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        if variant not in ("small", "medium", "plain"):
            raise ValueError(f"variant is {variant!r}, expected 'small', 'medium' or 'plain'")
        self.variant = variant
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.window = window
        self.document_token_id = document_token_id
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without weights, in x's own type."""
    return F.rms_norm(x, (x.shape[-1],)).to(x.dtype)


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, heads * d) to (B, heads, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Context:
    """What all layers share in one forward pass: rotary angles, masks, the cache."""

    def __init__(self, positions: torch.Tensor, head_dim: int, cache: Any, masks: tuple[torch.Tensor, ...]):
        """positions: (B, T) int64. masks: of long and of short windows, (B, 1, T, S) boolean."""
        turning = head_dim // 4
        frequencies = (1 / 1024) ** torch.linspace(0, 1, turning, device=positions.device)
        frequencies = torch.cat([frequencies, frequencies.new_zeros(head_dim // 2 - turning)])
        angles = positions[:, None, :, None].float() * frequencies
        self.cos, self.sin = angles.cos(), angles.sin()
        self.cache, self.masks = cache, masks
        self.layer = 0

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Turns dimension i with i + d/2 of x (B, heads, T, d); half of the pairs have frequency 0."""
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * self.cos + b * self.sin, b * self.cos - a * self.sin], -1).to(x.dtype)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, short: bool
    ) -> torch.Tensor:
        if self.cache is not None:
            k, v = self.cache.update(k, v, self.layer)
            self.layer += 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.masks[short], scale=scale)
        return y.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu().square())


class SmallAttention(nn.Module):
    def __init__(self, c: PolarGradGPTConfig):
        super().__init__()
        self.heads, inner = c.num_attention_heads, c.num_attention_heads * c.head_dim
        self.q, self.k, self.v = (nn.Linear(c.hidden_size, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, c.hidden_size, bias=False)
        self.mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.scale = 1 / math.sqrt(c.head_dim)

    def forward(
        self, x: torch.Tensor, ve: torch.Tensor | None, context: Context, short: bool, mix: None
    ) -> torch.Tensor:
        q, k, v = (split(linear(norm(x)), self.heads) for linear in (self.q, self.k, self.v))
        v = self.mix[0] * v
        if ve is not None:
            v = v + self.mix[1] * split(ve, self.heads)
        q, k = context.turn(norm(q)), context.turn(norm(k))
        return self.o(context.attend(q, k, v.to(q.dtype), self.scale, short))


class MediumAttention(nn.Module):
    def __init__(self, c: PolarGradGPTConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.qkvo = nn.Parameter(torch.empty(4, c.num_attention_heads * c.head_dim, c.hidden_size))

    def forward(
        self, x: torch.Tensor, ve: torch.Tensor | None, context: Context, short: bool, mix: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (split(F.linear(x, weight), self.heads) for weight in self.qkvo[:3].unbind())
        v = mix[0] * norm(v)
        if ve is not None:
            v = v + mix[1] * split(ve, self.heads)
        q, k = context.turn(norm(q)), context.turn(norm(k))
        return F.linear(context.attend(q, k, v.to(q.dtype), 0.12, short), self.qkvo[3].T)


class Block(nn.Module):
    def __init__(self, c: PolarGradGPTConfig, has_attention: bool):
        super().__init__()
        small = c.variant == "small"
        attention = SmallAttention if small else MediumAttention
        self.attention = attention(c) if has_attention else None
        self.mlp = MLP(c.hidden_size, c.intermediate_size, bias=False)
        if small:
            self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(
        self,
        x: torch.Tensor,
        x0: torch.Tensor,
        ve: torch.Tensor | None,
        context: Context,
        short: bool,
        mix: torch.Tensor,
        value_mix: torch.Tensor | None,
    ) -> torch.Tensor:
        x = (mix[0] * x + mix[1] * x0).to(x.dtype)
        if self.attention is not None:
            x = x + self.attention(x, ve, context, short, value_mix)
        return x + self.mlp(norm(x))


class PlainBlock(nn.Module):
    def __init__(self, c: PolarGradGPTConfig):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(c.hidden_size), nn.RMSNorm(c.hidden_size)
        self.attention = PlainAttention(c)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, bias=True)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x).to(x.dtype), context)
        return x + self.mlp(self.mlp_norm(x).to(x.dtype))


class PlainAttention(nn.Module):
    def __init__(self, c: PolarGradGPTConfig):
        super().__init__()
        self.heads, inner = c.num_attention_heads, c.num_attention_heads * c.head_dim
        self.q, self.k, self.v = (nn.Linear(c.hidden_size, inner) for _ in range(3))
        self.o = nn.Linear(inner, c.hidden_size)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        q, k, v = (split(linear(x), self.heads) for linear in (self.q, self.k, self.v))
        return self.o(context.attend(context.turn(norm(q)), context.turn(norm(k)), v, 0.12, False))


class PolarGradGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """``model(input_ids, attention_mask, past_key_values, labels)``, and ``generate`` with a cache."""

    config_class = PolarGradGPTConfig
    base_model_prefix = ""
    _no_split_modules = ["Block", "PlainBlock"]  # noqa: RUF012
    _supports_sdpa = True
    all_tied_weights_keys: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, config: PolarGradGPTConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.variant == "plain":
            self._build_plain(config)
        else:
            self._build(config)
        self.post_init()

    def _build_plain(self, c: PolarGradGPTConfig) -> None:
        self.embed_norm, self.norm = nn.RMSNorm(c.hidden_size), nn.RMSNorm(c.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(c) for _ in range(c.num_hidden_layers))
        self.head = nn.Linear(c.hidden_size, c.vocab_size)
        self.attention_layers = c.num_hidden_layers

    def _build(self, c: PolarGradGPTConfig) -> None:
        layers = c.num_hidden_layers
        full = 12 if c.variant == "small" else 16
        bare = 7 * layers // full if layers >= 4 else None
        tables = max(1, min(3, layers // 4))
        self.value_of = {i: i for i in range(tables)} | {layers - tables + i: i for i in range(tables)}
        inner = c.num_attention_heads * c.head_dim
        self.value_embeds = nn.ModuleList(nn.Embedding(c.vocab_size, inner) for _ in range(tables))
        self.layers = nn.ModuleList(Block(c, i != bare) for i in range(layers))
        rows = c.vocab_size if c.variant == "small" else -(-c.vocab_size // BLOCK) * BLOCK
        self.head = nn.Linear(c.hidden_size, rows, bias=False)
        if c.variant == "small":
            self.skip = nn.Parameter(torch.ones(layers // 2))
            self.long = set(range(layers))
        else:
            self.scalars = nn.Parameter(torch.ones(5 * layers))
            at = lambda i: i * layers // 16  # noqa: E731
            self.skip_from = {at(to): at(of) for to, of in ((9, 6), (10, 4), (11, 2)) if at(of) < at(to)}
            self.long = {at(0), at(4), at(11), layers - 1}
        self.attention_layers = layers - (bare is not None)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Its cache has one entry more than layers: `forward` makes it
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def _init_weights(self, module: nn.Module) -> None:
        """Every parameter comes from the checkpoint."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids: (B, T) int64. attention_mask: (B, past + T), 0 for padding. labels: as input_ids, -100 for none."""
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("this model takes input_ids only: values have embeddings of their own")
        use_cache = self.config.use_cache and labels is None if use_cache is None else use_cache
        cache = past_key_values
        if cache is None and use_cache:
            cache = DynamicCache()
        hidden = self._hidden(input_ids, attention_mask, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(hidden[:, kept])
        loss = None
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), shifted.flatten().to(logits.device))
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Soft-capped at 15, fp32; of medium with the rows that pad its head, which are classes that never occur."""
        z = self.head(hidden).float()
        if self.config.variant == "small":
            return 15 * torch.tanh(z / 15)
        return 15 * z * torch.rsqrt(z.square() + 225)

    def _hidden(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any) -> torch.Tensor:
        c, layers = self.config, self.config.num_hidden_layers
        context = self._context(tokens, attention_mask, cache)
        if c.variant == "plain":
            x = self.embed_norm(self.embed(tokens)).to(self.head.weight.dtype)
            for layer in self.layers:
                x = layer(x, context)
            return self.norm(x).to(x.dtype)
        x0 = norm(self.embed(tokens)).to(self.head.weight.dtype)
        values = [table(tokens).to(x0.dtype) for table in self.value_embeds]
        if c.variant == "small":
            mix, value_mix = [layer.mix for layer in self.layers], [None] * layers
            half = layers // 2
            skips = {layers - half + i: (half - 1 - i, self.skip[i]) for i in range(half)}
        else:
            skip, mix, value_mix = self.scalars.split([layers, 2 * layers, 2 * layers])
            mix, value_mix = mix.view(layers, 2), value_mix.view(layers, 2)
            skips = {to: (start, skip[to]) for to, start in self.skip_from.items()}
        x = x0
        kept: list[torch.Tensor] = []
        for i, block in enumerate(self.layers):
            if i in skips:
                start, weight = skips[i]
                x = x + weight.to(x.dtype) * kept[start]
            ve = values[self.value_of[i]] if i in self.value_of else None
            x = block(x, x0, ve, context, i not in self.long, mix[i], value_mix[i])
            kept.append(x)
        return norm(x)

    def _context(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any) -> Context:
        """Positions and documents of the new tokens, and who sees whom among old and new ones."""
        length = tokens.shape[1]
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask[:, -length:].long()
        opens = (tokens == self.config.document_token_id) & (real == 1)
        docs, positions = opens.cumsum(1), real.cumsum(1) - 1
        index = self.attention_layers
        if cache is not None and len(cache.layers) > index:
            past = cache.layers[index]
            docs = docs + past.keys[:, 0, -1:, 0]
            positions = positions + past.values[:, 0, -1:, 0] + 1
        docs, positions = docs.where(real == 1, PADDING), positions.clamp(min=0)
        all_docs, all_positions = docs, positions
        if cache is not None:
            a, b = cache.update(docs[:, None, :, None], positions[:, None, :, None], index)
            all_docs, all_positions = a[:, 0, :, 0], b[:, 0, :, 0]
        order = torch.arange(all_docs.shape[1], device=tokens.device)
        causal = order[-length:, None] >= order
        seen = causal & (docs[:, :, None] == all_docs[:, None, :])
        distance = positions[:, :, None] // BLOCK - all_positions[:, None, :] // BLOCK
        windows = (self.config.window // BLOCK, self.config.window // 2 // BLOCK)
        masks = tuple((seen & (distance < max(1, blocks))).unsqueeze(1) for blocks in windows)
        return Context(positions, self.config.head_dim, cache, masks)
