"""The Qwen2.5-style model: Transformers' own Qwen2, untied, so that its checkpoint is an ordinary Qwen2 checkpoint."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from models.base import LanguageModel
from models.config import Sizes


class QwenModel(LanguageModel):
    """Biases on q, k and v only, RMSNorm epsilon 1e-6, SiLU, rotary base 1e6; plain causal attention."""

    def __init__(self, config: Sizes):
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM

        self.config = config
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
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                tie_word_embeddings=False,
                use_sliding_window=False,
                attention_dropout=config.attention_dropout,
                use_cache=False,
                bos_token_id=config.end_of_text if config.end_of_text < config.vocab_size else None,
                eos_token_id=config.end_of_text if config.end_of_text < config.vocab_size else None,
            )
        )

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.qwen.model.layers)

    def hidden(self, tokens: torch.Tensor, progress: float) -> torch.Tensor:
        return self.qwen.model(input_ids=tokens, use_cache=False).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.qwen.lm_head(hidden).float()

    def get_input_embeddings(self) -> nn.Module:
        return self.qwen.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.qwen.get_output_embeddings()

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Writes an ordinary Qwen2 checkpoint that ``AutoModelForCausalLM.from_pretrained(folder)`` loads."""
        self.qwen.save_pretrained(folder, **options)
