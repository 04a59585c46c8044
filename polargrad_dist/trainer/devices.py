"""GPUs whose rates are known, from NVIDIA's data sheets: dense products, memory, links to the GPUs of the same host.

Data sheets of Hopper and later print tensor-core rates with sparsity, twice those of dense products, and links in both
directions, twice one way. bf16 rates were compared with the tables of torchtitan (`get_peak_flops`) and Lightning
(`lightning_fabric.utilities.throughput`, 2.6.6); where these differ from here, the lines below say why. A GB of memory counts
as 1e9 bytes, which is a floor: torch reports somewhat more (42.4e9 of an A100 40 GB).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """flop/s in bf16 and fp32, bytes of memory, and bytes/s of the memory and, one way, of the links.

    ``pattern`` is a regular expression that torch's name of the device contains.
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
    # Ada white paper, appendix A: 165.2 with fp32 accumulation. (Lightning has 82.6, without tensor cores.) The laptop's and
    # the "D" are other chips.
    Device("RTX 4090", "RTX 4090$", 24e9, 165e12, 82.6e12, 1.01e12, 32e9),
    # L40S data sheet: 362.05 dense, PCIe 4.0 x16.
    Device("L40S", "L40S", 48e9, 362e12, 91.6e12, 0.864e12, 32e9),
    # A100 data sheet: NVLink 600 GB/s both ways; 1,555 and 2,039 GB/s of memory.
    Device("A100 40 GB", "-40GB", 40e9, 312e12, 19.5e12, 1.56e12, 300e9),
    Device("A100 80 GB", "A100", 80e9, 312e12, 19.5e12, 2.04e12, 300e9),
    # H100 data sheet: bf16 1,513 (PCIe), 1,671 (NVL) and 1,979 (SXM) with sparsity; PCIe 5.0 x16; NVL bridges of 600 GB/s.
    # (Lightning has 1,979 for NVL: an earlier data sheet's, of a pair.)
    Device("H100 PCIe", "H100 PCIe", 80e9, 756e12, 51e12, 2.0e12, 64e9),
    Device("H100 NVL", "H100 NVL", 94e9, 835e12, 60e12, 3.9e12, 300e9),
    # GH200 data sheet: 990 dense, the model with 96 GB of HBM3; torch calls it by its CPU's 480 GB.
    Device("GH200", "GH200", 96e9, 989e12, 67e12, 4.0e12, 450e9),
    Device("H100 SXM", "H100", 80e9, 989e12, 67e12, 3.35e12, 450e9),
    Device("H200", "H200", 141e9, 989e12, 67e12, 4.8e12, 450e9),
    Device("B200", "B200", 180e9, 2250e12, 75e12, 8e12, 900e9),
)


def device_of(name: str) -> Device | None:
    """The known device that a name of torch's means, such as ``NVIDIA H100 80GB HBM3``; None where there is none."""
    return next((device for device in DEVICES if re.search(device.pattern, name)), None)


def known(device: torch.device) -> Device | None:
    """The known device that a torch device is; None for a CPU."""
    return device_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
