"""What every model here can do, whatever its architecture: loss or logits, blocks by name, text, its cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from models.attention import BLOCK
from models.config import Sizes
from models.loss import Backend, SoftCap, loss_sum, soft_capped
from polargrad_dist.errors import ConfigError


class LanguageModel(nn.Module, ABC):
    """A causal language model. ``model(tokens, targets)`` is the mean loss in nats, ``model(tokens)`` the logits."""

    config: Sizes
    soft_cap: SoftCap = "none"
    # What compiles the loss: `compile_blocks` sets it; on a GPU it is always compiled.
    loss_backend: Backend | None = None

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks: what is compiled, checkpointed and sharded one by one."""

    @abstractmethod
    def hidden(self, tokens: torch.Tensor, progress: float) -> torch.Tensor:
        """The normalized output of the last block, (B, T, width)."""

    @abstractmethod
    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""

    @abstractmethod
    def get_output_embeddings(self) -> nn.Linear:
        """The head."""

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Logits (…, V) in fp32, of hidden states (…, width) and the head's weight (V, width)."""
        return soft_capped(F.linear(hidden, weight).float(), self.soft_cap)

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None, *, progress: float = 0.0
    ) -> torch.Tensor:
        """Mean cross-entropy (fp32, 0-d) over targets other than -100, or logits (B, T, V) without targets.

        tokens, targets: (B, T) int64. progress: the part of training that is done, in [0, 1].
        """
        limit = self.config.max_sequence_length
        if tokens.shape[1] > limit:
            raise ConfigError(
                f"the sequences have {tokens.shape[1]} tokens, model.max_sequence_length allows {limit}: raise it, or "
                "lower trainer.sequence_length"
            )
        hidden = self.hidden(tokens, progress)
        weight = self.get_output_embeddings().weight
        if targets is None:
            return self.logits(hidden, weight)
        backend = self.loss_backend or ("inductor" if hidden.device.type == "cuda" else None)
        total = loss_sum(hidden.flatten(0, 1), weight, targets.flatten(), self.soft_cap, backend=backend)
        return total / (targets != -100).sum()

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_sequence_length(self) -> int:
        return self.config.max_sequence_length

    def parameter_hints(self) -> dict[str, dict[str, Any]]:
        """Roles and splits of parameters that their modules do not tell."""
        return {}

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block, and the loss; much quicker to the first step than the whole model, and names stay as they
        are."""
        # Blocks share their code: up to 4 kinds of them, each in training, in evaluation and in sampling. Beyond the limit
        # (8) PyTorch would go on uncompiled, where FlexAttention holds all scores at once.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 32)
        self.loss_backend = options.get("backend", "inductor")
        for block in self.blocks:
            block.compile(**options)

    def checkpoint_blocks(self) -> None:
        """Recomputes each block's activations in backward instead of keeping them. Before `compile_blocks`."""
        for block in self.blocks:
            plain = block.forward

            def forward(*args: Any, _plain: Any = plain, **kwargs: Any) -> Any:
                return checkpoint(_plain, *args, use_reentrant=False, **kwargs)

            block.forward = forward

    def flops_per_token(self, sequence_length: int) -> float:
        """Flops of forward and backward per token: 6 for every weight that multiplies, 12·T·heads·head_width a layer.

        The usual count for MFU: embedding tables are looked up, attention counts as if it were neither causal nor
        windowed, recomputed activations do not count.
        """
        c = self.config
        tables = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        weights = sum(p.numel() for p in self.parameters()) - tables
        return 6.0 * weights + 12.0 * c.layers * c.heads * c.head_width * sequence_length

    @torch.no_grad()
    def generate(
        self,
        tokens: torch.Tensor,
        new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continues tokens (B, T) by sampling; returns (B, T + new_tokens). Temperature 0 takes the likeliest.

        Nothing is cached between tokens: meant for samples of a run, not for serving. Call ``eval()`` before.
        """
        for _ in range(new_tokens):
            window = tokens[:, -self.max_sequence_length :]
            length = window.shape[1]
            # Whole blocks, so that compiled code meets few shapes; no token sees what is padded behind it.
            whole = min(-(-length // BLOCK) * BLOCK, self.max_sequence_length)
            logits = self(F.pad(window, (0, whole - length)), progress=1.0)[:, length - 1, : self.vocab_size]
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            if temperature == 0:
                chosen = logits.argmax(-1, keepdim=True)
            else:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, chosen], 1)
        return tokens
