"""Section 1: every polar method against an fp64 SVD on the CPU, with waiting an error; FlexAttention; bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Line, Setting
from polargrad_dist.polar import gram_matrix, gram_qdwh, inverse_sqrt, norm_bound, norm_parts, polar

SECTION = "methods"
# Allowed distance of U from the SVD's, mean ‖U − U*‖_F/√n over the batch; None: compared with the same method in fp64.
METHODS: dict[str, tuple[dict[str, object], float | None]] = {
    "auto": ({}, 1e-5),
    "gram by products": ({"method": "gram", "root": "products"}, 1e-6),
    "qdwh": ({"method": "qdwh"}, 1e-5),
    "zolo": ({"method": "zolo"}, 1e-5),
    "newton": ({"method": "newton"}, 1e-4),
    "qdwh, 2 steps": ({"method": "qdwh", "steps": 2}, None),
    "Muon's quintic": ({"method": "newton_schulz", "steps": 5}, None),
    "polar express, 8 steps": ({"method": "polar_express", "steps": 8, "lower": 1e-3}, 1e-3),
}


@contextmanager
def waiting_is_an_error(setting: Setting) -> Iterator[None]:
    """Inside, any call that makes the host wait for the GPU raises."""
    if setting.device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def polar_factor(a: Tensor) -> Tensor:
    """U of the fp64 SVD on the CPU."""
    P, _, Vh = torch.linalg.svd(a.double().cpu(), full_matrices=False)
    return P @ Vh


def distance(U: Tensor, best: Tensor) -> float:
    """The mean of ‖U − U*‖_F/√n over a batch."""
    difference = torch.linalg.matrix_norm(U.double().cpu() - best)
    return float(difference.mean()) / min(best.shape[-2:]) ** 0.5


def run(setting: Setting) -> list[Line]:
    """Accuracy and waiting of every method for tall, square and wide matrices; row-sharded forms; attention."""
    shapes = (
        [(2, 64, 32), (2, 32, 48)] if setting.reduced else [(4, 2048, 512), (4, 768, 768), (4, 512, 2048)]
    )
    draw = torch.Generator().manual_seed(0)
    lines = []
    for shape in shapes:
        a = torch.randn(shape, generator=draw)
        exact, name = polar_factor(a), "x".join(map(str, shape))
        there = a.to(setting.device)
        for method, (options, allowed) in METHODS.items():
            with waiting_is_an_error(setting):
                U = polar(there, check=False, **options).U  # type: ignore[arg-type]
            best = exact if allowed else polar(a, **options).U.double()  # type: ignore[arg-type]
            error = distance(U, best)
            limit = allowed or 1e-4
            lines.append(
                Line(
                    SECTION,
                    name,
                    f"{method}: error of U",
                    error,
                    "",
                    f"<= {limit:g}, no waiting",
                    error <= limit,
                )
            )
        lines += row_sharded(name, a if shape[1] >= shape[2] else a.mT, setting)
    return [*lines, low_bits(setting), *attention(setting)]


def row_sharded(name: str, a: Tensor, setting: Setting) -> list[Line]:
    """The roots of a Gram matrix that an owner would receive."""
    there = a.to(setting.device)
    S = gram_matrix(there)
    forms: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "inverse_sqrt": (lambda: inverse_sqrt(S, root="products").X, polar_factor(a)),
        "gram_qdwh": (
            lambda: gram_qdwh(S, norm_bound(*norm_parts(there)), 2).X,
            polar(a, method="qdwh", steps=2).U.double(),
        ),
    }
    lines = []
    for what, (root, best) in forms.items():
        with waiting_is_an_error(setting):
            X = root()
        error = distance(there.double() @ X, best)
        lines.append(
            Line(SECTION, name, f"{what}: error of A·X", error, "", "<= 1e-5, no waiting", error <= 1e-5)
        )
    return lines


def low_bits(setting: Setting) -> Line:
    """Weights split into bf16 and low bits and joined again: the device must give the same bits as the CPU."""
    from polargrad_dist.optim.elements import join_bf16, split_bf16

    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    values[:4] = torch.tensor([0.0, -0.0, 1e-38, 3e38])

    def halves(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low = torch.empty(x.shape, dtype=torch.int16, device=x.device)
        high = split_bf16(x, low)
        return high.view(torch.int16).cpu(), low.cpu(), join_bf16(high, low).cpu()

    pairs = list(zip(halves(values), halves(values.to(setting.device)), strict=True))
    same = all(torch.equal(here, there) for here, there in pairs)
    exact = torch.equal(pairs[2][1], values)
    return Line(
        SECTION,
        "bf16 weights",
        "low bits as on the CPU, joined exactly",
        float(same and exact),
        "",
        "1",
        same and exact,
    )


def attention(setting: Setting) -> list[Line]:
    """The same small GPT-2 with FlexAttention and with SDPA, several documents in a sequence."""
    from models import ModelConfig, build_model

    length = 256 if setting.reduced else 1024
    sizes: dict[str, Any] = dict(
        layers=4, width=64, heads=2, vocab_size=256, end_of_text=0, max_sequence_length=length
    )
    tokens = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(0)).to(setting.device)
    tokens[:, ::100] = 0
    found = []
    for kind in ("sdpa", "flex"):
        torch.manual_seed(0)
        model = build_model(ModelConfig("gpt2-small", attention=kind, **sizes), device=setting.device)
        for p in model.parameters():
            if p.ndim >= 2:
                torch.nn.init.normal_(p, std=0.1)
        if setting.device.type == "cuda":
            model.compile_blocks()
        with torch.set_grad_enabled(setting.device.type == "cuda"):
            loss = model(tokens, tokens, progress=1.0)
        if loss.requires_grad:
            loss.backward()
        head = model.get_output_embeddings().weight.grad
        found.append((float(loss.detach()), torch.zeros(()) if head is None else head.detach().float()))
    (plain, a), (flex, b) = found
    apart = abs(flex / plain - 1)
    lines = [
        Line(
            SECTION,
            f"{length} tokens",
            "FlexAttention against SDPA: loss",
            apart,
            "",
            "<= 1e-4",
            apart <= 1e-4,
        )
    ]
    if setting.device.type == "cuda":
        error = float((a - b).norm() / a.norm())
        lines.append(
            Line(
                SECTION,
                f"{length} tokens",
                "FlexAttention against SDPA: head's gradient",
                error,
                "",
                "<= 1e-2",
                error <= 1e-2,
            )
        )
    return lines
