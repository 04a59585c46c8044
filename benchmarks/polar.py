"""Speed, accuracy and memory of every polar method: `python -m benchmarks.polar [--quick] [--json FILE]`.

On a CPU: one thread, process CPU time (the machine may be shared), methods interleaved round by round, medians, and ratios to
two baselines of the same run: LAPACK's SVD and a plain fixed 5-step fp32 QDWH. Each speed comes with errors against an fp64
SVD. On a GPU, if there is one: CUDA events, batches of matrices, and also bf16 polynomials.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from polargrad_dist.polar import apply_rows, compress_rows, gram_matrix, inverse_sqrt, polar

CPU_SHAPES = [(50304, 768), (151936, 1024), (3072, 768), (4096, 1024), (768, 768), (1024, 1024)]
QUICK_SHAPES = [(4096, 256), (1024, 256), (256, 256)]
GPU_CASES = [
    (1, 50304, 768),
    (1, 151936, 1024),
    (12, 3072, 768),
    (48, 768, 768),
    (12, 768, 768),
    (48, 1024, 1024),
]
SPARSE_ROWS = 4000
# Up to this size all methods are measured; beyond it, only those that `auto` competes with.
FEW_ENTRIES = 5_000_000
# From this size on, one timed round on a CPU: the slowest baseline takes minutes.
MANY_ENTRIES = 100_000_000
# Direction and orthogonality are judged on directions with σ/σ_max above this; below `lower`, methods differ by design.
JUDGED = 1e-3


@dataclass
class Row:
    """One method on one matrix: seconds (median), ratios to the baselines, errors, memory beyond the input."""

    device: str
    case: str
    method: str
    seconds: float
    vs_qdwh5: float | None
    vs_svd: float | None
    direction: float | None
    orthogonality: float | None
    nuclear: float | None
    memory: float | None


Result = tuple[Tensor | None, Tensor]
Method = Callable[[Tensor], Result]


def plain_svd(a: Tensor) -> Result:
    """The baseline: reduced SVD and U = PVᵀ."""
    P, sigma, Vh = torch.linalg.svd(a, full_matrices=False)
    return P @ Vh, sigma.sum(-1)


def plain_qdwh5(a: Tensor) -> Result:
    """The baseline: algorithm A.3 as printed, 5 steps, ℓ₀ = eps, QR while c > 100, with ‖A‖_F as the only estimate."""
    n = a.shape[-1]
    eye = torch.eye(n, dtype=a.dtype, device=a.device)
    X, low = a / torch.linalg.matrix_norm(a), torch.finfo(a.dtype).eps
    for _ in range(5):
        gamma = (4 * (1 - low**2) / low**4) ** (1 / 3)
        h = math.sqrt(1 + gamma) + 0.5 * math.sqrt(
            8 - 4 * gamma + 8 * (2 - low**2) / (low**2 * math.sqrt(1 + gamma))
        )
        b = (h - 1) ** 2 / 4
        c = h + b - 1
        if c > 100:
            Q = torch.linalg.qr(torch.cat([math.sqrt(c) * X, eye])).Q
            X = (b / c) * X + (h - b / c) / math.sqrt(c) * (Q[:-n] @ Q[-n:].mT)
        else:
            L = torch.linalg.cholesky(eye + c * (X.mT @ X))
            X = (b / c) * X + (h - b / c) * torch.cholesky_solve(X.mT, L).mT
        low = min(1.0, low * (h + b * low**2) / (1 + c * low**2))
    return X, (a * X).sum()


def library(method: str, **options) -> Method:
    def run(a: Tensor) -> Result:
        found = polar(a, method=method, **options)
        return found.U, found.nuclear_norm

    return run


def fused_update(parameter: Tensor) -> Method:
    """The Gram method adding -1e-3·‖A‖·U to a parameter: U is never stored."""

    def run(a: Tensor) -> Result:
        root = inverse_sqrt(gram_matrix(a))
        apply_rows(a, root.X, out=parameter, scale=-1e-3 * root.nuclear_norm)
        return None, root.nuclear_norm

    return run


def compressed_update(parameter: Tensor) -> Method:
    """The same for a row-sparse matrix: only its non-zero rows are multiplied and updated."""

    def run(a: Tensor) -> Result:
        sparse = compress_rows(a)
        root = inverse_sqrt(gram_matrix(sparse.rows))
        update = apply_rows(sparse.rows, root.X, scale=-1e-3 * root.nuclear_norm)
        parameter.index_add_(0, sparse.positions, update)
        return None, root.nuclear_norm

    return run


def cpu_methods(a: Tensor, everything: bool) -> dict[str, Method]:
    m, n = a.shape
    methods: dict[str, Method] = {
        "svd (baseline)": plain_svd,
        "qdwh-5 (baseline)": plain_qdwh5,
        "auto": library("auto"),
        "gram": library("gram"),
    }
    if m >= 2 * n:
        methods["gram, fused update"] = fused_update(torch.zeros_like(a))
    if everything:
        methods |= {
            "gram, strict": library("gram", lower=1e-7),
            "qdwh": library("qdwh"),
            "qdwh, steps=2": library("qdwh", steps=2),
            "zolo": library("zolo"),
            "newton": library("newton"),
            "newton_schulz (Muon)": library("newton_schulz"),
            "polar_express, 8 steps": library("polar_express", steps=8, lower=1e-3),
        }
    return methods


def interleaved(methods: dict[str, Method], a: Tensor, rounds: int) -> dict[str, float]:
    """Median process CPU seconds of each method, every round running all of them once."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, run in methods.items():
            start = time.process_time()
            result = run(a)
            seconds[name].append(time.process_time() - start)
            del result
    return {name: statistics.median(times) for name, times in seconds.items()}


def with_memory(run: Method, a: Tensor) -> tuple[Result, float]:
    """The result, and the peak memory of tensors beyond the input, in multiples of the input.

    Counts torch's allocations, including the result and LAPACK's workspaces, but not the packing buffers of a BLAS.
    """
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run(a)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return result, peak / (a.numel() * a.element_size())


class Exact(NamedTuple):
    """U and V (columns) of the judged directions, and the nuclear norm, of each matrix of a batch, in fp64."""

    U: Tensor
    V: list[Tensor]
    nuclear: Tensor


def exact_polar(a: Tensor) -> Exact:
    """From the SVD of a tall matrix's QR factor, which is n×n."""
    Q, R = torch.linalg.qr(a.double())
    P, sigma, Vh = torch.linalg.svd(R)
    pairs = zip(Vh.reshape(-1, *Vh.shape[-2:]), sigma.reshape(-1, sigma.shape[-1]), strict=True)
    judged = [vh[s > JUDGED * s[0]].mT for vh, s in pairs]
    return Exact((Q @ (P @ Vh)).reshape(-1, *a.shape[-2:]), judged, sigma.sum(-1))


def errors(result: Result, exact: Exact) -> tuple[float | None, float | None, float]:
    """‖(U − U*)V‖_F and ‖Vᵀ(UᵀU − I)V‖_F over √(columns of V), and the relative error of the nuclear norm."""
    U, norm = result
    nuclear = float((norm.double() / exact.nuclear - 1).abs().max())
    if U is None:
        return None, None, nuclear
    direction = orthogonality = 0.0
    for u, reference, V in zip(U.reshape(exact.U.shape), exact.U, exact.V, strict=True):
        root = V.shape[1] ** 0.5
        direction = max(direction, float(((u.double() - reference) @ V).norm()) / root)
        eye = torch.eye(V.shape[1], dtype=torch.float64, device=V.device)
        orthogonality = max(orthogonality, float((V.mT @ gram_matrix(u) @ V - eye).norm()) / root)
    return direction, orthogonality, nuclear


def cpu_case(case: str, a: Tensor, methods: dict[str, Method], rounds: int) -> list[Row]:
    exact = exact_polar(a)
    measured = {}
    # This also warms up every method.
    for name, run in methods.items():
        result, memory = with_memory(run, a)
        measured[name] = (*errors(result, exact), memory)
        del result
    del exact
    seconds = interleaved(methods, a, rounds)
    svd, qdwh5 = seconds.get("svd (baseline)"), seconds.get("qdwh-5 (baseline)")
    return [
        Row("cpu", case, name, t, qdwh5 and qdwh5 / t, svd and svd / t, *measured[name])
        for name, t in seconds.items()
    ]


def cpu_rows(shapes: list[tuple[int, int]], rounds: int) -> list[Row]:
    rows: list[Row] = []
    for m, n in shapes:
        a = torch.randn(m, n, generator=torch.Generator().manual_seed(m + n))
        methods = cpu_methods(a, everything=a.numel() < FEW_ENTRIES)
        rows += cpu_case(f"{m}×{n}", a, methods, 1 if a.numel() >= MANY_ENTRIES else rounds)
        if (m, n) == (50304, 768):
            keep = torch.randperm(m, generator=torch.Generator().manual_seed(1))[:SPARSE_ROWS]
            sparse = torch.zeros_like(a).index_copy_(0, keep, a[keep])
            some = {
                "qdwh-5 (baseline)": plain_qdwh5,
                "auto (compresses)": library("auto"),
                "compressed update": compressed_update(torch.zeros_like(a)),
            }
            rows += cpu_case(f"{m}×{n}, {SPARSE_ROWS} rows", sparse, some, rounds)
    return rows


def gpu_rows(rounds: int) -> list[Row]:
    """Batches on the current CUDA device, in fp32 and, for the polynomials, in bf16; SVD only where it is not too slow."""
    rows: list[Row] = []
    for count, m, n in GPU_CASES:
        a = torch.randn(count, m, n, device="cuda", generator=torch.Generator("cuda").manual_seed(m + n))
        half = a.bfloat16()
        exact = exact_polar(a)
        methods: dict[str, tuple[Method, Tensor]] = {
            "svd (baseline)": (plain_svd, a),
            "auto": (library("auto", check=False), a),
            "gram": (library("gram", check=False), a),
            "qdwh": (library("qdwh", check=False), a),
            "newton_schulz (Muon), bf16": (library("newton_schulz", check=False), half),
            "polar_express, 8 steps, bf16": (
                library("polar_express", steps=8, lower=1e-3, check=False),
                half,
            ),
        }
        if count * m * n >= MANY_ENTRIES:
            del methods["svd (baseline)"]
        seconds, memory = cuda_timings(methods, rounds)
        svd = seconds.get("svd (baseline)")
        for name, t in seconds.items():
            run, x = methods[name]
            accuracy = errors(run(x), exact)
            rows.append(
                Row("cuda", f"{count}×{m}×{n}", name, t, None, svd and svd / t, *accuracy, memory[name])
            )
    return rows


def cuda_timings(
    methods: dict[str, tuple[Method, Tensor]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    memory: dict[str, float] = {}
    # The first round warms up.
    for _ in range(rounds + 1):
        for name, (run, x) in methods.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = run(x)
            end.record()
            torch.cuda.synchronize()
            memory[name] = (torch.cuda.max_memory_allocated() - before) / (x.numel() * x.element_size())
            seconds[name].append(start.elapsed_time(end) / 1000)
            del result
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}, memory


def table(rows: list[Row]) -> str:
    def number(x: float | None, form: str) -> str:
        return "–" if x is None else format(x, form)

    header = [
        "case",
        "method",
        "seconds",
        "vs QDWH-5",
        "vs SVD",
        "direction",
        "orthogonality",
        "nuclear",
        "memory/A",
    ]
    lines = [header]
    for r in rows:
        ratios = [number(r.vs_qdwh5, ".2f"), number(r.vs_svd, ".2f")]
        accuracy = [number(x, ".0e") for x in (r.direction, r.orthogonality, r.nuclear)]
        lines.append([r.case, r.method, f"{r.seconds:.4f}", *ratios, *accuracy, number(r.memory, ".2f")])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join(
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small matrices: half a minute instead of several"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; the median is reported")
    parser.add_argument(
        "--shape", action="append", help="m×n as MxN instead of the standard CPU shapes; repeatable"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = QUICK_SHAPES if arguments.quick else CPU_SHAPES
    if arguments.shape:
        shapes = [(int(m), int(n)) for m, n in (text.split("x") for text in arguments.shape)]
    rows = cpu_rows(shapes, arguments.rounds)
    device = "none"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        rows += gpu_rows(max(5, arguments.rounds))
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread; GPU: {device}"
    )
    print(table(rows))
    if not torch.cuda.is_available():
        print("No CUDA device: the GPU cases (bf16 polynomials, batches of 12 and 48) were not run.")
    if arguments.json:
        setup = {
            "torch": torch.__version__,
            "machine": platform.platform(),
            "gpu": device,
            "rounds": arguments.rounds,
        }
        arguments.json.write_text(
            json.dumps({"setup": setup, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
