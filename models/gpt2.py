"""GPT-2 small and medium as modded-nanoGPT trains them, from the records of 2025-01-04 and 2025-04-22.

Written from the facts of those records; how a rule of the full size carries over to another number of layers is said
where it is computed. Every scalar is at least one-dimensional: FSDP2 takes no 0-d parameters.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from models.attention import BLOCK, Mask, attend, documents, make_mask
from models.base import LanguageModel
from models.cache import Cache
from models.config import Sizes
from polargrad_dist.errors import ConfigError

HUB_CODE = Path(__file__).parent / "hub" / "modeling_polargrad_gpt.py"


def gpt_hub_config(c: Sizes, variant: str, window: int) -> dict[str, Any]:
    """The ``config.json`` of an export that `HUB_CODE` reads. window: tokens that a query sees back."""
    marker = c.end_of_text if 0 <= c.end_of_text < c.vocab_size else None
    return {
        "model_type": "polargrad_gpt",
        "architectures": ["PolarGradGPTForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{HUB_CODE.stem}.PolarGradGPTConfig",
            "AutoModelForCausalLM": f"{HUB_CODE.stem}.PolarGradGPTForCausalLM",
        },
        "variant": variant,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "head_dim": c.head_width,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.max_sequence_length,
        "window": window,
        "document_token_id": c.end_of_text,
        "bos_token_id": marker,
        "eos_token_id": marker,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without weights, in x's own type (autocast would hand back fp32)."""
    return F.rms_norm(x, (x.shape[-1],)).to(x.dtype)


@dataclass(frozen=True)
class Turn:
    """cos and sin (T, head_width/2) of the rotary angles, fp32; an object, since FSDP2 casts bare tensors on their way."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Turns dimension i with i + head_width/2 of x (B, heads, T, head_width)."""
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * self.cos + b * self.sin, b * self.cos - a * self.sin], -1).to(x.dtype)


def rotary(length: int, head_width: int, device: torch.device, first: int = 0) -> Turn:
    """Half of the pairs turn with frequencies 1 to 1/1024, the others do not. ``first``: position of the first token."""
    turning = head_width // 4
    frequencies = (1 / 1024) ** torch.linspace(0, 1, turning, device=device)
    frequencies = torch.cat([frequencies, frequencies.new_zeros(head_width // 2 - turning)])
    angles = torch.arange(first, first + length, device=device, dtype=torch.float32)[:, None] * frequencies
    return Turn(angles.cos(), angles.sin())


def value_layers(layers: int) -> dict[int, int]:
    """Layer -> its value embedding: three tables on the first three and the last three layers, fewer below 12 layers."""
    tables = max(1, min(3, layers // 4))
    return {i: i for i in range(tables)} | {layers - tables + i: i for i in range(tables)}


def attention_free(layers: int, full: int) -> int | None:
    """The layer without attention: the eighth of ``full``, scaled; none in models of fewer than 4 layers."""
    return 7 * layers // full if layers >= 4 else None


class MLP(nn.Module):
    """ReLU squared, output projection zero at the start."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu().square())


class SmallAttention(nn.Module):
    """Heads with normalized q and k, values mixed with a value embedding, output projection zero at the start."""

    def __init__(self, c: Sizes, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.head_width = c.heads, c.head_width
        inner = c.heads * c.head_width
        self.q, self.k, self.v = (nn.Linear(c.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, c.width, bias=False)
        nn.init.zeros_(self.o.weight)
        self.mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.scale = 1 / math.sqrt(c.head_width)

    def forward(self, x: torch.Tensor, ve: torch.Tensor | None, mask: Mask, turn: Turn) -> torch.Tensor:
        q, k, v = (split(linear(x), self.heads) for linear in (self.q, self.k, self.v))
        # Without a value embedding its weight still takes part, times zero, so that its gradient exists on every rank.
        v = self.mix[0] * v + (self.mix[1] * split(ve, self.heads) if ve is not None else 0 * self.mix[1])
        y = attend(turn(norm(q)), turn(norm(k)), v.to(q.dtype), mask, self.scale, self.layer)
        return self.o(y.transpose(1, 2).flatten(2))


class MediumAttention(nn.Module):
    """q, k, v, o in one 4 x inner x width tensor; values normalized too; softmax scale 0.12."""

    def __init__(self, c: Sizes, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = c.heads
        inner = c.heads * c.head_width
        self.qkvo = nn.Parameter(torch.empty(4, inner, c.width))
        start_uniform(self.qkvo)
        nn.init.zeros_(self.qkvo.data[3])

    def forward(
        self, x: torch.Tensor, ve: torch.Tensor | None, mask: Mask, turn: Turn, mix: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (split(F.linear(x, weight), self.heads) for weight in self.qkvo[:3].unbind())
        v = mix[0] * norm(v) + (mix[1] * split(ve, self.heads) if ve is not None else 0 * mix[1])
        y = attend(turn(norm(q)), turn(norm(k)), v.to(q.dtype), mask, 0.12, self.layer)
        return F.linear(y.transpose(1, 2).flatten(2), self.qkvo[3].T)


def start_uniform(weight: torch.Tensor) -> None:
    """Uniform with standard deviation ½·d_in^(−½) for weights (…, d_in), as in the medium record; Linear's own is 0.577."""
    bound = math.sqrt(3) * 0.5 / math.sqrt(weight.shape[-1])
    nn.init.uniform_(weight, -bound, bound)


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, heads * d) to (B, heads, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SmallBlock(nn.Module):
    """x <- a x + b x0, then attention and MLP, both on the normalized x."""

    def __init__(self, c: Sizes, layer: int, has_attention: bool):
        super().__init__()
        self.attention = SmallAttention(c, layer) if has_attention else None
        self.mlp = MLP(c.width, c.mlp_width)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(
        self, x: torch.Tensor, x0: torch.Tensor, ve: torch.Tensor | None, mask: Mask, turn: Turn
    ) -> torch.Tensor:
        x = (self.mix[0] * x + self.mix[1] * x0).to(x.dtype)
        if self.attention is not None:
            x = x + self.attention(norm(x), ve, mask, turn)
        return x + self.mlp(norm(x))


class MediumBlock(nn.Module):
    """As the small one, but attention takes x as it is, and the scalars come from the model's one tensor."""

    def __init__(self, c: Sizes, layer: int, has_attention: bool):
        super().__init__()
        self.attention = MediumAttention(c, layer) if has_attention else None
        self.mlp = MLP(c.width, c.mlp_width)
        start_uniform(self.mlp.up.weight)

    def forward(
        self,
        x: torch.Tensor,
        x0: torch.Tensor,
        ve: torch.Tensor | None,
        mask: Mask,
        turn: Turn,
        mix: torch.Tensor,
        value_mix: torch.Tensor,
    ) -> torch.Tensor:
        x = (mix[0] * x + mix[1] * x0).to(x.dtype)
        if self.attention is not None:
            x = x + self.attention(x, ve, mask, turn, value_mix)
        return x + self.mlp(norm(x))


class GPT2(LanguageModel):
    """What small and medium share: tables, masks, the head."""

    block: type[nn.Module]
    full_layers: int

    def __init__(self, config: Sizes, head_rows: int):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        inner = c.heads * c.head_width
        self.value_of = value_layers(c.layers)
        self.value_embeds = nn.ModuleList(
            nn.Embedding(c.vocab_size, inner) for _ in range(max(self.value_of.values()) + 1)
        )
        bare = attention_free(c.layers, self.full_layers)
        self.layers = nn.ModuleList(self.block(c, i, i != bare) for i in range(c.layers))
        self.head = nn.Linear(c.width, head_rows, bias=False)
        nn.init.zeros_(self.head.weight)

    hub_code = HUB_CODE

    def hub_config(self, progress: float) -> dict[str, Any]:
        variant = self.config.architecture.removeprefix("gpt2-")
        return gpt_hub_config(self.config, variant, self.window(progress))

    @abstractmethod
    def window(self, progress: float) -> int:
        """Tokens that a query sees back where windows are long."""

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def parameter_hints(self) -> dict[str, dict[str, Any]]:
        return {f"value_embeds.{i}.weight": {"role": "value_embed"} for i in range(len(self.value_embeds))}

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    @property
    def tables(self) -> list[nn.Module]:
        """The embedding tables. FSDP2 wants one type of parameters per unit, so each must be sharded on its own."""
        return [self.embed, *self.value_embeds]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GPT2:
        """Where ``to``, ``cuda`` and the like all end: on a GPU the tables are kept in bf16."""
        super()._apply(fn, recurse)
        if self.embed.weight.device.type == "cuda" and self.embed.weight.dtype == torch.float32:
            self.as_on_a_gpu()
        return self

    def as_on_a_gpu(self) -> None:
        for table in self.tables:
            table.bfloat16()

    def _flex(self, tokens: torch.Tensor) -> bool:
        gpu = tokens.device.type == "cuda"
        if self.config.attention == "flex" and not gpu and torch.is_grad_enabled():
            raise ConfigError(
                "model.attention is 'flex', which PyTorch differentiates on a GPU only: set it to 'auto'"
            )
        # FlexAttention's kernels take no head narrower than 16.
        return self.config.attention == "flex" or (
            self.config.attention == "auto" and gpu and self.config.head_width >= 16
        )

    def make_cache(self) -> Cache:
        return Cache()

    def _masks(self, tokens: torch.Tensor, windows: list[int], cache: Cache | None) -> list[Mask]:
        """The masks of tokens (B, T) for each window, with what the cache holds before them."""
        if cache is not None:
            docs = cache.documents(tokens, self.config.end_of_text)
            return [cache.mask(docs, window) for window in windows]
        docs, flex = documents(tokens, self.config.end_of_text), self._flex(tokens)
        return [make_mask(docs, window, flex) for window in windows]

    def _start(
        self, tokens: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, list[torch.Tensor], Turn]:
        """x0 (B, T, width), the value embeddings (B, T, inner), and the rotary angles' cos and sin."""
        first = 0 if cache is None else cache.length
        turn = rotary(tokens.shape[1], self.config.head_width, tokens.device, first)
        # Blocks compute in the matrices' type, whatever that of the tables
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.head.weight.dtype
        return (
            norm(self.embed(tokens)).to(dtype),
            [table(tokens).to(dtype) for table in self.value_embeds],
            turn,
        )


class GPT2Small(GPT2):
    """GPT-2 small ("124M"): U-net skips from the first half of the blocks to the second, one window for all layers."""

    block = SmallBlock
    full_layers = 12
    soft_cap = "tanh"

    def __init__(self, config: Sizes):
        super().__init__(config, config.vocab_size)
        self.skip = nn.Parameter(torch.ones(config.layers // 2))

    def window(self, progress: float) -> int:
        """Tokens that a query sees back: linear from 128 to 1,856 over training, floored to whole blocks."""
        return int((BLOCK + (1856 - BLOCK) * progress) // BLOCK * BLOCK)

    def hidden(self, tokens: torch.Tensor, progress: float, cache: Cache | None = None) -> torch.Tensor:
        x0, values, turn = self._start(tokens, cache)
        (mask,) = self._masks(tokens, [self.window(progress)], cache)
        # Were it x0 itself, the first block would be compiled on its own
        x = x0.clone()
        kept: list[torch.Tensor] = []
        half = self.config.layers // 2
        for i, block in enumerate(self.layers):
            if i >= self.config.layers - half:
                x = x + self.skip[i - self.config.layers + half].to(x.dtype) * kept.pop()
            table = self.value_of.get(i)
            x = block(x, x0, None if table is None else values[table], mask, turn)
            if i < half:
                kept.append(x)
        return norm(x)


class GPT2Medium(GPT2):
    """GPT-2 medium ("350M"): three skips, long windows in four blocks and half-length ones in the others."""

    block = MediumBlock
    full_layers = 16
    soft_cap = "algebraic"

    def __init__(self, config: Sizes):
        super().__init__(config, -(-config.vocab_size // BLOCK) * BLOCK)
        layers = config.layers
        # One tensor of 5 scalars a layer: a skip weight, two of the block, two of its attention.
        self.scalars = nn.Parameter(
            torch.cat(
                [torch.ones(layers), torch.tensor([1.0, 0.0]).repeat(layers), torch.full((2 * layers,), 0.5)]
            )
        )
        at = lambda i: i * layers // 16  # noqa: E731
        self.skip_from = {at(to): at(start) for to, start in ((9, 6), (10, 4), (11, 2)) if at(start) < at(to)}
        self.long = {at(0), at(4), at(11), layers - 1}

    def parameter_hints(self) -> dict[str, dict[str, Any]]:
        decay = {
            f"layers.{i}.mlp.{name}.weight": {"weight_decay_scale": 2.0}
            for i in range(self.config.layers)
            for name in ("up", "down")
        }
        stacks = {
            f"{name}.qkvo": {"role": "hidden"}
            for name, module in self.named_modules()
            if isinstance(module, MediumAttention)
        }
        return super().parameter_hints() | decay | stacks | {"scalars": {"role": "scalar"}}

    def window(self, progress: float) -> int:
        """Tokens that a long block's query sees back: 3456 (4t³ - 6t² + 3t), rounded up to whole blocks."""
        t = progress
        return max(BLOCK, math.ceil(3456 * (4 * t**3 - 6 * t**2 + 3 * t) / BLOCK) * BLOCK)

    def hidden(self, tokens: torch.Tensor, progress: float, cache: Cache | None = None) -> torch.Tensor:
        x0, values, turn = self._start(tokens, cache)
        window = self.window(progress)
        long, short = self._masks(tokens, [window, window // 2 // BLOCK * BLOCK], cache)
        layers = self.config.layers
        skip, mix, value_mix = self.scalars.split([layers, 2 * layers, 2 * layers])
        mix, value_mix = mix.view(layers, 2), value_mix.view(layers, 2)
        # Were it x0 itself, the first block would be compiled on its own
        x = x0.clone()
        kept: dict[int, torch.Tensor] = {}
        for i, block in enumerate(self.layers):
            if i in self.skip_from:
                x = x + skip[i].to(x.dtype) * kept[self.skip_from[i]]
            table = self.value_of.get(i)
            ve = None if table is None else values[table]
            x = block(x, x0, ve, long if i in self.long else short, turn, mix[i], value_mix[i])
            kept[i] = x
        return norm(x)
