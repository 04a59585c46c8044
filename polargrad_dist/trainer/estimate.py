"""Estimates memory and time of a step: activations as autograd would keep them, and the rates of known devices.

Nothing here has been measured on a GPU; `python -m benchmarks.gpu` compares it with measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from polargrad_dist.trainer.config import TrainerConfig

SHARE = 0.4  # assumed fraction of a device's bf16 peak that a model reaches
LINK = 0.7  # assumed fraction of a link's rate that collectives reach


@dataclass(frozen=True)
class Device:
    """Dense rates from the vendor's data sheet: flop/s in bf16 and fp32, bytes/s of memory and, one way, of its links."""

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float


DEVICES = (
    Device("A100 80 GB", 80e9, 312e12, 19.5e12, 2.04e12, 300e9),
    Device("H100 SXM", 80e9, 989e12, 67e12, 3.35e12, 450e9),
    Device("H200", 141e9, 989e12, 67e12, 4.8e12, 450e9),
    Device("B200", 180e9, 2250e12, 75e12, 8e12, 900e9),
)


def activations(build: Callable[..., nn.Module], config: TrainerConfig) -> int:
    """Bytes that autograd keeps between forward and backward of one micro-batch, parameters left out.

    A forward pass of ``build(device="cpu")`` on tensors without memory. Uncompiled: torch.compile keeps less.
    """
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(device="cpu")
        if config.precision == "bf16":
            model.to(torch.bfloat16)
        if config.activation_checkpointing:
            model.checkpoint_blocks()  # type: ignore[operator]
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return x

        tokens = torch.zeros(config.micro_batch, config.sequence_length, dtype=torch.int64)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16-mixed")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), mixed:
            model(tokens, tokens, progress=1.0)
    return sum(storage.nbytes() for storage in kept.values())


@dataclass(frozen=True)
class Work:
    """The work of one rank in a step: flops of the model and of the optimizer's matrices (in fp32 products), bytes that
    elementwise work moves, and bytes communicated."""

    model: float
    oracle: float
    moved: float
    travelling: float

    def seconds(self, device: Device, precision: str) -> float:
        """Seconds on a device, with nothing overlapping; the model at `SHARE` of the peak."""
        peak = device.fp32 if precision == "fp32" else device.bf16
        return (
            self.model / (SHARE * peak)
            + self.oracle / device.fp32
            + self.moved / device.bandwidth
            + self.travelling / (LINK * device.link)
        )
