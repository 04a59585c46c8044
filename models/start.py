"""Where a model's first weights come from: `model.init_from` fills in sizes, and reads weights in Hugging Face's format.

Runs of this project are read by the trainer, which knows checkpoints; here only their model's configuration counts.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.auto import read_config
from models.config import ModelConfig
from polargrad_dist.errors import ConfigError


def adopt(
    config: ModelConfig, of_run: dict[str, Any] | None = None, before: dict[str, Any] | None = None
) -> ModelConfig:
    """The configuration with what it leaves open taken from where its weights come from, and names replaced by their content.

    of_run: the model's configuration of the run that ``init_from`` names, None where it is in Hugging Face's format.
    before: that of an earlier start of this run. From the same weights it is taken as it is: they need not be there any more.
    Raises ``ConfigError`` where a size contradicts the weights.
    """
    if config.architecture == "transformers" and isinstance(config.config, str):
        config = replace(config, config=read_config(config.config, "model.config"))
    if config.init_from is None:
        return config
    if before is not None and before.get("init_from") == config.init_from:
        left_open = [one.name for one in fields(config) if getattr(config, one.name) is None]
        return replace(config, **{name: before[name] for name in left_open if name in before})
    if of_run is not None:
        return _of_run(config, of_run)
    if config.architecture == "transformers":
        if config.config is None:
            return replace(config, config=read_config(config.init_from, "model.init_from"))
        return config
    if config.architecture != "qwen2.5":
        raise ConfigError(
            f"model.init_from is {config.init_from!r}, weights in Hugging Face's format, with model.architecture "
            f"{config.architecture!r}: expected qwen2.5 or transformers, or a run of this trainer"
        )
    return _of_qwen(config, read_config(config.init_from, "model.init_from"))


def _of_run(config: ModelConfig, other: dict[str, Any]) -> ModelConfig:
    """Every size that is open as in the other run; the architecture has to be the same."""
    if config.architecture != other.get("architecture"):
        raise ConfigError(
            f"model.architecture is {config.architecture!r}, but model.init_from is a run of "
            f"{other.get('architecture')!r}: set it to that"
        )
    changes: dict[str, Any] = {}
    for entry in fields(config):
        ours, theirs = getattr(config, entry.name), other.get(entry.name)
        if entry.name == "init_from" or ours == theirs:
            continue
        if ours is None:
            changes[entry.name] = theirs
        elif theirs is not None and entry.name not in (
            "attention",
            "attention_dropout",
            "zero_projections",
            "max_sequence_length",
        ):
            raise ConfigError(
                f"model.{entry.name} is {ours!r}, but the run that model.init_from names has {theirs!r}: leave it out"
            )
    return replace(config, **changes)


def _of_qwen(config: ModelConfig, found: dict[str, Any]) -> ModelConfig:
    from transformers import AutoConfig

    if found["model_type"] != "qwen2":
        raise ConfigError(
            f"model.init_from is a {found['model_type']!r} model, but model.architecture is 'qwen2.5': set it to "
            f"'transformers'"
        )
    theirs = AutoConfig.for_model(**found)
    theta = (getattr(theirs, "rope_parameters", None) or {}).get("rope_theta")
    for name, value, expected in (
        ("rms_norm_eps", theirs.rms_norm_eps, 1e-6),
        ("rope_theta", theta, 1e6),
        ("hidden_act", theirs.hidden_act, "silu"),
        ("use_sliding_window", bool(theirs.use_sliding_window), False),
    ):
        if value != expected:
            raise ConfigError(
                f"model.init_from has {name} {value!r}, which the qwen2.5 architecture fixes at {expected!r}: set "
                "model.architecture to 'transformers', which takes the checkpoint's own"
            )
    heads = theirs.num_attention_heads
    sizes = {
        "vocab_size": theirs.vocab_size,
        "width": theirs.hidden_size,
        "layers": theirs.num_hidden_layers,
        "heads": heads,
        "head_width": getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        "mlp_width": theirs.intermediate_size,
        "kv_heads": theirs.num_key_value_heads,
    }
    for name, value in sizes.items():
        ours = getattr(config, name)
        if ours is not None and ours != value:
            raise ConfigError(
                f"model.{name} is {ours}, but model.init_from has {value}: leave it out, or set it to that"
            )
    length = config.max_sequence_length or theirs.max_position_embeddings
    return replace(config, **sizes, max_sequence_length=length)


def pretrained(folder: str, config: Any | None = None) -> nn.Module:
    """The weights of a folder in Hugging Face's format, fp32, on the CPU, as Transformers reads them.

    Raises ``ConfigError`` where weights are missing, left over or of other shapes.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"output_loading_info": True} | ({} if config is None else {"config": config})
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.init_from is {str(folder)!r}, whose weights cannot be read: {reason}"
        ) from error
    model, told = loaded
    problems = {
        name: sorted(map(str, told[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if found := [f"{name.replace('_', ' ')}: {keys[0]}" for name, keys in problems.items() if keys]:
        raise ConfigError(
            f"model.init_from is {str(folder)!r}, whose weights are of another model ({'; '.join(found)}): expected exactly "
            "those that model describes"
        )
    return model


def local_folder(name: str) -> Path | None:
    """The folder that a name means on this machine; None for a name on the hub."""
    path = Path(name).expanduser()
    return path if path.is_dir() else None
