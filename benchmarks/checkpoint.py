"""What checkpoints cost: `python -m benchmarks.checkpoint [--mib N] [--rounds N] [--folder DIR] [--json FILE]`.

It compares saving and loading with `torch.save` and `torch.load` of the same tensors on the same disk, interleaved round by
round; bytes on disk with bytes of tensors; training steps with and without a background save. It prints medians and ratios of
one run. Checkpoints are flushed to the disk, so the `torch.save` they are compared with is too. "Resume" verifies every byte
and then loads, as a restart does; "cold" reads from the disk, all others from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from polargrad_dist.trainer.checkpoint import CheckpointConfig, CheckpointStore
from tests.gloo import run_ranks

# Rounds that do not count: until old checkpoints are deleted, files take memory that was never used before.
WARM_UP = 3


@dataclass
class Row:
    """One operation: median and slowest seconds, and the median ratio to a baseline in the same round, with its limit."""

    operation: str
    seconds: float
    slowest: float
    ratio: float | None = None
    against: str = ""
    limit: float | None = None


def model_state(mib: int) -> dict[str, torch.Tensor]:
    """Parameters and momentum of a small language model: one large embedding, many matrices, vectors."""
    width = 512
    shapes = {"embed": (mib * 2**20 // 8 // 4 // width, width)}
    left, layer = mib * 2**20 // 8 - shapes["embed"][0] * width, 0
    while left > 0:
        for name, shape in {"q": (width, width), "up": (4 * width, width), "norm": (width,)}.items():
            shapes[f"layer.{layer}.{name}"] = shape
            left -= torch.Size(shape).numel()
        layer += 1
    kinds = ("model/{}", "optim/{}.momentum")
    return {kind.format(name): torch.randn(shape) for kind in kinds for name, shape in shapes.items()}


def seconds(fn: Callable[[], object]) -> float:
    started = time.perf_counter()
    fn()
    return time.perf_counter() - started


def save_plain(state: dict[str, torch.Tensor], path: Path, flush: bool) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        if flush:
            file.flush()
            os.fsync(file.fileno())


def paired(values: list[float], baseline: list[float]) -> float:
    """The median over rounds of the ratio within a round: a longer disturbance of the machine affects both."""
    return statistics.median(value / base for value, base in zip(values, baseline, strict=True))


def out_of_cache(*files: Path) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_files(state: dict[str, torch.Tensor], folder: Path, rounds: int) -> tuple[list[Row], float]:
    """Rows for saving and loading in one process, and bytes on disk per byte of tensors."""
    times: dict[str, list[float]] = {}

    def record(operation: str, fn: Callable[[], object]) -> None:
        times.setdefault(operation, []).append(seconds(fn))

    store = CheckpointStore(folder / "checkpoints", CheckpointConfig(keep_last=2))
    target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    plain = folder / "plain.pt"
    for step in range(1, rounds + WARM_UP + 1):
        record("torch.save", lambda: save_plain(state, plain, flush=False))
        plain.unlink()
        record("torch.save, flushed", lambda: save_plain(state, plain, flush=True))
        record("save", lambda step=step: store.save(step, state))
        store.wait()
        path = folder / "checkpoints" / f"step-{step:08d}"
        record("torch.load", lambda: torch.load(plain, weights_only=True))
        record("load and check", lambda path=path: store.load(path, target))
        record("verify", store.newest_valid)
        record("load", lambda path=path: store.load(path, target))
        out_of_cache(plain)
        record("torch.load, cold", lambda: torch.load(plain, weights_only=True))
        out_of_cache(*path.iterdir())
        record("resume, cold", lambda: store.load(store.newest_valid(), target))
        plain.unlink()
    for values in times.values():
        del values[:WARM_UP]
    on_disk = sum(file.stat().st_size for file in path.iterdir())
    against = {
        "save": ("torch.save, flushed", 1.3),
        "load": ("torch.load", 1.3),
        "load and check": ("torch.load", None),
        "verify": ("torch.load", None),
        "resume, cold": ("torch.load, cold", 1.3),
    }
    rows = []
    for operation, values in times.items():
        row = Row(operation, statistics.median(values), max(values))
        if operation in against:
            row.against, row.limit = against[operation]
            row.ratio = paired(values, times[row.against])
        rows.append(row)
    return rows, on_disk / sum(t.nbytes for t in state.values())


def windows(
    rank: int, world: int, folder: str, rounds: int, steps: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of windows of steps without and with a background save, interleaved, and of the save call alone.

    A step is forward and backward of 4096 rows and an all-reduced gradient: the ratio of bytes to flops is that of training.
    """
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    rows = torch.randn(4096, 512)

    def step() -> None:
        model(rows).square().mean().backward()
        if world > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()

    def window() -> None:
        for _ in range(steps):
            step()

    window()
    state = {f"model/{name}": p for name, p in model.named_parameters()}
    state |= {
        f"optim/{n}.momentum": optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()
    }
    store = CheckpointStore(folder, CheckpointConfig(asynchronous=True, threads=1))
    without, with_save, call = [], [], []
    for i in range(rounds + 1):
        without.append(seconds(window))

        def saving(i: int = i) -> None:
            call.append(seconds(lambda: store.save(i + 1, state)))
            window()

        with_save.append(seconds(saving))
        assert store.wait()
    store.close()
    return without[1:], with_save[1:], call[1:]


def measure_steps(folder: Path, rounds: int, steps: int) -> list[Row]:
    rows = []
    for world in (1, 2):
        results = run_ranks(windows, world, str(folder / f"steps-{world}"), rounds, steps, timeout=600)
        without, with_save, call = results[0]
        base = Row(f"{steps} steps, {world} ranks", statistics.median(without), max(without))
        ratio = paired(with_save, without)
        name = f"{steps} steps with a background save, {world} ranks"
        rows += [
            base,
            Row(name, statistics.median(with_save), max(with_save), ratio, base.operation, 1.05),
            Row(f"call of a background save, {world} ranks", statistics.median(call), max(call)),
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512, help="tensors to save and load")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="training steps in a window with one save")
    parser.add_argument(
        "--folder", type=Path, help="a folder on the disk to measure; default: the temporary folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        rows, bytes_ratio = measure_files(model_state(options.mib), folder, options.rounds)
        rows += measure_steps(folder, options.rounds, options.steps)
    finally:
        shutil.rmtree(folder)
    print(f"{'operation':<44}{'median s':>10}{'slowest':>10}{'ratio':>8}{'limit':>7}  against")
    for row in rows:
        ratio, limit = (f"{x:.2f}" if x is not None else "" for x in (row.ratio, row.limit))
        print(
            f"{row.operation:<44}{row.seconds:>10.3f}{row.slowest:>10.3f}{ratio:>8}{limit:>7}  {row.against}"
        )
    print(f"bytes on disk / bytes of tensors: {bytes_ratio:.4f} (limit 1.02)")
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "torch": str(torch.__version__)}
    settings = {"mib": options.mib, "rounds": options.rounds, "steps": options.steps}
    report = {
        "machine": machine,
        "settings": settings,
        "bytes_ratio": bytes_ratio,
        "rows": [asdict(r) for r in rows],
    }
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
