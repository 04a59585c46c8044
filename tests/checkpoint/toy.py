"""Small states to save: values are a function of (name, step), so a test knows which save it got back."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from polargrad_dist.trainer.checkpoint import CheckpointConfig, CheckpointStore

SHAPES = {
    "model/embed": (37, 8),
    "model/a.weight": (5, 7),
    "model/b.weight": (3, 2),
    "model/scale": (),
    "model/none": (0, 4),
}


def value(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    return torch.randn(shape, generator=generator)


def state(step: int, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """Parameters on every rank, momentum at one owner each, as under replicated training."""
    tensors = {name: value(name, shape, step) for name, shape in SHAPES.items()}
    for owner, (name, shape) in enumerate(SHAPES.items()):
        if owner % world == rank:
            momentum = name.replace("model/", "optim/") + ".momentum"
            tensors[momentum] = value(momentum, shape, step).bfloat16()
    return tensors


def zeros_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), f"{name} differs"


def saved_run(folder: Path, steps: list[int], **config) -> CheckpointStore:
    """A store of one process with checkpoints at these steps."""
    store = CheckpointStore(folder, CheckpointConfig(**config), identity={"model": {"width": 8}})
    for step in steps:
        store.save(step, state(step), objects={"sample": step * 10})
    return store
