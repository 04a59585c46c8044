"""Counts what one step executes: operations, and Python calls per matrix: `python -m benchmarks.step [--json FILE]`.

Operations are the profiler's top-level ones, without views and `empty`; a foreach call counts once. On a GPU each is at least
one kernel launch. Calls are the Python frames of polargrad_dist, and their files, that ``step()`` enters for a single matrix,
including the scheduler and without the oracle (polar/).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Row, arguments, report
from polargrad_dist import Muon, PolarGrad
from tests.gloo import run_ranks

LAYERS = 12
# A GPT-2 small layer at an eighth of its width.
EIGHTH = [(96, 96)] * 4 + [(384, 96), (96, 384)]
FREE = (
    "view", "as_strided", "slice", "select", "unsqueeze", "squeeze", "t", "transpose", "permute", "expand", "alias", "unbind",
    "split", "split_with_sizes", "narrow", "reshape", "flatten", "unflatten", "detach", "movedim", "_unsafe_view", "mT",
    "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "resolve_conj", "resolve_neg", "diagonal", "view_as",
    "size", "unsafe_split", "chunk", "detach_", "_reshape_alias", "is_nonzero", "item", "_local_scalar_dense",
)  # fmt: skip


class Matrices(nn.Module):
    """A module with only parameters."""

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)

    def forward(self) -> torch.Tensor:
        total = torch.zeros(())
        for i, w in enumerate(self.weights):
            total = total + (w.float() * (i + 1)).square().mean()
        return total


def placed(
    mode: str, shapes: list[tuple[int, int]], dtype: torch.dtype
) -> tuple[nn.Module, list[nn.Parameter]]:
    """The matrices under a strategy, with gradients."""
    model: nn.Module = Matrices(shapes, dtype)
    if mode == "DDP":
        model = DistributedDataParallel(model)
    elif mode == "FSDP2":
        fully_shard(model)
    model().backward()
    return model, list(model.parameters())


def operations(step: Callable[[], Any]) -> int:
    """Top-level operations of the fourth step, after the steps that compare copies."""
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    top = [
        e
        for e in seen.events()
        if e.cpu_parent is None or not e.cpu_parent.name.startswith(("aten::", "c10d::", "gloo:"))
    ]
    names = [e.name for e in top if e.name.startswith("aten::")]
    return sum(name.removeprefix("aten::") not in FREE for name in names)


def _operations(rank: int, world: int, mode: str, dtype: torch.dtype) -> int:
    _, params = placed(mode, EIGHTH * LAYERS, dtype)
    return operations(Muon(params, lr=1e-3).step)


def counted() -> list[Row]:
    """Operations of a Muon step on 72 matrices, against torch's own Muon on one process."""
    _, params = placed("one", EIGHTH * LAYERS, torch.float32)
    baseline = operations(torch.optim.Muon(params, lr=1e-3).step)
    rows = []
    cases = [("one", 1, torch.float32, 350), ("one", 1, torch.bfloat16, 500), ("DDP", 4, torch.float32, 450),
             ("FSDP2", 4, torch.float32, 450)]  # fmt: skip
    for mode, world, dtype, target in cases:
        most = max(run_ranks(_operations, world, mode, dtype))
        name = f"operations, 72 matrices, {mode}, {world} ranks, {str(dtype).removeprefix('torch.')}"
        rows.append(
            Row(
                name,
                str(most),
                f"torch.optim.Muon, one process, fp32: {baseline}",
                most / baseline,
                f"≤ {target}",
            )
        )
    return rows


def _calls(rank: int, world: int, mode: str, shape: tuple[int, int], role: str) -> tuple[int, int]:
    _, params = placed(mode, [shape], torch.float32)
    optimizer = PolarGrad([{"params": params, "role": role, "momentum": "momentum_first"}], lr=1e-3)
    for _ in range(3):
        optimizer.step()
    frames: list[str] = []

    def enter(frame: Any, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        own = "polargrad_dist" in Path(path).parts and "polar" not in Path(path).parts
        if event == "call" and own and not frame.f_code.co_name.startswith("<"):
            frames.append(path)

    written = params[0].clone()
    sys.setprofile(enter)
    optimizer.step()
    sys.setprofile(None)
    assert not torch.equal(torch.as_tensor(_whole(written)), _whole(params[0]))
    return len(frames), len(set(frames))


def _whole(p: torch.Tensor) -> torch.Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def walked() -> list[Row]:
    """Calls for a hidden and for a tall matrix from ``step()`` to the written weight, on two ranks."""
    rows = []
    for mode in ("DDP", "FSDP2"):
        for name, shape, role in (("hidden", (64, 64), "hidden"), ("tall", (800, 8), "embed")):
            calls, files = max(run_ranks(_calls, 2, mode, shape, role))
            figure = f"{calls} calls in {files} files"
            case = f"calls, {name} matrix, {mode}, 2 ranks"
            rows.append(Row(case, figure, "40 calls in 5 files", calls / 40, "≤ 1"))
    return rows


def main() -> None:
    options = arguments("Operations and calls of one optimizer step.").parse_args()
    torch.set_num_threads(1)
    report("step", counted() + walked(), options.json)


if __name__ == "__main__":
    main()
