"""One flat configuration for every model: the architecture names the defaults, any size can be set.

Sources: Qwen2.5 (Qwen team 2024) as in Moonlight's toy example, untied; the modded-nanoGPT records of 2025-01-04 (small)
and 2025-04-22 (medium); table D.7 of Lau, Long, Su (2025), whose 6 layers for GPT-2 medium are a misprint for 16.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from polargrad_dist.errors import ConfigError

FULL_SIZE: dict[str, dict[str, Any]] = {
    "qwen2.5": {
        "vocab_size": 151_936,
        "width": 1024,
        "layers": 12,
        "heads": 16,
        "max_sequence_length": 512,
        "end_of_text": 151_643,
    },
    "gpt2-small": {
        "vocab_size": 50_304,
        "width": 768,
        "layers": 12,
        "heads": 6,
        "max_sequence_length": 65_536,
        "end_of_text": 50_256,
    },
    "gpt": {
        "vocab_size": 50_304,
        "width": 768,
        "layers": 12,
        "heads": 6,
        "max_sequence_length": 1_024,
        "end_of_text": 50_256,
    },
    "gpt2-medium": {
        "vocab_size": 50_257,
        "width": 1024,
        "layers": 16,
        "heads": 8,
        "max_sequence_length": 65_536,
        "end_of_text": 50_256,
    },
}


@dataclass
class ModelConfig:
    """Which model, and its sizes; null takes the architecture's full-size value, or what follows from the others.

    Args:
        architecture: "qwen2.5", "gpt2-small", "gpt2-medium"; "gpt", the plain one of modded-nanoGPT's optimizer benchmark; or
            "transformers" for any causal language model of Transformers.
        config: for "transformers", its configuration: a mapping with model_type and whatever that type's configuration
            has (as in config.json), or a folder or hub name to take it from. Defaults to that of init_from.
        init_from: where the first weights come from: a folder or hub name with Qwen2 weights (for "transformers", of any
            architecture) in Hugging Face's format, or a run directory or checkpoint of this trainer. Weights only: the run
            starts at step 0 with a fresh optimizer, and sizes that are left open are those of the weights.
        vocab_size: rows of the embedding. Defaults to the tokenizer's (GPT-2 small and the plain GPT: rounded up to a
            multiple of 128), or the full size.
        width: model dimension.
        layers: number of blocks.
        heads: attention heads.
        head_width: dimension of a head. Defaults to width / heads: 64 (Qwen2.5) or 128 (GPT-2) at full size.
        mlp_width: inner dimension of the MLP. Defaults to 4.75 x width (Qwen2.5) or 4 x width (GPT-2).
        kv_heads: key/value heads, Qwen2.5 only. Defaults to as many as heads.
        max_sequence_length: longest sequence that the model takes, in tokens.
        end_of_text: token id at which the next document begins. Defaults to the tokenizer's, or the full size's; -1 makes
            each sequence one document. Qwen2.5 attends across documents and only exports it.
        zero_projections: start the output projections of attention and MLP, and the head, at zero, "gpt" only; false starts
            them, and the MLP's input, as the benchmark does for rules that keep norms: standard deviations 0.026, 0.031 and
            0.031, the head as other matrices.
        attention: "flex" (FlexAttention, GPUs), "sdpa", or "auto"; GPT-2 only.
        attention_dropout: dropout of attention weights, Qwen2.5 only.
    """

    architecture: Literal["qwen2.5", "gpt2-small", "gpt2-medium", "gpt", "transformers"] = "qwen2.5"
    vocab_size: int | None = None
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    head_width: int | None = None
    mlp_width: int | None = None
    kv_heads: int | None = None
    max_sequence_length: int | None = None
    end_of_text: int | None = None
    zero_projections: bool = True
    attention: Literal["auto", "flex", "sdpa"] = "auto"
    attention_dropout: float = 0.0
    config: dict[str, Any] | str | None = None
    init_from: str | None = None

    def check_transformers(self) -> None:
        """Raises ``ConfigError`` for sizes set beside ``model.config``, and for a ``model.config`` that would be ignored."""
        if self.architecture != "transformers":
            if self.config is not None:
                raise ConfigError(
                    f"model.config is set with model.architecture {self.architecture!r}, expected 'transformers': set "
                    f"that, or "
                    "leave model.config out"
                )
            return
        if self.config is None:
            raise ConfigError(
                "model.architecture is 'transformers' without model.config, expected a configuration of Transformers, "
                "the name "
                "of a model, or model.init_from"
            )
        for entry in fields(self):
            if entry.name not in ("architecture", "config", "init_from", "vocab_size", "end_of_text"):
                value = getattr(self, entry.name)
                if value != entry.default:
                    raise ConfigError(
                        f"model.{entry.name} is {value!r} with model.architecture 'transformers', whose sizes stand in "
                        "model.config: set it there, under the name it has in Transformers"
                    )

    def resolved(self, vocab_size: int | None = None, end_of_text: int | None = None) -> Sizes:
        """The sizes of the model. Raises ``ConfigError`` for those that make no model.

        ``vocab_size`` and ``end_of_text`` are the tokenizer's, used where the configuration says nothing.
        """
        self.check_transformers()
        if self.architecture not in FULL_SIZE:
            known = ", ".join(FULL_SIZE)
            raise ConfigError(f"model.architecture is {self.architecture!r}, expected one of: {known}")
        full = FULL_SIZE[self.architecture]
        values = {
            name: getattr(self, name) if getattr(self, name) is not None else full[name] for name in full
        }
        if self.vocab_size is None and vocab_size is not None:
            # The 50,304 rows of GPT-2 small and of the plain GPT are their tokenizer's 50,257 in whole blocks of 128
            whole = self.architecture in ("gpt2-small", "gpt")
            values["vocab_size"] = -(-vocab_size // 128) * 128 if whole else vocab_size
            # Another tokenizer than the full size's
            values["end_of_text"] = -1
        elif values["end_of_text"] >= values["vocab_size"]:
            # Likewise: a smaller vocabulary is not the full size's
            values["end_of_text"] = -1
        if end_of_text is not None:
            values["end_of_text"] = end_of_text
        if self.end_of_text is not None:
            values["end_of_text"] = self.end_of_text
        width, heads = values["width"], values["heads"]
        qwen = self.architecture == "qwen2.5"
        if heads >= 1 and width >= 1 and self.head_width is None and width % heads:
            raise ConfigError(
                f"model.width is {width}, which model.heads = {heads} does not divide: set head_width, or change one"
            )
        sizes = Sizes(
            architecture=self.architecture,
            **values,
            head_width=width // max(1, heads) if self.head_width is None else self.head_width,
            mlp_width=(width * 19 // 4 if qwen else 4 * width) if self.mlp_width is None else self.mlp_width,
            kv_heads=heads if self.kv_heads is None else self.kv_heads,
            zero_projections=self.zero_projections,
            attention=self.attention,
            attention_dropout=self.attention_dropout,
        )
        sizes.check()
        return sizes


@dataclass(frozen=True)
class Sizes:
    """A `ModelConfig` with nothing left open."""

    architecture: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    max_sequence_length: int
    end_of_text: int
    head_width: int
    mlp_width: int
    kv_heads: int
    zero_projections: bool
    attention: str
    attention_dropout: float

    def check(self) -> None:
        """Raises ``ConfigError`` for sizes that make no model."""
        qwen = self.architecture == "qwen2.5"
        for entry in fields(self):
            value = getattr(self, entry.name)
            least = (
                -1
                if entry.name == "end_of_text"
                else 2
                if entry.name == "layers" and "gpt2" in self.architecture
                else 1
            )
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ConfigError(f"model.{entry.name} is {value}, expected a whole number >= {least}")
        if self.architecture in ("qwen2.5", "gpt") and self.attention != "auto":
            raise ConfigError(
                f"model.attention is {self.attention!r}, which only the GPT-2 models have: set it to 'auto'"
            )
        if not qwen and self.kv_heads != self.heads:
            raise ConfigError(f"model.kv_heads is {self.kv_heads}, which only qwen2.5 has: set it to null")
        if self.architecture != "gpt" and not self.zero_projections:
            raise ConfigError("model.zero_projections is false, which only 'gpt' has: set it to true")
        if not qwen and self.attention_dropout:
            raise ConfigError("model.attention_dropout is set, which only qwen2.5 has: set it to 0")
        if "gpt2" in self.architecture and self.end_of_text >= self.vocab_size:
            raise ConfigError(
                f"model.end_of_text is {self.end_of_text}, but the vocabulary has {self.vocab_size} tokens, so no document "
                "would ever end: set it to the token that ends documents"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model.heads is {self.heads}, expected a multiple of model.kv_heads = {self.kv_heads}"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ConfigError(
                f"model.attention_dropout is {self.attention_dropout}, expected a number in [0, 1)"
            )
        multiple = 2 if qwen else 4
        if self.head_width % multiple:
            raise ConfigError(
                f"a head is {self.head_width} wide, expected a multiple of {multiple}: rotary embeddings pair dimensions"
            )
