"""Device calls of one optimizer step on a GPU, for each of 8 ranks: `python -m benchmarks.launches [--json FILE]`. No GPU.

The models' parameters are at full size on the meta device, in a group of PyTorch's "fake" backend with 8 ranks of which this
process is one. They take a GPU's path through the optimizer, with the trainer's flag and clipping. It counts operations on
the device, without views and `empty`; a foreach call counts once, and so does a function that inductor compiles to one kernel
(tests/optim/test_fused.py). A foreach call over many elements, and some products, are several kernels on a GPU, so this is a
count of calls, which `python -m benchmarks.gpu ranks` has still to confirm there. Not measured on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.gpu.ranks import WORLD, fake_group
from benchmarks.harness import Row, arguments, report
from benchmarks.step import FREE
from models import ModelConfig, build_model
from polargrad_dist import OptimizerConfig, PolarGrad
from polargrad_dist.distributed import transport
from polargrad_dist.optim import bucket, facts, member, optimizer
from polargrad_dist.optim.elements import shrinking
from polargrad_dist.polar import gram
from train import parse_run

CONFIGS = Path(__file__).parents[1] / "configs"
# The language models of the paper, and the largest number of calls that a rank may make.
TARGETS = {
    "gpt2-small-fineweb-adam": 400,
    "gpt2-small-fineweb": 400,
    "gpt2-medium-fineweb-adam": 600,
    "gpt2-medium-fineweb": 600,
    "qwen2.5-muon-adamw": 600,
    "qwen2.5-muon-polarsgdm": 600,
}
NO_KERNEL = (*FREE, "promote_types", "scalar_tensor", "result_type")


class Launches(TorchDispatchMode):
    """Counts operations on the meta device by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        given = [x for a in (*args, *kwargs.values()) for x in (a if isinstance(a, list | tuple) else [a])]
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        made = str(kwargs.get("device")) == "meta" and not tensors
        busy = made or any(x.numel() and x.device.type == "meta" for x in tensors)
        if busy and name not in NO_KERNEL:
            self.names[name] += 1
        return func(*args, **kwargs)


def launches(model_config: ModelConfig, config: OptimizerConfig, rank: int) -> Counter[str]:
    """Operations of one step of this rank, by name."""
    model = build_model(model_config, device="meta")
    model.as_on_a_gpu()
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with fake_group(rank), as_a_gpu():
        made = PolarGrad.from_config(model, config, process_group=dist.group.WORLD)
        ok = torch.ones((), dtype=torch.bool, device="meta")

        def step() -> None:
            norm = made.clip_grad_norm_(float("inf"))
            made.step(ok=ok, shrink=shrinking(norm, 1.0))

        step()
        with Launches() as seen:
            step()
    return seen.names


@contextmanager
def as_a_gpu() -> Iterator[None]:
    """Treats the meta device as a GPU with fast fp64 products; leaves out what it cannot do."""

    def one_kernel(function: Callable[..., Any], backend: Any, *args: Any, dynamic: Any = None) -> Any:
        # Counts as the one kernel.
        torch.empty(1, device="meta").sin()
        with _disable_current_modes():
            return function(*args)

    with ExitStack() as stack:
        for where, name, instead in (
            # It refuses parameters without memory.
            (optimizer, "check_parameter", lambda *_: None),
            (optimizer, "check_alike", lambda *_: None),
            (transport, "_host_twin", lambda group, _: group),
            (torch, "autocast", lambda *_, **__: nullcontext()),
            (facts, "Late", lambda _: None),
            (facts.Facts, "worst", lambda _: (0, 0)),
            (gram, "fast_fp64", lambda _: True),
            (member.Travel, "backend", "inductor"),
            (member, "run_compiled", one_kernel),
            (bucket, "run_compiled", one_kernel),
        ):
            stack.enter_context(mock.patch.object(where, name, instead))
        yield


def counted() -> list[Row]:
    """The largest count of all ranks, for each configuration."""
    rows = []
    for name, target in TARGETS.items():
        run, _, _ = parse_run(["--config", str(CONFIGS / f"{name}.yaml")])
        figures = [launches(run.model, run.optimizer, rank).total() for rank in range(WORLD)]
        figure = f"{max(figures)}, least {min(figures)}"
        what = f"calls per step and rank, {name}, {WORLD} ranks"
        rows.append(Row(what, figure, f"target {target}", max(figures) / target, "≤ 1"))
    return rows


def main() -> None:
    options = arguments("Device calls of one optimizer step on a GPU, counted without one.").parse_args()
    report("launches", counted(), options.json)


if __name__ == "__main__":
    main()
