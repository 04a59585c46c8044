"""Section 5: the trainer on synthetic shards: 20 steps, an exact resume, a loss that is NaN once, memory that runs out."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.measure import Line, Setting
from benchmarks.gpu.steps import TINY

SECTION = "training"
STEPS, SAVED, SPOILT = 20, 10, 7
SEQUENCES = 8


def run(setting: Setting) -> list[Line]:
    """Each case in a run directory of its own, on one rank."""
    from polargrad_dist.trainer import join

    world = join(setting.device.type)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cases = (twenty_steps, one_bad_loss, oracle_out_of_memory, batch_too_large)
            return [line for case in cases for line in case(Path(folder), world, setting)]
    finally:
        world.close()


def twenty_steps(folder: Path, world: Any, setting: Setting) -> list[Line]:
    """A run, and the same once more from the checkpoint in its middle: every weight has to have the same bits."""
    began = time.perf_counter()
    first = fit(folder, "run", world, setting)
    took = time.perf_counter() - began
    losses = [record["loss"] for record in records(folder / "run") if "loss" in record]
    shutil.rmtree(max((folder / "run" / "checkpoints").iterdir(), key=lambda path: path.name))
    again = fit(folder, "run", world, setting)
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    fell = losses[-1] / losses[0]
    return [
        Line(SECTION, f"{STEPS} steps", "time with start and checkpoints", took, "s"),
        Line(SECTION, f"{STEPS} steps", "last loss over first", fell, "", "< 1", fell < 1),
        Line(
            SECTION, f"resumed at step {SAVED}", "all weights have the same bits", float(same), "", "1", same
        ),
    ]


def one_bad_loss(folder: Path, world: Any, setting: Setting) -> list[Line]:
    """The loss of one step is NaN: the step is skipped and counted, the weights stay finite."""
    weights = fit(folder, "spoilt", world, setting, spoilt=SPOILT)
    skipped = float(records(folder / "spoilt")[-1].get("skipped", 0))
    finite = all(bool(w.isfinite().all()) for w in weights)
    return [
        Line(SECTION, "a NaN loss", "steps skipped", skipped, "", "1", skipped == 1),
        Line(SECTION, "a NaN loss", "weights finite at the end", float(finite), "", "1", finite),
    ]


def oracle_out_of_memory(folder: Path, world: Any, setting: Setting) -> list[Line]:
    """An oracle finds no memory once, after a save: the run ends with that error, and goes on from the checkpoint."""
    from polargrad_dist.optim.matrix import RULES

    direction, calls = RULES["polar"].direction, []

    def full(*args: Any) -> Any:
        calls.append(1)
        if (folder / "oracle" / "checkpoints").exists() and len(calls) > 1:
            raise torch.OutOfMemoryError("no memory, for the test")
        return direction(*args)

    raised = False
    with mock.patch.object(RULES["polar"], "direction", full):
        try:
            fit(folder, "oracle", world, setting)
        except torch.OutOfMemoryError:
            raised = True
    kept = sorted(path.name for path in (folder / "oracle" / "checkpoints").glob("step-*"))
    weights = fit(folder, "oracle", world, setting)
    on = raised and kept == [f"step-{SAVED:08}"] and all(bool(w.isfinite().all()) for w in weights)
    what = "ends the run, which goes on from the checkpoint before"
    return [Line(SECTION, "an oracle out of memory", what, float(on), "", "1", on)]


def batch_too_large(folder: Path, world: Any, setting: Setting) -> list[Line]:
    """A batch for which there is no memory ends the run before its first step; the same run directory takes smaller ones."""
    gpu, raised = setting.device.type == "cuda", False
    if gpu:  # the weights and no more
        free = torch.cuda.mem_get_info(setting.device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, 3e9 / free), setting.device)
    try:
        fit(folder, "batch", world, setting, crowded=not gpu)
    except torch.OutOfMemoryError:
        raised = True
    finally:
        if gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
            torch.cuda.empty_cache()
    weights = fit(folder, "batch", world, setting, micro_batch=SEQUENCES // 4)
    on = raised and all(bool(w.isfinite().all()) for w in weights)
    return [
        Line(
            SECTION, "a batch that does not fit", "ends the run, a quarter of it fits", float(on), "", "1", on
        )
    ]


def fit(
    folder: Path,
    name: str,
    world: Any,
    setting: Setting,
    spoilt: int | None = None,
    crowded: bool = False,
    micro_batch: int = SEQUENCES,
) -> list[Tensor]:
    """Trains, or resumes, in ``folder/name``; the weights at the end, on the CPU.

    spoilt: the forward pass whose loss is NaN. crowded: the first one finds no memory, as on a GPU that is full.
    """
    from data import DataConfig, open_data
    from data.shards import write_shard
    from models import ModelConfig, build_model
    from polargrad_dist import OptimizerConfig
    from polargrad_dist.trainer import Trainer, TrainerConfig, seed_everything
    from polargrad_dist.trainer.checkpoint import CheckpointConfig
    from polargrad_dist.trainer.config import EvaluationConfig, LoggingConfig

    length = 64 if setting.reduced else 1024
    sizes: dict[str, Any] = TINY if setting.reduced else {}
    model_config = ModelConfig("gpt2-small", **sizes)
    seed_everything(0)
    model = build_model(model_config)
    shard = folder / "tokens.bin"
    if not shard.exists():
        count = 4 * STEPS * SEQUENCES * length
        # Few different tokens, so that twenty steps learn something.
        write_shard(shard, np.random.default_rng(0).integers(0, 16, count, dtype=np.uint16))
    config = TrainerConfig(
        run_dir=str(folder / name),
        steps=STEPS,
        global_batch=SEQUENCES,
        micro_batch=micro_batch,
        sequence_length=length,
        precision="fp32" if setting.reduced else "bf16-mixed",
        compile=setting.device.type == "cuda",
        device="cuda" if setting.device.type == "cuda" else "cpu",
        logging=LoggingConfig(every=1, stats_every=0, progress="off"),
        evaluation=EvaluationConfig(every=0, at_end=False),
        checkpoint=CheckpointConfig(every=SAVED),
    )
    data = open_data(
        DataConfig(source="shards", paths=[str(shard)], validation_fraction=0),
        sequence_length=length,
        global_batch=SEQUENCES,
        micro_batch=micro_batch,
        rank=world.rank,
        world=world.size,
        all_gather=world.gather,
    )
    if spoilt is not None:
        spoil(model, spoilt)
    if crowded:
        model.register_forward_pre_hook(no_memory)
    Trainer(config, OptimizerConfig(), model, data, world, {}).fit()
    return [p.detach().cpu().clone() for p in model.parameters()]


def spoil(model: nn.Module, step: int) -> None:
    """Makes the loss of one forward pass NaN."""
    calls = 0

    def hook(module: nn.Module, inputs: Any, loss: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return loss * math.nan if calls == step else loss

    model.register_forward_hook(hook)


def no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("no memory, for the test")


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
