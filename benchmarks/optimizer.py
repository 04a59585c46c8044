"""The optimizer's speed, balance, traffic and memory: `python -m benchmarks.optimizer [--json FILE]`.

Every figure stands beside a named baseline of the same run: torch's own Muon and AdamW, an SVD, one process against two,
the formulas of docs/distributed.md. Balance at 8, 64 and 128 ranks is computed on the meta device, not run.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Row, arguments, interleaved, report
from polargrad_dist import Muon, OptimizerConfig, PolarGrad, PolarSGDM, Rule
from polargrad_dist.distributed.plan import Plan
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
    """(a) One process, the hidden matrices of a GPT-2-small layer and of a halved Qwen2.5 one, against torch's Muon."""
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
    """A GPU's work counts until it is done."""
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
    """Median of the busiest rank's seconds in the oracle per step; same matrices and one thread per process."""
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
    count: int, layer: dict[str, tuple[int, int]], **more: tuple[int, int]
) -> dict[str, tuple[int, int]]:
    return {f"{i}.{name}": shape for i in range(count) for name, shape in layer.items()} | more


MODELS = {
    "Qwen2.5-style 541M": (
        layers(
            12,
            dict.fromkeys("qkvo", (1024, 1024))
            | {"gate": (4864, 1024), "up": (4864, 1024), "down": (1024, 4864)},
        ),
        {"embed": (151936, 1024), "head": (151936, 1024)},
    ),
    "GPT-2 small": (
        layers(12, dict.fromkeys("qkvo", (768, 768)) | {"up": (3072, 768), "down": (768, 3072)}),
        {"embed": (50304, 768), "head": (50304, 768)} | {f"value{i}": (50304, 768) for i in range(3)},
    ),
    "GPT-2 medium": (
        layers(16, dict.fromkeys("qkvo", (1024, 1024)) | {"up": (4096, 1024), "down": (1024, 4096)}),
        {"embed": (50257, 1024), "head": (50304, 1024)} | {f"value{i}": (50257, 1024) for i in range(3)},
    ),
    "Qwen2.5 8B shape": (
        layers(
            36,
            {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
            | {"gate": (12288, 4096), "up": (12288, 4096), "down": (4096, 12288)},
        ),
        {"embed": (151936, 4096), "head": (151936, 4096)},
    ),
}


def balance() -> list[Row]:
    """(d) Largest over mean load of the owners, on meta tensors: hidden matrices by Muon and by the exact oracle."""
    rows = []
    for oracle in ("newton_schulz", "auto"):
        for name, (hidden, tall) in MODELS.items():
            for world in (8, 64, 128):
                groups = [
                    group(hidden, "hidden", Rule(oracle=oracle)),
                    group(tall, "embed", Rule()),
                ]
                plan = Plan.build(groups, replicas=world)
                enough = len(hidden) >= 3 * world
                note = f"{len(hidden)} matrices" + ("" if enough else ", fewer than 3 per rank")
                target = "≤ 1.1" if enough else "reported"
                rows.append(
                    Row(
                        f"(d) {name}, {oracle}, {world} ranks",
                        "max/mean load",
                        "mean load",
                        plan.imbalance,
                        target,
                        note,
                    )
                )
    return rows


def group(shapes: dict[str, tuple[int, int]], role: str, rule: Rule) -> dict[str, Any]:
    from dataclasses import asdict

    params = [torch.empty(shape, device="meta") for shape in shapes.values()]
    own = {"params": params, "param_names": list(shapes), "role": role}
    return asdict(rule) | {"split_sizes": None, "num_heads": None, "flatten": False} | own


class Stack(nn.Module):
    """A narrow GPT-2 in shapes only: enough to count bytes on."""

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


def _traffic(rank: int, world: int, mode: str) -> tuple[dict[str, int], dict[str, int]]:
    torch.manual_seed(0)
    model: nn.Module = Stack()
    if mode == "DDP":
        model = DistributedDataParallel(model)
    elif mode == "FSDP2":
        fully_shard(model)
    config = OptimizerConfig(hidden=Rule(), gradients="to_owner" if mode == "to_owner" else "all_reduced")
    optimizer = PolarGrad.from_config(model, config)
    optimizer.traffic.clear()
    model(torch.arange(32).view(4, 8) + rank).backward()
    optimizer.step()
    dist.barrier()
    sizes = {"P": 4 * sum(p.numel() for p in model.parameters()), "tall": 4 * 4096 * 64, "n": 64}
    return dict(optimizer.traffic.bytes), sizes


def traffic() -> list[Row]:
    """(e) Bytes per rank and step handed to the optimizer's own collectives, against the formulas."""
    rows = []
    for mode in ("DDP", "to_owner", "FSDP2"):
        for world in (2, 4):
            results = run_ranks(_traffic, world, mode)
            measured = {kind: max(r[0].get(kind, 0) for r in results) for kind in results[0][0]}
            sizes = results[0][1]
            total, triangle = sizes["P"], 4 * sizes["n"] * (sizes["n"] + 1)
            own = sum(measured.values()) - measured.get("broadcast", 0)
            formula, expected = {
                "DDP": ("P + 4n(n+1), and 2P by DDP", total + triangle),
                "to_owner": ("2P + 4n(n+1)", 2 * total + triangle),
                "FSDP2": ("2(P - tall)/W + 4n(n+1)", 2 * (total - sizes["tall"]) / world + triangle),
            }[mode]
            rows.append(
                Row(f"(e) {mode}, {world} ranks", f"{own} B", f"{formula} = {expected:.0f} B", own / expected, "≤ 1.05",
                    f"and {measured.get('broadcast', 0)} B of S^(-1/2) back")
            )  # fmt: skip
    return rows


def _extra_memory(rank: int, world: int) -> tuple[int, int, int]:
    torch.manual_seed(0)
    p = parameters([(1024, 1024)] * 24)
    optimizer = PolarGrad(p, lr=1e-3, momentum="momentum_first", oracle="newton_schulz", bucket_mb=8)
    momentum = sum(t.nbytes for t in optimizer.named_state().values())
    optimizer.step()  # the allocator's and LAPACK's own first-use memory is not the optimizer's
    before = peak()
    optimizer.step()
    return peak() - before, momentum, sum(x.nbytes for x in p)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory() -> list[Row]:
    """(f) What a rank keeps beyond parameters and gradients on two ranks: its owner's share of the momentum."""
    _, momentum, total = run_ranks(_extra_memory, 2)[0]
    figure, base = f"{momentum / 2**20:.0f} MiB of momentum", f"parameters: {total / 2**20:.0f} MiB"
    return [Row("(f) optimizer state of a rank, 2 ranks", figure, base, momentum / total, "0.5")]


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
