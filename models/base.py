"""What every model here can do, whatever its architecture: loss or logits, blocks by name, text, its cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from models.config import Sizes
from models.loss import PIECE, SoftCap, loss_sum, soft_capped
from models.sampling import choose
from polargrad_dist.compiled import Backend
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
    def hidden(self, tokens: torch.Tensor, progress: float, cache: Any = None) -> torch.Tensor:
        """The normalized output of the last block, (B, T, width). ``cache``, one of `make_cache`, holds the tokens before
        these, and holds these too afterwards."""

    @abstractmethod
    def make_cache(self) -> Any:
        """An empty cache of keys and values for `forward`."""

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
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        progress: float = 0.0,
        cache: Any = None,
    ) -> torch.Tensor:
        """Mean cross-entropy (fp32, 0-d) over targets other than -100, or logits (B, T, V) without targets.

        tokens, targets: (B, T) int64. progress: the part of training that is done, in [0, 1]. With a ``cache`` tokens
        go on from those that it holds, and the logits are the last token's alone, (B, 1, V).
        """
        self.check_length(tokens)
        hidden = self.hidden(tokens, progress, cache)
        if targets is None:
            return self.logits(*self.with_bias(hidden if cache is None else hidden[:, -1:]))
        return self.loss(hidden, targets)

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy (fp32, 0-d) of hidden states (B, T, width) over targets (B, T) other than -100."""
        return self.loss_of(*self.with_bias(hidden), targets)

    def with_bias(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and a head's weight whose product are the logits before a cap: a bias is one column more of both."""
        head = self.get_output_embeddings()
        if head.bias is None:
            return hidden, head.weight
        ones = hidden.new_ones((*hidden.shape[:-1], 1))
        return torch.cat([hidden, ones], -1), torch.cat([head.weight, head.bias[:, None]], 1)

    def loss_of(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The same with a head's weight (V, width) given. The logits of the whole batch never exist."""
        backend = self.loss_backend or ("inductor" if hidden.device.type == "cuda" else None)
        total = loss_sum(hidden.flatten(0, 1), weight, targets.flatten(), self.soft_cap, backend=backend)
        return total / (targets != -100).sum()

    def loss_bytes(self, tokens: int, itemsize: int) -> int:
        """Memory that the loss of so many tokens needs for a moment on a GPU: one piece of the logits."""
        vocabulary = self.get_output_embeddings().weight.shape[0]
        return min(tokens, max(1, PIECE["cuda"] // vocabulary)) * vocabulary * itemsize

    def check_length(self, tokens: torch.Tensor) -> None:
        """Raises ``ConfigError`` for sequences longer than the model's."""
        limit = self.config.max_sequence_length
        if tokens.shape[1] > limit:
            raise ConfigError(
                f"the sequences have {tokens.shape[1]} tokens, model.max_sequence_length allows {limit}: raise it, or "
                "lower trainer.sequence_length"
            )

    def load_pretrained(self, folder: str) -> None:
        """Takes over weights in Hugging Face's format. Raises ``ConfigError`` where the architecture has none."""
        raise ConfigError(
            f"model.init_from is {folder!r}, weights in Hugging Face's format, which {self.config.architecture!r} does "
            "not have: expected a run of this trainer"
        )

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_sequence_length(self) -> int:
        return self.config.max_sequence_length

    hub_prefix = ""
    """What the names of the parameters begin with here and not in an export for Transformers."""

    hub_code: Path | None = None
    """A modelling file that has to lie beside exported weights; None where Transformers knows the architecture."""

    @abstractmethod
    def hub_config(self, progress: float) -> dict[str, Any]:
        """The ``config.json`` of an export, without data types. progress: as in ``forward``, of the exported weights."""

    def parameter_hints(self) -> dict[str, dict[str, Any]]:
        """Roles and splits of parameters that their modules do not tell."""
        return {}

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block, and the loss; much quicker to the first step than the whole model, and names stay as they
        are."""
        # Imported here, since that takes two seconds.
        import torch._dynamo

        # Blocks share their code: up to 4 kinds of them, each in training, in evaluation and in sampling. Beyond the limit
        # (8) PyTorch would go on uncompiled, where FlexAttention holds all scores at once.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 32)
        self.loss_backend = options.get("backend", "inductor")
        for block in self.blocks:
            block.compile(**options)

    def as_on_a_gpu(self) -> None:
        """Gives the parameters the types that they have on a GPU, for counting bytes without one."""

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
    def generate(self, tokens: torch.Tensor, new_tokens: int, **options: Any) -> torch.Tensor:
        """Continues tokens (B, T) int64; returns (B, T + new_tokens). Options are those of `stream`."""
        return torch.cat([tokens, *self.stream(tokens, new_tokens, **options)], 1)

    @torch.no_grad()
    def stream(
        self,
        tokens: torch.Tensor,
        new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
        cached: bool = True,
    ) -> Iterator[torch.Tensor]:
        """Samples after tokens (B, T) int64, and yields (B, 1) at a time. Temperature 0 takes the likeliest.

        Keys and values are kept between tokens (``cached``) as long as the text is no longer than the model's sequences;
        beyond, each token is computed from the last of them. Both ways give the same logits. Call ``eval()`` before.
        """
        limit = self.max_sequence_length
        cache = self.make_cache() if cached else None
        fresh = tokens
        for _ in range(new_tokens):
            # Blocks may be compiled, for other shapes than these.
            with torch.compiler.set_stance("force_eager"):
                if cache is not None and tokens.shape[1] <= limit:
                    logits = self(fresh, progress=progress, cache=cache)[:, -1, : self.vocab_size]
                else:
                    cache = None
                    logits = self(tokens[:, -limit:], progress=progress)[:, -1, : self.vocab_size]
            fresh = choose(logits, temperature, top_k, top_p, generator)
            tokens = torch.cat([tokens, fresh], 1)
            yield fresh
