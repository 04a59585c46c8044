"""Initial weights from another run of this trainer or from a folder in Hugging Face's format. Weights only.

The tokenizer that they were trained with is compared with that of the data.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.names import cleaner
from polargrad_dist.trainer.checkpoint.manifest import MANIFEST
from polargrad_dist.trainer.checkpoint.single import MODEL, Checkpoint, find_checkpoint
from polargrad_dist.trainer.world import World

log = logging.getLogger("polargrad_dist.trainer")


def checkpoint_of(name: str | None) -> Checkpoint | None:
    """The checkpoint that ``model.init_from`` names; None if it is in Hugging Face's format, or not set."""
    if name is None:
        return None
    folder = Path(name).expanduser()
    if (folder / MANIFEST).is_file() or (
        (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()
    ):
        return find_checkpoint(folder)
    return None


def initialize(model: nn.Module, name: str, checkpoint: Checkpoint | None, data: Any, world: World) -> None:
    """Loads the initial weights into a model, still on the CPU, on every rank.

    name: ``model.init_from``; checkpoint: the result of `checkpoint_of`. Raises ``ConfigError`` on all ranks if the weights,
    or the tokenizer that they were trained with, do not fit.
    """
    if checkpoint is not None:
        found = checkpoint
        world.together(lambda: _from_run(model, found, data))
    else:
        fetch = partial(world.meanwhile, f"fetch {name}", lambda: _download(name))
        folder = world.gather(world.together(fetch))[0]
        world.together(lambda: _from_hub(model, folder, data))
    if world.is_main:
        source = name if checkpoint is None else checkpoint.folder
        log.info("weights come from %s; the optimizer and the step count start anew", source)


def _from_run(model: nn.Module, checkpoint: Checkpoint, data: Any) -> None:
    theirs = checkpoint.manifest.identity.get("tokenizer", {}).get("tokenizer")
    ours = data.fingerprint().get("tokenizer")
    if theirs != ours:
        raise ConfigError(
            f"model.init_from is {checkpoint.folder}, trained with another tokenizer ({str(theirs)[:12]}…) than that of "
            f"the data ({str(ours)[:12]}…): set data.tokenizer.name to {checkpoint.run_dir / 'tokenizer'}"
        )
    fill(model, checkpoint, "model.init_from")


def fill(model: nn.Module, checkpoint: Checkpoint, what: str) -> None:
    """Reads a checkpoint's weights into a model, one tensor at a time.

    Raises ``ConfigError``, which begins with ``what``, if names or shapes differ.
    """
    saved = set(checkpoint.names())
    for name, target in weights(model).items():
        if name not in saved:
            raise ConfigError(f"{what}: {checkpoint.folder} has no {name}, expected the same model")
        shape = checkpoint.manifest.tensors[MODEL + name].shape
        if shape != tuple(target.shape):
            raise ConfigError(
                f"{what}: {checkpoint.folder} has {name} of shape {shape}, expected {tuple(target.shape)}: it is of another "
                "model"
            )
        with torch.no_grad():
            target.copy_(checkpoint.read(MODEL + name))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and persistent buffers, by their names in checkpoints."""
    persistent = model.state_dict()
    named = [*model.named_parameters(), *model.named_buffers()]
    clean = cleaner(model)
    return {clean(name): tensor for name, tensor in named if name in persistent}


def _download(name: str) -> str:
    """A local folder, or the files of a model on the hub, in the hub client's cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
    except Exception as error:
        # The client's own errors, and those of its network library
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.init_from is {name!r}, which is neither a folder nor available from the hub ({reason}): name a "
            "folder with config.json and safetensors"
        ) from error


def _from_hub(model: nn.Module, folder: str, data: Any) -> None:
    if not hasattr(model, "load_pretrained"):
        raise ConfigError(
            f"model.init_from is {folder!r}, in Hugging Face's format, but the model has no load_pretrained(): name a run "
            "of this model"
        )
    _same_vocabulary(Path(folder), data)
    model.load_pretrained(folder)  # type: ignore[operator]


def _same_vocabulary(folder: Path, data: Any) -> None:
    """Raises ``ConfigError`` if the tokenizer of the weights maps a token to another id than the tokenizer of the data."""
    path = folder / "tokenizer.json"
    text = data.load_tokenizer().json() if getattr(data, "tokenizer", None) is not None else None
    if text is None or not path.is_file():
        log.warning(
            "the tokenizers of model.init_from and of the data cannot be compared: make sure that they are the same"
        )
        return
    theirs, ours = (_vocabulary(json.loads(t)) for t in (path.read_text(encoding="utf-8"), text))
    differ = [token for token in ours if theirs.get(token) != ours[token]]
    if differ:
        token = differ[0]
        raise ConfigError(
            f"model.init_from is {folder}, whose tokenizer gives {token!r} the id {theirs.get(token)}, expected "
            f"{ours[token]} as in the data's ({len(differ)} of {len(ours)} differ): set data.tokenizer.name to {folder}"
        )


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    entries = (
        vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
    )
    return entries | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
