"""Section 6: every collective of the optimizer in every dtype on a group of one, and FSDP2 with offload to the CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.measure import Line, Setting

SECTION = "collectives"
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


def run(setting: Setting) -> list[Line]:
    """1 for each collective that returns its input. A single rank checks dtypes and calls, not order or overlap."""
    with group_of_one(setting):
        lines = [
            Line(SECTION, str(dtype).removeprefix("torch."), name, float(right), "", "1", right)
            for dtype in DTYPES
            for name, right in collectives(dtype, setting).items()
        ]
        lines.append(offloaded(setting))
    return lines


@contextmanager
def group_of_one(setting: Setting) -> Iterator[None]:
    gpu = setting.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            init_method=f"file://{os.path.join(folder, 'store')}",
            rank=0,
            world_size=1,
            device_id=setting.device if gpu else None,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


def collectives(dtype: torch.dtype, setting: Setting) -> dict[str, bool]:
    sent = torch.arange(24, device=setting.device).to(dtype)

    def once(call: Callable[[Tensor, Tensor], object], out: Tensor) -> bool:
        call(out, sent.clone())
        return torch.equal(out, sent)

    def in_place(call: Callable[[Tensor], object]) -> bool:
        out = sent.clone()
        call(out)
        return torch.equal(out, sent)

    def awaited(out: Tensor, x: Tensor) -> None:
        work = dist.all_to_all_single(out, x, [24], [24], async_op=True)
        assert work is not None
        work.wait()

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    empty = torch.empty_like(sent)
    return {
        "all_reduce": in_place(dist.all_reduce),
        "reduce": in_place(lambda x: dist.reduce(x, 0)),
        "broadcast": in_place(lambda x: dist.broadcast(x, 0)),
        "all_gather": once(gather, empty.clone()),
        "reduce_scatter": once(scatter, empty.clone()),
        "all_to_all, asynchronous": once(awaited, empty.clone()),
        "all_to_all, nothing to send": dist.all_to_all_single(sent[:0].clone(), sent[:0].clone(), [0], [0])
        is None,
    }


def offloaded(setting: Setting) -> Line:
    """A model under FSDP2 with parameters on the CPU: the loss must fall in three steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    from models import ModelConfig, build_model
    from polargrad_dist import OptimizerConfig, PolarGrad

    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, width=64, layers=2, heads=2, max_sequence_length=64)
    model = build_model(config, device="cpu" if setting.device.type == "cuda" else setting.device)
    mesh = init_device_mesh(setting.device.type, (1,))
    policy = CPUOffloadPolicy() if setting.device.type == "cuda" else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    optimizer = PolarGrad.from_config(model, OptimizerConfig())
    tokens = torch.randint(0, 256, (4, 64), device=setting.device)
    losses = []
    for _ in range(3):
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    fell = losses[-1] / losses[0]
    return Line(SECTION, "FSDP2 with offload", "loss after 3 steps, of the first", fell, "", "< 1", fell < 1)
