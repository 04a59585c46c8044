"""Elementwise work in one kernel each, as on GPUs, has the bits of the operations that it is made of."""

import copy
import logging

import pytest
import torch
from torch import nn

from polargrad_dist import PolarGrad, compiled
from polargrad_dist.distributed.transport import pack_triangle, unpack_triangle
from polargrad_dist.optim.elements import join_bf16, selected_ema, selected_step
from polargrad_dist.optim.member import Travel
from tests.gloo import run_ranks

GROUPS = {
    "Muon, decay": {"oracle": "newton_schulz", "scale": "muon", "nesterov": True, "weight_decay": 0.1},
    "nuclear, cautious": {"oracle": "svd", "control": "cautious", "weight_decay": 0.1},
    "polar first": {"momentum": "polar_first", "weight_decay": 0.1},
    "heavy ball": {"momentum": "heavy_ball"},
    "by rows": {"row_sharded": True, "oracle": "gram", "beta": 0.5},
    "truncated, by rows": {"row_sharded": True, "oracle": "qdwh", "steps": 2},
    "none": {"momentum": "none"},
}


def bits(x: torch.Tensor) -> torch.Tensor:
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


def stepped(backend: str | None, dtype: torch.dtype, comm: str | None = None) -> list[torch.Tensor]:
    """Weights and states after five steps, of which the third is not to happen and has gradients that are not finite.

    With backend "none at all" functions are called as if they were compiled.
    """
    Travel.backend = backend
    if backend == "none at all":
        compiled._compiled = lambda function, *_: function
    torch.manual_seed(0)
    shapes = {name: (64, 8) if "rows" in name else (24, 16) for name in GROUPS}
    model = nn.ParameterDict(
        {f"{name}{i}": nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items() for i in range(3)}
        | {"vector": nn.Parameter(torch.randn(33).to(dtype)), "table": nn.Parameter(torch.randn(400, 200).to(dtype))}
    )  # fmt: skip
    groups = [
        {"params": [(f"{name}{i}", model[f"{name}{i}"]) for i in range(3)], "momentum": "momentum_first"}
        | options
        for name, options in GROUPS.items()
    ]
    groups.append({"params": [(n, model[n]) for n in ("vector", "table")], "algorithm": "adamw"})
    optimizer = PolarGrad(groups, lr=0.02, comm_dtype=comm)
    for step in range(5):
        for name, p in model.items():
            torch.manual_seed(step * 1000 + sum(map(ord, name)))
            p.grad = torch.randn(p.shape).to(dtype)
            if step == 2:
                p.grad.view(-1)[3] = float("nan")
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        shrink = torch.tensor(0.1 * (step + 1), dtype=torch.float64)
        optimizer.step(ok=torch.tensor(step != 2), shrink=shrink)
    state = optimizer.named_state()
    return [bits(p.detach()).clone() for p in model.values()] + [
        bits(state[name]).clone() for name in sorted(state)
    ]


@pytest.fixture(autouse=True)
def restored():
    before = Travel.backend, compiled._compiled
    yield
    Travel.backend, compiled._compiled = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_has_the_bits_of_its_operations(dtype):
    apart, together = stepped(None, dtype), stepped("none at all", dtype)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def _both(rank: int, world: int, dtype: torch.dtype, comm: str | None) -> bool:
    apart, together = stepped(None, dtype, comm), stepped("none at all", dtype, comm)
    return all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@pytest.mark.parametrize(
    ("dtype", "comm"), [(torch.float32, None), (torch.float32, "bfloat16"), (torch.bfloat16, None)]
)
def test_on_two_ranks_too(dtype, comm):
    assert run_ranks(_both, 2, dtype, comm) == [True, True]


def test_shrinking_while_reading_is_clipping_beforehand():
    def run(by_step: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
        optimizer = PolarGrad(
            model,
            hidden={"scale": "nuclear", "lr": 0.02, "momentum": "momentum_first"},
            scalar={"lr": 0.1},
        )
        for _ in range(3):
            optimizer.zero_grad()
            (100 * model(torch.randn(8, 16)).square().mean()).backward()
            if by_step:
                norm = optimizer.clip_grad_norm_(float("inf"))
                assert norm > 1
                optimizer.step(shrink=torch.clamp(1.0 / (norm + 1e-6), max=1.0))
            else:
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_a_norm_within_its_limit_leaves_every_bit_of_the_gradients():
    p = nn.Parameter(torch.randn(8, 8))
    p.grad = torch.full((8, 8), 1e-3)
    version = p.grad._version
    assert PolarGrad([p], lr=0.1).clip_grad_norm_(1.0) < 1
    # Nobody wrote to it
    assert p.grad._version == version


@pytest.mark.slow
def test_inductor_makes_one_kernel_of_a_step_and_it_agrees():
    import torch._inductor.metrics as metrics

    torch._dynamo.reset()
    torch.manual_seed(0)
    weights, direction = torch.randn(3, 1, 40, 24), torch.randn(3, 1, 40, 24)
    scale, ok = (
        torch.rand(3, 1, 1, 1, dtype=torch.float64),
        torch.tensor([True, False, True]).view(3, 1, 1, 1),
    )
    number = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    low = torch.randint(-3000, 3000, weights.shape, dtype=torch.int16)
    given = [weights.bfloat16(), low, direction, scale, number(0.02), number(0.002), ok]
    mine = copy.deepcopy(given)
    metrics.reset()
    new = compiled.run_compiled(selected_step, "inductor", *mine, False, dynamic=True)
    assert metrics.generated_kernel_count == 1
    expected = selected_step(*given, False)
    exact, got = (
        x.view(torch.int16).to(torch.int32) * 65536 + y for x, y in ((expected, given[1]), (new, mine[1]))
    )
    # Units of the fp32 value that both halves make
    assert (exact - got).abs().max() <= 2
    assert torch.equal(new[1], given[0][1])
    metrics.reset()
    m, grad = torch.randn(3, 1, 40, 24), torch.randn(3, 1, 40, 24)
    kept = m.clone()
    options = number(0.95), number(1.0), torch.tensor(True)
    got = compiled.run_compiled(selected_ema, "inductor", m, grad, *options, True, dynamic=True)
    assert metrics.generated_kernel_count == 1
    torch.testing.assert_close(got, selected_ema(kept, grad, *options, True))
    torch.testing.assert_close(m, kept)
    S = torch.randn(33, 33, dtype=torch.float64)
    S = S + S.T
    packed = compiled.run_compiled(pack_triangle, "inductor", S)
    assert torch.equal(packed, pack_triangle(S))
    assert torch.equal(compiled.run_compiled(unpack_triangle, "inductor", packed, 33), S)
    joined = compiled.run_compiled(join_bf16, "inductor", *given[:2], dynamic=True)
    assert torch.equal(joined, join_bf16(*given[:2]))


def test_without_a_compiler_a_step_runs_uncompiled_and_says_so_once(monkeypatch, caplog):
    from torch._inductor.exc import InductorError

    def broken(*_):
        def fail(*_):
            raise InductorError(RuntimeError("no Triton"), None)

        return fail

    monkeypatch.setattr(compiled, "_compiled", broken)
    monkeypatch.setattr(compiled._uncompiled, "reason", "")
    with caplog.at_level(logging.WARNING):
        together = stepped("inductor", torch.float32)
    assert caplog.text.count("uncompiled") == 1
    monkeypatch.setattr(compiled._uncompiled, "reason", "")
    assert all(torch.equal(a, b) for a, b in zip(stepped(None, torch.float32), together, strict=True))
