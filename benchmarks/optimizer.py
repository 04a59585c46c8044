"""The optimizer's speed, balance, traffic and memory: `python -m benchmarks.optimizer [--json FILE]`.

Every figure has a named baseline from the same run: torch's own Muon and AdamW, an SVD, one process for two, the formulas of
docs/distributed.md. Balance at 8, 64 and 512 ranks is computed on the meta device, not run.
"""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import Row, arguments, interleaved, report
from polargrad_dist import Muon, OptimizerConfig, PolarGrad, PolarSGDM, Rule, muon_rule, plan_for
from tests.gloo import run_ranks

GPT2_LAYER = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
QWEN_LAYER = [(512, 512)] * 4 + [(2432, 512)] * 2 + [(512, 2432)]


def parameters(shapes: list[tuple[int, ...]], device: str = "cpu") -> list[nn.Parameter]:
    """Random parameters with random gradients."""
    out = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in out:
        p.grad = torch.randn_like(p)
    return out


def hidden_step(device: str, rounds: int) -> list[Row]:
    """(a) The hidden matrices of a GPT-2-small layer and of a half-width Qwen2.5 layer, against torch's Muon; one process."""
    rows = []
    for name, shapes in (("GPT-2-small layer", GPT2_LAYER), ("Qwen2.5-style layer, half width", QWEN_LAYER)):
        ours, theirs, adam = (parameters(shapes, device) for _ in range(3))
        steps = {
            "ours": Muon(ours, lr=1e-3).step,
            "torch.optim.Muon": torch.optim.Muon(theirs, lr=1e-3, ns_steps=5).step,
            "torch.optim.AdamW(foreach)": torch.optim.AdamW(adam, lr=1e-3, foreach=True).step,
        }
        seconds = interleaved(
            {k: synchronized(run, device) for k, run in steps.items()}, rounds, time.perf_counter
        )
        for baseline, target in (("torch.optim.Muon", "≤ 1.0"), ("torch.optim.AdamW(foreach)", "reported")):
            rows.append(ratio(f"(a) Muon step, {name}, {device}", seconds, "ours", baseline, target))
    return rows


def embedding_step(device: str, rounds: int) -> list[Row]:
    """(b) PolarSGDM on a 50304 x 768 embedding, whole step, against the same update by torch.linalg.svd."""
    shape = (50304, 768)
    (p,), (q,) = parameters([shape], device), parameters([shape], device)
    momentum = torch.zeros_like(q)
    ours = PolarSGDM([{"params": [p], "role": "embed"}], lr=1e-3)

    def by_svd() -> None:
        with torch.no_grad():
            momentum.lerp_(q.grad, 0.5)
            u, s, vh = torch.linalg.svd(momentum, full_matrices=False)
            q.sub_(u @ vh, alpha=float(1e-3 * s.sum()))

    steps = {"ours": synchronized(ours.step, device), "torch.linalg.svd": synchronized(by_svd, device)}
    seconds = interleaved(steps, rounds, time.perf_counter)
    return [ratio(f"(b) PolarSGDM step, 50304x768, {device}", seconds, "ours", "torch.linalg.svd", "≤ 0.6")]


def synchronized(run: Any, device: str) -> Any:
    """Wraps ``run`` such that it waits for a GPU's work."""
    if device == "cpu":
        return run

    def wait() -> None:
        run()
        torch.cuda.synchronize()

    return wait


def ratio(case: str, seconds: dict[str, float], ours: str, baseline: str, target: str) -> Row:
    figure, base = (f"{seconds[k] * 1e3:.1f} ms" for k in (ours, baseline))
    return Row(case, figure, f"{baseline}: {base}", seconds[ours] / seconds[baseline], target)


def _polar_seconds(rank: int, world: int, rounds: int) -> float:
    """Median of the busiest rank's seconds in the oracle per step; same matrices, one thread per process."""
    torch.manual_seed(0)
    optimizer = PolarGrad(
        parameters([(384, 384)] * 8 + [(1536, 384)] * 4), lr=1e-3, momentum="momentum_first"
    )
    times = []
    for _ in range(rounds + 1):
        optimizer.step()
        times.append(optimizer.stats()["hidden"]["seconds"])
    return sorted(times[1:])[rounds // 2]


def two_processes(rounds: int) -> list[Row]:
    """(c) Time in the oracle per step, two processes against one."""
    one, two = run_ranks(_polar_seconds, 1, rounds)[0], run_ranks(_polar_seconds, 2, rounds)[0]
    return [
        Row(
            "(c) oracle time per step, 2 processes",
            f"{two:.3f} s",
            f"1 process: {one:.3f} s",
            two / one,
            "≤ 0.6",
        )
    ]


def layers(
    count: int, layer: dict[str, tuple[int, ...]], **more: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    return {f"{i}.{name}": shape for i in range(count) for name, shape in layer.items()} | more


ATTENTION = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
MODELS = {
    "GPT-2 small": (
        layers(12, dict.fromkeys("qkvo", (768, 768)) | {"up": (3072, 768), "down": (768, 3072)}),
        {"embed": (50304, 768), "head": (50304, 768)} | {f"value{i}": (50304, 768) for i in range(3)},
    ),
    "Qwen2.5-style 541M": (
        layers(
            12,
            dict.fromkeys("qkvo", (1024, 1024))
            | {"gate": (4864, 1024), "up": (4864, 1024), "down": (1024, 4864)},
        ),
        {"embed": (151936, 1024), "head": (151936, 1024)},
    ),
    "Llama 8B": (
        layers(32, ATTENTION | {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}),
        {"embed": (128256, 4096), "head": (128256, 4096)},
    ),
    "Llama 70B": (
        layers(
            80,
            {"q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192)}
            | {"gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672)},
        ),
        {"embed": (128256, 8192), "head": (128256, 8192)},
    ),
    "Mixtral 8x7B": (
        layers(32, ATTENTION | {"gate_up": (8, 28672, 4096), "down": (8, 4096, 14336)}),
        {"embed": (32000, 4096), "head": (32000, 4096)},
    ),
    "Qwen3-30B-A3B": (
        layers(
            48,
            {"q": (4096, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 4096)}
            | {"gate_up": (128, 1536, 2048), "down": (128, 2048, 768)},
        ),
        {"embed": (151936, 2048), "head": (151936, 2048)},
    ),
}


def balance() -> list[Row]:
    """(d) On meta tensors: largest over mean load of owners, and bytes of the all-gather relative to the parameters."""
    rows = []
    for name, (hidden, tall) in MODELS.items():
        groups = [group(hidden, "hidden", muon_rule()), group(tall, "embed", Rule(0.02))]
        for world in (8, 64, 512):
            for mode, shards in (("DDP", 1), ("FSDP2", world), ("HSDP", 4 if world == 8 else 8)):
                plan = plan_for(groups, replicas=world // shards, shards=shards)
                matrices = sum(len(e.costs) for e in plan.entries) / world
                stored = sum(e.bytes for e in plan.entries) / shards
                gathered = plan.traffic().get("all_gather", 0) / stored
                target = "≤ 1.1" if matrices >= 4 else "reported"
                note = f"{matrices:.1f} matrices per rank, all-gather {gathered:.3f} P"
                rows.append(
                    Row(
                        f"(d) {name}, {mode}, {world} ranks",
                        "max/mean load",
                        "mean load",
                        plan.imbalance,
                        target,
                        note,
                    )
                )
    return rows


def group(shapes: dict[str, tuple[int, ...]], role: str, rule: Rule) -> dict[str, Any]:
    from dataclasses import asdict

    params = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes.values()]
    own = {"params": params, "param_names": list(shapes), "role": role}
    return (
        asdict(rule) | {"split_sizes": None, "num_heads": None, "flatten": False, "transposed": False} | own
    )


class Stack(nn.Module):
    """The shapes of a narrow GPT-2, to count bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4096, 64)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"o": nn.Linear(64, 64, bias=False), "up": nn.Linear(64, 256, bias=False)})
            for _ in range(8)
        )
        self.down = nn.ModuleList(nn.Linear(256, 64, bias=False) for _ in range(8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer, down in zip(self.layers, self.down, strict=True):
            x = x + down(layer["up"](layer["o"](x)).relu())
        return x.square().mean()


def _traffic(rank: int, world: int, mode: str) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    torch.manual_seed(0)
    model: nn.Module = Stack()
    if mode == "DDP":
        model = DistributedDataParallel(model)
    elif mode == "FSDP2":
        fully_shard(model)
    gradients = "reduce_scatter" if mode == "reduce_scatter" else "all_reduced"
    optimizer = PolarGrad.from_config(model, OptimizerConfig(hidden=Rule(0.02), gradients=gradients))
    optimizer.traffic.clear()
    model(torch.arange(32).view(4, 8) + rank).backward()
    optimizer.step()
    dist.barrier()
    sizes = {"P": 4 * sum(p.numel() for p in model.parameters()), "tall": 4 * 4096 * 64, "n": 64}
    return dict(optimizer.traffic.bytes), sizes, optimizer.plan().traffic_of(rank)


def traffic() -> list[Row]:
    """(e) Bytes per rank and step passed to the optimizer's own collectives, against the plan and the formula."""
    rows = []
    for mode in ("DDP", "reduce_scatter", "FSDP2"):
        for world in (2, 4):
            results = run_ranks(_traffic, world, mode)
            exact = all(measured == planned for measured, _, planned in results)
            busiest = max(sum(measured.values()) for measured, _, _ in results)
            sizes = results[0][1]
            tall = 2 * 4 * sizes["n"] * (sizes["n"] + 1)
            formula = (
                2 * (sizes["P"] - sizes["tall"]) / world
                + tall
                + {"DDP": 1, "reduce_scatter": 2}.get(mode, 0) * sizes["P"]
            )
            rows.append(
                Row(f"(e) {mode}, {world} ranks", f"{busiest} B", f"2P_h/W + P + tall = {formula:.0f} B", busiest / formula,
                    "≤ 1.03", "every rank as planned, to the byte" if exact else "NOT as planned")
            )  # fmt: skip
    return rows


def _extra_memory(rank: int, world: int) -> tuple[int, int, int]:
    torch.manual_seed(0)
    p = parameters([(1024, 1024)] * 24)
    optimizer = PolarGrad(
        p, lr=1e-3, momentum="momentum_first", scale="none", oracle="newton_schulz", bucket_mb=16
    )
    momentum = sum(getattr(t, "_local_tensor", t).nbytes for t in optimizer.named_state().values())
    # Warm up: memory that the allocator takes at first use is not the optimizer's.
    for _ in range(3):
        optimizer.step()
    alive = Alive()
    with alive:
        optimizer.step()
    return alive.peak, momentum, sum(x.nbytes for x in p)


class Alive(TorchDispatchMode):
    """The largest number of bytes held at one time by tensors created inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel():
                storage = x.untyped_storage()
                at = storage.data_ptr()
                if at not in given and at not in self._known:
                    self._known.add(at)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, at, storage.nbytes())
        return out

    def _gone(self, at: int, size: int) -> None:
        self._known.discard(at)
        self.now -= size


def memory() -> list[Row]:
    """(f) Memory of a rank beyond parameters and gradients: what it keeps, and what a step needs."""
    rows = []
    for world in (2, 4):
        results = run_ranks(_extra_memory, world)
        extra, momentum, total = max(results)
        figure, base = f"{momentum / 2**20:.0f} MiB of momentum", f"parameters: {total / 2**20:.0f} MiB"
        rows.append(
            Row(
                f"(f) optimizer state of a rank, {world} ranks",
                figure,
                base,
                momentum / total,
                f"{1 / world}",
            )
        )
        figure, base = f"{extra / 2**20:.1f} MiB at most", "bucket: 16 MiB"
        rows.append(Row(f"(f) memory while stepping, {world} ranks", figure, base, extra / 2**24, "≤ 3"))
    return rows


def main() -> None:
    parser = arguments("Speed, balance, traffic and memory of the optimizer.")
    parser.add_argument(
        "--skip_embedding", action="store_true", help="leave out (b), which takes minutes on a CPU"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        rows += hidden_step(device, options.rounds)
        rows += [] if options.skip_embedding else embedding_step(device, options.rounds)
    rows += two_processes(options.rounds) + balance() + traffic() + memory()
    report("optimizer", rows, options.json)


if __name__ == "__main__":
    main()
