"""Any causal language model of Transformers, built from its configuration: Llama, Qwen3, Mixtral and the rest.

The model computes its hidden states itself; the loss takes them through the head piece by piece, as for the models here.
That this gives the model's own logits is checked once, when it is built.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.hub_probe import first_line, unreachable
from models.base import LanguageModel
from models.config import Sizes
from models.loss import PIECE
from polargrad_dist.errors import ConfigError


@dataclass(frozen=True)
class HubSizes(Sizes):
    """The sizes that a configuration of Transformers states."""

    def check(self) -> None:
        """Transformers checks its own configurations."""


def read_config(name: str, key: str) -> dict[str, Any]:
    """The configuration of a model by folder or hub name. Raises ``ConfigError``, within seconds, where there is none."""
    from transformers import AutoConfig

    try:
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        except OSError as error:
            local = name.startswith((".", "/", "~"))
            reason = first_line(error) if local else unreachable(f"api/models/{name}")
            if reason is not None:
                raise ConfigError(
                    f"{key} is {name!r}, whose configuration could not be fetched ({reason}): name a local folder with "
                    "config.json"
                ) from error
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        # Code of its own, or an architecture of a later version
        raise ConfigError(
            f"{key} is {name!r}, which this version of Transformers cannot build by itself ({first_line(error)}): choose a "
            "model that needs no code of its own"
        ) from error
    return stated(config)


def stated(config: Any) -> dict[str, Any]:
    """What a configuration states beyond its class's defaults, with ``model_type``; no weights' types."""
    plain = config.to_diff_dict() | {"model_type": config.model_type}
    default = type(config)()
    of_files = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")
    return {k: v for k, v in plain.items() if k not in of_files and _has(default, k)}


def _has(default: Any, key: str) -> bool:
    """Whether a kind of configuration has a key. Models read head_dim even where their configuration does not declare it."""
    return key == "head_dim" or hasattr(default, key) or key in default.attribute_map


def make_config(plain: dict[str, Any], vocab_size: int | None, end_of_text: int | None) -> Any:
    """Transformers' configuration from ``model.config``; the tokenizer's facts where it states none.

    A default padding token is left out where the kind allows it: in this vocabulary it is some word, whose embedding would
    get no gradient.

    Raises ``ConfigError`` for an unknown ``model_type`` or a key that its configuration does not have.
    """
    from transformers import AutoConfig

    plain = dict(plain)
    kind = plain.pop("model_type", None)
    if not isinstance(kind, str):
        raise ConfigError(
            "model.config has no model_type, expected the architecture's name in Transformers, such as llama or qwen3"
        )
    try:
        default = AutoConfig.for_model(kind)
    except ValueError:
        raise ConfigError(
            f"model.config.model_type is {kind!r}, which Transformers does not know: see its documentation for the names"
        ) from None
    facts = {"vocab_size": vocab_size} if vocab_size is not None else {}
    if end_of_text is not None and 0 <= end_of_text < plain.get("vocab_size", end_of_text + 1):
        facts |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    plain = {k: v for k, v in facts.items() if _has(default, k)} | plain
    if unknown := [key for key in plain if not _has(default, key)]:
        raise ConfigError(
            f"model.config.{unknown[0]} is set, but a configuration of {kind!r} has no such key: see "
            f"{type(default).__name__} in the documentation of Transformers"
        )
    try:
        with contextlib.suppress(Exception):
            # Some kinds insist on a padding token
            return AutoConfig.for_model(kind, **({"pad_token_id": None} | plain))
        return AutoConfig.for_model(kind, **plain)
    except Exception as error:
        # Each configuration validates in its own way
        raise ConfigError(f"model.config makes no {kind!r}: {first_line(error)}") from error


def _no_model(config: Any, error: Exception) -> ConfigError:
    return ConfigError(
        f"model.config makes no {config.model_type!r} ({type(error).__name__}: {first_line(error)}): see "
        f"{type(config).__name__} in the documentation of Transformers"
    )


class TransformersModel(LanguageModel):
    """A Transformers model with this project's interface; its parameters' names begin with ``inner.``."""

    hub_prefix = "inner."

    def __init__(self, config: Any, end_of_text: int | None):
        """config: a Transformers configuration. Raises ``ConfigError`` for what is no causal language model."""
        super().__init__()
        from transformers import AutoModelForCausalLM

        try:
            self.inner = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError as error:
            raise ConfigError(
                f"model.config.model_type is {config.model_type!r}, which has no causal language model: {first_line(error)}"
            ) from error
        except Exception as error:
            # Each model fails in its own way where its configuration makes no sense
            raise _no_model(config, error) from error
        text = config.get_text_config()
        # XLNet's is -1: no limit
        positions = getattr(text, "max_position_embeddings", None) or 0
        if not (heads := getattr(text, "num_attention_heads", None)):
            raise ConfigError(
                f"a model of {config.model_type!r} has no attention heads, expected a Transformer: train it as a module of "
                "your own (docs/own-model.md)"
            )
        self.config = HubSizes(
            architecture="transformers",
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=heads,
            max_sequence_length=positions if positions > 0 else sys.maxsize,
            end_of_text=-1 if end_of_text is None else end_of_text,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
            mlp_width=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            attention="auto",
            zero_projections=True,
            attention_dropout=0.0,
        )
        self._text = text
        self._layers = self._find_layers()
        if self.inner.get_output_embeddings() is None:
            raise ConfigError(
                f"a model of {config.model_type!r} has no linear head, expected one: choose another"
            )
        self._scale = (getattr(text, "logit_scale", None) or 1.0) / (
            getattr(text, "logits_scaling", None) or 1.0
        )
        self._cap = getattr(text, "final_logit_softcapping", None)
        self._balance = self._balancing()
        self._takes_cache = True
        if next(self.inner.parameters()).device.type != "meta":
            self._check_logits()

    def _find_layers(self) -> nn.ModuleList:
        """The list of repeated blocks: the one as long as the model has layers."""
        count = self.config.layers
        lists = [m for m in self.inner.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if not lists:
            raise ConfigError(
                f"a model of {self._text.model_type!r} has no list of {count} blocks, expected one to compile, "
                f"checkpoint and "
                "shard: choose another architecture"
            )
        return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))

    def _balancing(self) -> Any:
        """The loss that balances a router's experts, where the configuration asks for it; else None."""
        if not getattr(self._text, "output_router_logits", False):
            return None
        function = getattr(sys.modules[type(self.inner).__module__], "load_balancing_loss_func", None)
        facts = [
            getattr(self.inner, n, None)
            for n in ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
        ]
        if function is None or None in facts:
            raise ConfigError(
                f"model.config.output_router_logits is true, but {self._text.model_type!r} has no balancing loss that can be "
                "read from it: set it to false"
            )
        experts, chosen, weight = facts
        return lambda logits: weight * function(logits, experts, chosen)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Raises ``ConfigError`` where head and hidden states are not all there is to the model's logits, and where these
        depend on later tokens. Notes whether the model takes the usual cache."""
        training = self.training
        self.eval()
        # From the middle of the vocabulary, since padding is at its ends
        middle = self.vocab_size // 2
        tokens, other = (
            torch.tensor([[middle, second % self.vocab_size]]) for second in (middle + 1, middle - 1)
        )
        try:
            theirs, changed = (
                self.inner(input_ids=t, use_cache=False).logits.float() for t in (tokens, other)
            )
        except Exception as error:
            # Some sizes that do not fit are only found here
            raise _no_model(self.inner.config, error) from error
        try:
            ours = self(tokens)
            known = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            # Its parts do not fit together as usual
            known = False
        if not known:
            raise ConfigError(
                f"a model of {self._text.model_type!r} changes its logits in a way that this trainer's loss does not know: "
                "choose another architecture, or train it as a module of your own (docs/own-model.md)"
            )
        if not torch.allclose(theirs[:, 0], changed[:, 0], rtol=1e-4, atol=1e-4):
            raise ConfigError(
                f"this model of {self._text.model_type!r} sees later tokens, so it would learn to copy them, expected a "
                "causal one: set is_decoder to true in model.config or use_bidirectional_attention to false, "
                "where it has them, or choose another architecture"
            )
        try:
            self(tokens, cache=self.make_cache())
        except (AttributeError, RuntimeError, TypeError, ValueError):
            self._takes_cache = False
        self.train(training)

    def hub_config(self, progress: float) -> dict[str, Any]:
        config = self.inner.config.to_dict()
        kept = {
            name: value
            for name, value in config.items()
            if name not in ("dtype", "torch_dtype", "_name_or_path")
        }
        if (rope := kept.get("rope_parameters")) and "rope_theta" in rope:
            # Where Transformers 4 reads it
            kept["rope_theta"] = rope["rope_theta"]
        return kept | {"architectures": [type(self.inner).__name__], "use_cache": True}

    @property
    def renames(self) -> bool:
        """Whether checkpoint files name weights otherwise than modules do, as for experts that share a tensor."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        return bool(get_model_conversion_mapping(self.inner, add_legacy=False))

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._layers)

    def make_cache(self) -> Any:
        """As every model's; None for one with a cache of its own kind, which samples without."""
        if not self._takes_cache:
            return None
        from transformers import DynamicCache

        return DynamicCache(config=self.inner.config)

    def hidden(self, tokens: torch.Tensor, progress: float, cache: Any = None) -> torch.Tensor:
        return self._run(tokens, cache).last_hidden_state

    def _run(self, tokens: torch.Tensor, cache: Any = None) -> Any:
        options = {"output_router_logits": True} if self._balance is not None else {}
        return self.inner.base_model(
            input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **options
        )

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        progress: float = 0.0,
        cache: Any = None,
    ) -> torch.Tensor:
        """As every model's; in training with the router's balancing loss where ``output_router_logits`` asks for it."""
        self.check_length(tokens)
        found = self._run(tokens, cache)
        if targets is None:
            return self._logits(
                found.last_hidden_state[:, -1:] if cache is not None else found.last_hidden_state
            )
        loss = self.loss(found.last_hidden_state, targets)
        if self._balance is not None and self.training:
            loss = loss + self._balance(found.router_logits)
        return loss

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As every model's, with the scales, caps and biases of logits that configurations and heads of Transformers have."""
        if self._cap is None:
            return self.loss_of(*self._scaled(hidden), targets)
        # A cap of any height is computed piece by piece too, and once more in backward.
        rows = max(1, PIECE["cpu"] // self.vocab_size)
        pieces = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
        total = sum(
            checkpoint(self._piece_loss, piece, target, use_reentrant=False) for piece, target in pieces
        )
        return total / (targets != -100).sum()

    def _piece_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self._logits(hidden), targets, reduction="sum")

    def _scaled(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `with_bias`, times the scale that the configuration names."""
        hidden, weight = self.with_bias(hidden)
        return (hidden * self._scale if self._scale != 1 else hidden), weight

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        z = self.logits(*self._scaled(hidden))
        return z if self._cap is None else self._cap * torch.tanh(z / self._cap)

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.inner.get_output_embeddings()

    def parameter_hints(self) -> dict[str, dict[str, Any]]:
        """Projections that share one tensor are several matrices for the optimizer."""
        c = self.config
        q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
        hints: dict[str, dict[str, Any]] = {}
        for name, p in self.named_parameters():
            if p.ndim < 2 or p.shape[-1] != c.width:
                continue
            rows, leaf = p.shape[-2], name.removesuffix(".weight")
            if leaf.endswith("gate_up_proj") and rows % 2 == 0:
                hints[name] = {"split_sizes": (rows // 2, rows // 2)}
            elif leaf.endswith("qkv_proj") and rows == q + 2 * kv:
                hints[name] = {"split_sizes": (q, kv, kv)}
        return hints

    def flops_per_token(self, sequence_length: int) -> float:
        """As every model's; a tied head multiplies too, and of experts only those that a token is sent to."""
        flops = super().flops_per_token(sequence_length)
        head = self.get_output_embeddings().weight
        if head is getattr(self.get_input_embeddings(), "weight", None):
            flops += 6.0 * head.numel()
        experts = getattr(self._text, "num_local_experts", None) or getattr(self._text, "num_experts", None)
        if experts:
            used = self._text.num_experts_per_tok / experts
            stacks = sum(
                p.numel() for p in self._layers.parameters() if p.ndim == 3 and p.shape[0] == experts
            )
            flops -= 6.0 * (1 - used) * stacks
        return flops

    def load_pretrained(self, folder: str) -> None:
        """Takes over weights in Hugging Face's format. Raises ``ConfigError`` where they are of another model."""
        from models.start import pretrained

        self.inner.load_state_dict(pretrained(folder, self.inner.config).state_dict())
