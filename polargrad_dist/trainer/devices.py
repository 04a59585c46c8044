"""GPUs whose rates are known, from the vendors' data sheets: dense products, memory, links to the GPUs of the same host."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """flop/s in bf16 and fp32, bytes of memory, and bytes/s of the memory and, one way, of the links.

    ``pattern`` is what torch's name of the device contains.
    """

    name: str
    pattern: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float


# The first whose pattern fits is meant: an "H100 PCIe" is an "H100" as well.
DEVICES = (
    Device("RTX 4090", "RTX 4090", 24e9, 165e12, 82.6e12, 1.01e12, 32e9),
    Device("L40S", "L40S", 48e9, 362e12, 91.6e12, 0.864e12, 32e9),
    Device("A100 40 GB", "-40GB", 40e9, 312e12, 19.5e12, 1.56e12, 300e9),
    Device("A100 80 GB", "A100", 80e9, 312e12, 19.5e12, 2.04e12, 300e9),
    Device("H100 PCIe", "H100 PCIe", 80e9, 756e12, 51e12, 2.0e12, 64e9),
    Device("H100 NVL", "H100 NVL", 94e9, 835e12, 60e12, 3.9e12, 300e9),
    Device("GH200", "GH200", 96e9, 989e12, 67e12, 4.0e12, 450e9),
    Device("H100 SXM", "H100", 80e9, 989e12, 67e12, 3.35e12, 450e9),
    Device("H200", "H200", 141e9, 989e12, 67e12, 4.8e12, 450e9),
    Device("B200", "B200", 180e9, 2250e12, 75e12, 8e12, 900e9),
)


def device_of(name: str) -> Device | None:
    """The known device that a name of torch's means, such as ``NVIDIA H100 80GB HBM3``; None where there is none."""
    return next((device for device in DEVICES if device.pattern in name), None)


def known(device: torch.device) -> Device | None:
    """The known device that a torch device is; None for a CPU."""
    return device_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
