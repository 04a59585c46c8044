"""Small models of each architecture for the tests."""

import torch

from models import LanguageModel, ModelConfig, build_model

COUNTS = {"qwen2.5": 540_865_536, "gpt2-small": 275_742_772, "gpt2-medium": 454_496_336, "gpt": 162_354_816}
TINY = {"vocab_size": 96, "width": 32, "layers": 4, "heads": 2, "max_sequence_length": 512, "end_of_text": 95}
ALL = list(COUNTS)


def tiny(architecture: str, **changes) -> LanguageModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(architecture, **(TINY | changes)))


def awake(model: LanguageModel) -> LanguageModel:
    """With the projections and head that start at zero made random, so that everything matters."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                for matrix in p if p.ndim == 3 else [p]:
                    if not matrix.any():
                        matrix.normal_(std=0.2)
    return model
