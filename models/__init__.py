"""Qwen2.5-style and modded-nanoGPT GPT-2 models, built from a configuration."""

from __future__ import annotations

import torch

from models.base import LanguageModel
from models.config import ModelConfig

__all__ = ["LanguageModel", "ModelConfig", "build_model"]


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int | None = None,
    end_of_text: int | None = None,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """The model that a configuration describes, freshly initialized on ``device`` ("meta" for shapes alone).

    ``vocab_size`` and ``end_of_text`` are the tokenizer's, used where the configuration says nothing. A vocabulary that
    comes without an end-of-text token makes each sequence one document.
    """
    resolved = config.resolved(vocab_size, end_of_text)
    with torch.device(device or "cpu"):
        if resolved.architecture == "qwen2.5":
            from models.qwen import QwenModel

            return QwenModel(resolved)
        from models.gpt2 import GPT2Medium, GPT2Small

        return (GPT2Small if resolved.architecture == "gpt2-small" else GPT2Medium)(resolved)
