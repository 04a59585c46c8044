"""Section 5: the trainer on synthetic shards: 20 steps, an exact resume, one NaN loss, out of memory."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.measure import Line, Setting
from benchmarks.gpu.predicted import predictions
from benchmarks.gpu.steps import TINY
from models import ModelConfig, build_model
from polargrad_dist import OptimizerConfig
from polargrad_dist.trainer import TrainerConfig

SECTION = "training"
STEPS, SAVED, SPOILT = 20, 10, 7
SEQUENCES, FILLING = 8, 32


def run(setting: Setting) -> list[Line]:
    """Runs each case in its own run directory, on one rank."""
    from polargrad_dist.trainer import join

    world = join(setting.device.type)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cases = (twenty_steps, one_bad_loss, oracle_out_of_memory, batch_too_large)
            return [line for case in cases for line in case(Path(folder), world, setting)]
    finally:
        world.close()


def twenty_steps(folder: Path, world: Any, setting: Setting) -> list[Line]:
    """A run, repeated from the checkpoint in its middle: every weight must have the same bits."""
    sequences = SEQUENCES if setting.reduced else FILLING
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    first = fit(folder, "run", world, setting, sequences, sequences)
    took = time.perf_counter() - began
    rows = [record for record in records(folder / "run") if "loss" in record]
    losses = [row["loss"] for row in rows]
    model, config = configured(folder / "run", setting, sequences, sequences)
    step = statistics.median(config.tokens_per_step / row["tokens_per_second"] for row in rows[STEPS // 4 :])
    memory = max(row["memory_gib"] for row in rows) * 2**30
    case = f"{sequences} x {config.sequence_length}, the trainer's steps"
    shutil.rmtree(max((folder / "run" / "checkpoints").iterdir(), key=lambda path: path.name))
    again = fit(folder, "run", world, setting, sequences, sequences)
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    fell = losses[-1] / losses[0]
    return [
        Line(SECTION, f"{STEPS} steps", "time with start and checkpoints", took, "s"),
        Line(SECTION, case, "step", 1e3 * step, "ms"),
        Line(SECTION, case, "peak memory", memory / 2**30, "GiB"),
        *predictions(SECTION, case, model, OptimizerConfig(), config, setting, memory, step),
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
    """An oracle runs out of memory once, after a save: the run ends with that error, and continues from the checkpoint."""
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
    what = "ends the run, which continues from the last checkpoint"
    return [Line(SECTION, "an oracle out of memory", what, float(on), "", "1", on)]


def batch_too_large(folder: Path, world: Any, setting: Setting) -> list[Line]:
    """A batch that does not fit ends the run before its first step; the same run directory then takes a smaller one."""
    gpu, raised = setting.device.type == "cuda", False
    # Memory for the weights and no more.
    if gpu:
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
    sequences: int = SEQUENCES,
    micro_batch: int = SEQUENCES,
    spoilt: int | None = None,
    crowded: bool = False,
) -> list[Tensor]:
    """Trains, or resumes, in ``folder/name``; returns the final weights on the CPU.

    spoilt: the forward pass whose loss is NaN. crowded: the first forward pass runs out of memory, as on a full GPU.
    """
    from data import DataConfig, open_data
    from data.shards import write_shard
    from polargrad_dist.trainer import Trainer, seed_everything

    model_config, config = configured(folder / name, setting, sequences, micro_batch)
    seed_everything(0)
    model = build_model(model_config)
    shard = folder / "tokens.bin"
    if not shard.exists():
        count = 4 * STEPS * FILLING * config.sequence_length
        # Few different tokens, so that twenty steps learn something.
        write_shard(shard, np.random.default_rng(0).integers(0, 16, count, dtype=np.uint16))
    data = open_data(
        DataConfig(source="shards", paths=[str(shard)], validation_fraction=0),
        sequence_length=config.sequence_length,
        global_batch=sequences,
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


def configured(
    run_dir: Path, setting: Setting, sequences: int, micro_batch: int
) -> tuple[ModelConfig, TrainerConfig]:
    """GPT-2 small, and the configuration of a run."""
    from polargrad_dist.trainer.checkpoint import CheckpointConfig
    from polargrad_dist.trainer.config import EvaluationConfig, LoggingConfig

    sizes: dict[str, Any] = TINY if setting.reduced else {}
    gpu = setting.device.type == "cuda"
    return ModelConfig("gpt2-small", **sizes), TrainerConfig(
        run_dir=str(run_dir),
        steps=STEPS,
        global_batch=sequences,
        micro_batch=micro_batch,
        sequence_length=64 if setting.reduced else 1024,
        precision="fp32" if setting.reduced else "bf16-mixed",
        compile=gpu,
        device="cuda" if gpu else "cpu",
        logging=LoggingConfig(every=1, stats_every=0, progress="off"),
        evaluation=EvaluationConfig(every=0, at_end=False),
        checkpoint=CheckpointConfig(every=SAVED),
    )


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
