"""Qwen2.5-style and modded-nanoGPT GPT-2 models, and any of Transformers, built from a configuration."""

from __future__ import annotations

import torch

from models.base import LanguageModel
from models.config import ModelConfig
from models.start import adopt

__all__ = ["LanguageModel", "ModelConfig", "adopt", "build_model"]


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
    if config.architecture == "transformers":
        from models.auto import TransformersModel, make_config

        config = adopt(config) if isinstance(config.config, str) else config
        config.check_transformers()
        # A name has been adopted
        assert isinstance(config.config, dict)
        marker = end_of_text if config.end_of_text is None else config.end_of_text
        made = make_config(config.config, config.vocab_size or vocab_size, marker)
        with torch.device(device or "cpu"):
            return TransformersModel(made, marker)
    resolved = config.resolved(vocab_size, end_of_text)
    with torch.device(device or "cpu"):
        if resolved.architecture == "qwen2.5":
            from models.qwen import QwenModel

            return QwenModel(resolved)
        if resolved.architecture == "gpt":
            from models.plain import PlainGPT

            return PlainGPT(resolved)
        from models.gpt2 import GPT2Medium, GPT2Small

        return (GPT2Small if resolved.architecture == "gpt2-small" else GPT2Medium)(resolved)
