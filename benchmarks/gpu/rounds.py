"""Section 7: would compiled rounds, or a CUDA graph of them, be faster? `python -m benchmarks.gpu.rounds` runs it alone.

The library runs the rounds of its oracles eagerly. Newton-Schulz and Polar Express consist of products only, where a compiler
can save little. The root has small operations between its products, and on a GPU each launch costs time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Line, Setting, seconds, table
from benchmarks.gpu.roots import GOAL_SIZES, SMALL_SIZES, batches, sizes
from polargrad_dist.polar import gram_matrix, inverse_sqrt, polar_express_coefficients
from polargrad_dist.polar.polynomial import HALF_SAFETY, MUON, run_polynomials

SECTION = "rounds"
# From this speedup on, at the models' sizes, the library should adopt it.
WORTH = 1.1
Rounds = Callable[[Tensor], Any]


def muon(X: Tensor) -> Tensor:
    return run_polynomials(X, [MUON] * 5)


def polar_express(X: Tensor) -> Tensor:
    return run_polynomials(X, polar_express_coefficients(1e-3, 8, HALF_SAFETY))


def root(S: Tensor) -> Tensor:
    return inverse_sqrt(S, root="products").X


ROUNDS: dict[str, Rounds] = {
    "Newton-Schulz, 5 rounds": muon,
    "Polar Express, 8 rounds": polar_express,
    "root by products": root,
}


def run(setting: Setting) -> list[Line]:
    """Each kind of rounds at each size and batch: eager, compiled, as a CUDA graph; then the consequence for the library."""
    # The reduced form does not compile: it only checks that everything runs.
    backend = "eager" if setting.reduced else "inductor"
    dynamic = None if setting.device.type == "cpu" else True
    compiled = {
        name: torch.compile(rounds, fullgraph=True, dynamic=dynamic, backend=backend)
        for name, rounds in kinds(setting).items()
    }
    lines: list[Line] = []
    gains: dict[tuple[str, str], list[float]] = {}
    for n, batch in cases(setting):
        given = operands(n, batch, setting)
        for name, rounds in kinds(setting).items():
            times = forms(rounds, compiled[name], given[name], setting)
            case = f"{batch} x {n}"
            lines += [Line(SECTION, case, f"{name}, {form}", 1e3 * t, "ms") for form, t in times.items()]
            for form in list(times)[1:] if n in GOAL_SIZES else []:
                gains.setdefault((name, form), []).append(times["eager"] / times[form])
    what = f"faster than eager, the least at the models' sizes (worth it from {WORTH:g})"
    verdicts = [
        Line(SECTION, name, f"{form}: {what}", min(found), "times") for (name, form), found in gains.items()
    ]
    return [*lines, *sorted(verdicts, key=lambda line: line.case)]


def kinds(setting: Setting) -> dict[str, Rounds]:
    """What is compiled; on a CPU only the root: there the polynomials multiply blocks in place, which do not compile."""
    if setting.device.type == "cuda" or setting.reduced:
        return ROUNDS
    return {"root by products": root}


def cases(setting: Setting) -> list[tuple[int, int]]:
    """The (size, batch) pairs; a CPU would need minutes for the models' sizes."""
    if setting.reduced:
        return [(SMALL_SIZES[0], 5)]
    if setting.device.type == "cpu":
        return [(256, 1)]
    return [(n, batch) for n in sizes(setting) for batch in batches(n, setting)]


def operands(n: int, batch: int, setting: Setting) -> dict[str, Tensor]:
    """The input of each kind of rounds: (batch, n, n)."""
    A = torch.randn(batch, 2 * n, n, device=setting.device)
    X = A[:, :n] / torch.linalg.matrix_norm(A[:, :n], keepdim=True)
    if setting.device.type == "cuda":
        X = X.bfloat16()
    return {"Newton-Schulz, 5 rounds": X, "Polar Express, 8 rounds": X, "root by products": gram_matrix(A)}


def forms(rounds: Rounds, compiled: Rounds, x: Tensor, setting: Setting) -> dict[str, float]:
    """Seconds of the rounds in each form."""
    calls = {"eager": partial(rounds, x), "compiled": partial(compiled, x)}
    if setting.device.type == "cuda":
        calls["CUDA graph"] = recorded(calls["eager"])
    return {form: seconds(call, setting) for form, call in calls.items()}


def recorded(call: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of a call: starts all its kernels together."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


if __name__ == "__main__":
    print(table(run(Setting.of(False))))
