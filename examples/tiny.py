"""What the examples train: a two-layer Llama on the bytes of this project's README."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH = 8, 64
TEXT = Path(__file__).resolve().parent.parent / "README.md"


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    )


def sequences() -> torch.Tensor:
    """(N, LENGTH) int64, a token for each byte."""
    text = torch.tensor(list(TEXT.read_bytes()))
    return text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
