"""The Qwen2.5-style model: Transformers' own Qwen2, untied, so that its checkpoint is an ordinary Qwen2 checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.base import LanguageModel
from models.config import Sizes

THETA = 1e6


def inverse_frequencies(head_width: int, device: torch.device) -> torch.Tensor:
    """(head_width / 2,) fp32 radians per position."""
    return THETA ** -(torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)


class QwenModel(LanguageModel):
    """Biases on q, k and v only, RMSNorm epsilon 1e-6, SiLU, rotary base 1e6; plain causal attention."""

    def __init__(self, config: Sizes):
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM

        self.config = config
        marker = config.end_of_text if 0 <= config.end_of_text < config.vocab_size else None
        self.qwen = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_width,  # type: ignore[call-arg]
                max_position_embeddings=config.max_sequence_length,
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": THETA},
                tie_word_embeddings=False,
                use_sliding_window=False,
                attention_dropout=config.attention_dropout,
                use_cache=False,
                bos_token_id=marker,
                eos_token_id=marker,
            )
        )

    hub_prefix = "qwen."

    def hub_config(self, progress: float) -> dict[str, Any]:
        config = {
            name: value
            for name, value in self.qwen.config.to_dict().items()
            if name not in ("dtype", "torch_dtype")
        }
        # Transformers 4 reads the base of the rotary frequencies from rope_theta, 5 from rope_parameters.
        return config | {
            "architectures": ["Qwen2ForCausalLM"],
            "rope_theta": THETA,
            "rope_scaling": None,
            "use_cache": True,
        }

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.qwen.model.layers)

    def hidden(self, tokens: torch.Tensor, progress: float, cache: Any = None) -> torch.Tensor:
        # Transformers would look for packed sequences, which reads from the device before every forward pass. Without a
        # mask SDPA is causal.
        mask = {"full_attention": None} if cache is None and self._by_sdpa else None
        return self.qwen.model(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state

    @property
    def _by_sdpa(self) -> bool:
        return self.qwen.config._attn_implementation == "sdpa"

    def make_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    def get_input_embeddings(self) -> nn.Module:
        return self.qwen.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.qwen.lm_head

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QwenModel:
        """Where ``to``, ``bfloat16`` and ``cuda`` all end. Rotary frequencies stay in fp32: bf16 ones are off by up to
        one radian at position 512."""
        super()._apply(fn, recurse)
        rope = self.qwen.model.rotary_emb
        rope.inv_freq = inverse_frequencies(self.config.head_width, rope.inv_freq.device)
        return self

    def load_pretrained(self, folder: str) -> None:
        """Takes over the weights of a Qwen2 checkpoint; where its head is its embedding, both start as that one table."""
        from models.start import pretrained

        theirs: Any = pretrained(folder)
        state = theirs.state_dict()
        state["lm_head.weight"] = theirs.get_output_embeddings().weight
        self.qwen.load_state_dict(state)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Writes an ordinary Qwen2 checkpoint that ``AutoModelForCausalLM.from_pretrained(folder)`` loads."""
        self.qwen.save_pretrained(folder, **options)
