"""Counts the bytes per logit that the loss moves to and from memory: `python -m benchmarks.loss_bytes`.

The two passes over the logits are counted by Inductor, which assumes that a kernel reads and writes each of its buffers once.
Everything else, and the uncompiled passes, are counted by the inputs and outputs of operations. bf16, forward and gradients,
with as many tokens as a GPU has in one micro-batch and pieces as large as on a GPU. Needs a C++ compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import Row, arguments, report
from models import loss
from models.loss import SoftCap, into_gradient, loss_sum, normalizer

GOAL = 15.0
# The bytes that the passes move are proportional to the rows.
COMPILED_ROWS = 64


class Case(NamedTuple):
    """A model's head in one micro-batch."""

    name: str
    tokens: int
    vocabulary: int
    width: int
    soft_cap: SoftCap


CASES = (
    Case("GPT-2 small", 131_072, 50_304, 768, "tanh"),
    Case("GPT-2 medium", 65_536, 50_304, 1024, "algebraic"),
    Case("Qwen2.5", 32_768, 151_936, 1024, "none"),
)


class ByteCount(TorchDispatchMode):
    """Sums the sizes of the tensors that operations read and write; views and allocations move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and "empty" not in func.__name__:
            # A gather reads as much as it returns.
            moved = out if "gather" in func.__name__ else (args, kwargs, out)
            tensors = [x for x in tree_leaves(moved) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def eager_bytes(case: Case, *, passes: bool) -> int:
    """Bytes of forward and gradients; without ``passes``, all except the two passes over the logits."""
    large_pieces = mock.patch.dict(loss.PIECE, {"cpu": loss.PIECE["cuda"]})
    lse = (case.tokens, 1)
    skipped = mock.patch.object(
        loss, "run_compiled", side_effect=lambda *a: (torch.empty(()), torch.empty(lse))
    )
    with FakeTensorMode(), large_pieces, nullcontext() if passes else skipped:
        hidden = torch.empty(case.tokens, case.width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(case.vocabulary, case.width, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.empty(case.tokens, dtype=torch.int64)
        with ByteCount() as count:
            loss_sum(hidden, weight, targets, case.soft_cap).backward()
    return count.bytes


@contextmanager
def inductor_bytes() -> Iterator[list[int]]:
    """Collects Inductor's byte count of each graph that it compiles inside."""
    found: list[int] = []
    compile_graph = GraphLowering.compile_to_module

    def counted(graph: GraphLowering) -> Any:
        module = compile_graph(graph)
        with V.set_graph_handler(graph):
            found.append(graph.count_bytes()[0])
        return module

    caches_off = torch._inductor.config.patch(force_disable_caches=True)
    with mock.patch.object(GraphLowering, "compile_to_module", counted), caches_off:
        yield found


def compiled_pass_bytes(case: Case) -> int:
    """Bytes of the two compiled passes over all logits."""
    torch._dynamo.reset()
    z = torch.randn(COMPILED_ROWS, case.vocabulary, dtype=torch.bfloat16)
    targets = torch.zeros(COMPILED_ROWS, dtype=torch.int64)
    with inductor_bytes() as found:
        _, lse = torch.compile(normalizer, fullgraph=True)(z, z[:, :1].clone(), targets, case.soft_cap)
        torch.compile(into_gradient, fullgraph=True)(z, targets, lse, case.soft_cap)
    if len(found) != 2:
        raise RuntimeError(
            f"Inductor compiled {len(found)} graphs, expected 2: this version of torch counts differently"
        )
    return sum(found) * case.tokens // COMPILED_ROWS


def measure(case: Case) -> tuple[float, float]:
    """(bytes per logit compiled, bytes per logit uncompiled)."""
    logits = case.tokens * case.vocabulary
    compiled = eager_bytes(case, passes=False) + compiled_pass_bytes(case)
    return compiled / logits, eager_bytes(case, passes=True) / logits


def main() -> int:
    options = arguments("Count the bytes that the loss moves per logit.").parse_args()
    rows = []
    for case in CASES:
        compiled, eager = measure(case)
        met = "met" if compiled <= GOAL else "missed"
        rows.append(
            Row(
                f"{case.name}, {case.tokens} tokens",
                f"{compiled:.1f} bytes per logit",
                f"uncompiled {eager:.1f}",
                compiled / eager,
                f"<= {GOAL:g} bytes",
                met,
            )
        )
    report("loss", rows, options.json)
    return int(any(row.note == "missed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
