"""The trainer against Transformers' Trainer: `python -m benchmarks.training [--json FILE]`.

Both pre-train the same Qwen2.5-style model with AdamW on the same random tokens under torchrun, with two processes (one per
GPU, if there are any) of one thread each. The two alternate; figures are medians over the steps of all turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Row, arguments, report

VOCABULARY, LENGTH, GLOBAL_BATCH, MICRO_BATCH = 4096, 256, 16, 4
SIZES = {"width": 256, "layers": 4, "heads": 4}


def tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, count, dtype=np.uint16)


def ours(folder: Path, steps: int) -> dict[str, Any]:
    """Per-step seconds and shares of this trainer, run by the real entry point's parts, on shards written here."""
    from data import DataConfig, open_data
    from data.shards import write_shard
    from models import ModelConfig, build_model
    from polargrad_dist.optim import OptimizerConfig, adamw_rule
    from polargrad_dist.trainer import Trainer, TrainerConfig, join
    from polargrad_dist.trainer.checkpoint import CheckpointConfig
    from polargrad_dist.trainer.config import EvaluationConfig, LoggingConfig

    world = join()
    shard = folder / "tokens.bin"
    if world.is_main:
        write_shard(shard, tokens(2_000_000))
    world.gather(None)
    rule = adamw_rule(1e-3)
    config = TrainerConfig(
        run_dir=str(folder / "run"),
        steps=steps,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        sequence_length=LENGTH,
        logging=LoggingConfig(every=1, stats_every=0, progress="off"),
        evaluation=EvaluationConfig(every=0, at_end=False),
        checkpoint=CheckpointConfig(every=0),
    )
    data = open_data(
        DataConfig(source="shards", paths=[str(shard)], validation_fraction=0),
        sequence_length=LENGTH,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=world.rank,
        world=world.size,
        all_gather=world.gather,
    )
    model = build_model(ModelConfig(vocab_size=VOCABULARY, max_sequence_length=LENGTH, **SIZES))
    Trainer(config, OptimizerConfig(rule, rule, rule), model, data, world, {}).fit()
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    per_step = [GLOBAL_BATCH * LENGTH / r["tokens_per_second"] for r in records]
    outside = [r["share"].get("data", 0) + r["share"]["other"] for r in records]
    world.close()
    return {"seconds": per_step[2:], "outside": outside[2:]}


def theirs(folder: Path, steps: int) -> dict[str, Any]:
    """Per-step seconds of Transformers' Trainer on the same model, batch and optimizer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from models import ModelConfig, build_model

    class Clock(TrainerCallback):
        times: list[float]

        def __init__(self) -> None:
            self.times = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    world = int(os.environ["WORLD_SIZE"])
    rows = tokens(2_000_000)[: 2_000_000 // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64)
    dataset = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in rows]
    model = build_model(ModelConfig(vocab_size=VOCABULARY, max_sequence_length=LENGTH, **SIZES)).qwen
    clock = Clock()
    options = TrainingArguments(
        output_dir=str(folder / "transformers"),
        max_steps=steps,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=GLOBAL_BATCH // (world * MICRO_BATCH),
        learning_rate=1e-3,
        optim="adamw_torch",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    Trainer(model=model, args=options, train_dataset=dataset, callbacks=[clock]).train()  # type: ignore[arg-type]
    per_step = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return {"seconds": per_step[1:]}


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def worker(which: str, folder: Path, steps: int) -> None:
    """One rank of one turn; rank 0 writes the measurements."""
    torch.set_num_threads(1)
    found = {"ours": ours, "theirs": theirs}[which](folder, steps)
    gpu = torch.cuda.is_available()
    found["memory"] = torch.cuda.max_memory_allocated() / 2**20 if gpu else peak_mib()
    if os.environ.get("RANK", "0") == "0":
        (folder / "result.json").write_text(json.dumps(found))


def turn(which: str, steps: int) -> dict[str, Any]:
    processes = torch.cuda.device_count() or 2
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
        command = [*torchrun, "-m", "benchmarks.training", "--worker", which, folder, "--steps", str(steps)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
        )
        if done.returncode:
            raise SystemExit(f"{which} failed:\n{done.stderr[-3000:]}")
        return json.loads((Path(folder) / "result.json").read_text())


def main() -> None:
    parser = arguments("Training speed and memory against Transformers' Trainer.")
    parser.add_argument(
        "--steps", type=int, default=12, help="optimizer steps per turn; the first two do not count"
    )
    parser.add_argument("--turns", type=int, default=3, help="turns of each trainer")
    parser.add_argument(
        "--worker", nargs=2, metavar=("WHICH", "FOLDER"), help="internal: one rank of one turn"
    )
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], Path(options.worker[1]), options.steps)
        return
    turns: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for _ in range(options.turns):
        for which, found in turns.items():
            found.append(turn(which, options.steps))

    def median(which: str, key: str) -> float:
        values = [t[key] if isinstance(t[key], list) else [t[key]] for t in turns[which]]
        return statistics.median(x for value in values for x in value)

    a, b = (GLOBAL_BATCH * LENGTH / median(which, "seconds") for which in ("ours", "theirs"))
    memory_a, memory_b = median("ours", "memory"), median("theirs", "memory")
    rows = [
        Row(
            "(a) training speed",
            f"{a:,.0f} tokens/s",
            f"Transformers' Trainer: {b:,.0f} tokens/s",
            a / b,
            "≥ 1.0",
        ),
        Row(
            "(b) outside forward, backward, optimizer",
            "share of step time",
            "step",
            median("ours", "outside"),
            "≤ 0.05",
        ),
        Row(
            "(e) peak memory of rank 0",
            f"{memory_a:,.0f} MiB",
            f"Transformers' Trainer: {memory_b:,.0f} MiB",
            memory_a / memory_b,
            "≤ 1.0",
        ),
    ]
    report("training", rows, options.json)


if __name__ == "__main__":
    main()
