"""Compares the predictions of `--dry_run` for one GPU with measurements."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.measure import Line, Setting
from models import ModelConfig, build_model
from polargrad_dist import OptimizerConfig
from polargrad_dist.trainer import TrainerConfig
from polargrad_dist.trainer.devices import device_of, known
from polargrad_dist.trainer.estimate import estimate

# The allowed relative error of the predictions.
MEMORY, TIME = 0.10, 0.25
# Time is predicted for this GPU if the one here is not known.
STAND_IN = "NVIDIA H100 80GB HBM3"


def predictions(
    section: str,
    case: str,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    setting: Setting,
    memory: float,
    seconds: float,
) -> list[Line]:
    """The predicted peak memory and step time; on a GPU also their ratios to ``memory`` (bytes) and ``seconds``."""
    found = estimate(partial(build_model, model), optimizer, trainer, 1)
    predicted = found.memory.total
    device = known(setting.device) or device_of(STAND_IN)
    assert device is not None
    time = found.seconds(device, trainer.precision)
    assert time is not None
    lines = [
        Line(section, case, "--dry_run: memory", predicted / 2**30, "GiB"),
        Line(section, case, f"--dry_run: step on one {device.name}", 1e3 * time, "ms"),
    ]
    pairs = [("memory", memory, float(predicted), MEMORY)]
    if known(setting.device):
        pairs.append(("step", seconds, time, TIME))
    if setting.device.type == "cuda":
        lines += [
            Line(section, case, f"{what}, measured over predicted", there / said, "",
                 **setting.goal(f"within {off:.0%}", abs(there / said - 1) <= off))
            for what, there, said, off in pairs
        ]  # fmt: skip
    return lines
