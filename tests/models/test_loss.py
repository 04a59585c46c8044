"""The loss in pieces: the plain loss to rounding, its gradients written out, compiled or not, and no work for nothing."""

import logging

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import models.loss
from models.loss import loss_sum, soft_capped
from polargrad_dist import compiled
from tests.models.tiny import ALL, awake, tiny

CAPS = ["none", "tanh", "algebraic"]


def example(rows: int = 60, vocabulary: int = 96, width: int = 16):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=draw).requires_grad_()
    weight = (2 * torch.randn(vocabulary, width, generator=draw)).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=draw)
    targets[::7] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets, soft_cap):
    return F.cross_entropy(soft_capped(hidden @ weight.T, soft_cap), targets, reduction="sum")


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setitem(models.loss.PIECE, "cpu", 96 * 16)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_the_plain_loss(cap, backend, small_pieces):
    inputs = example()
    precise = [x.detach().double().requires_grad_(x.is_floating_point()) for x in inputs[:2]]
    expected = plain(*precise, inputs[2], cap)
    wanted = torch.autograd.grad(3 * expected, precise)
    loss = loss_sum(*inputs, cap, backend=backend)
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach()) / float(expected.detach()) - 1) <= 1e-6
    for found, right in zip(torch.autograd.grad(3 * loss, inputs[:2]), wanted, strict=True):
        assert (found - right).abs().max() <= 1e-6 * right.abs().max()
    with torch.no_grad():
        assert abs(float(loss_sum(*inputs, cap, backend=backend)) / float(expected.detach()) - 1) <= 1e-6


@pytest.mark.parametrize("cap", CAPS)
def test_extreme_logits_stay_finite(cap):
    hidden, weight, targets = example()
    large = (100 * hidden.detach()).requires_grad_()
    loss = loss_sum(large, weight, targets, cap)
    torch.testing.assert_close(loss, plain(large, weight, targets, cap), rtol=1e-5, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (large, weight)))


def test_half_precision_weights_get_a_gradient_summed_in_fp32(monkeypatch):
    hidden, weight, targets = (x.detach() for x in example(rows=4096))
    weight = weight.bfloat16().requires_grad_()
    hidden = hidden.bfloat16()
    # 512 pieces: a bf16 sum of them would be off by percents
    monkeypatch.setitem(models.loss.PIECE, "cpu", 96 * 8)
    (found,) = torch.autograd.grad(loss_sum(hidden, weight, targets), weight)
    exact = weight.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(plain(hidden.double(), exact, targets, "none"), exact)
    assert found.dtype == torch.bfloat16
    assert (found.double() - right).norm() <= 5e-3 * right.norm()


def test_autocast_multiplies_in_its_dtype_and_gives_gradients_in_the_parameters():
    hidden, weight, targets = example()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_sum(hidden, weight, targets, "tanh")
        expected = F.cross_entropy(
            soft_capped(F.linear(hidden, weight).float(), "tanh"), targets, reduction="sum"
        )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    for found, right in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert (found - right).norm() <= 1e-2 * right.norm()


@pytest.mark.parametrize("frozen", ["nothing", "hidden", "weight", "everything"])
def test_only_the_gradients_that_are_asked_for_are_worked_out(frozen, monkeypatch, small_pieces):
    hidden, weight, targets = example()
    hidden.requires_grad_(frozen in ("nothing", "weight"))
    weight.requires_grad_(frozen in ("nothing", "hidden"))
    calls = []
    plain_pass = models.loss.into_gradient
    monkeypatch.setattr(models.loss, "into_gradient", lambda *a: (calls.append(1), plain_pass(*a)))
    loss = loss_sum(hidden, weight, targets)
    assert loss.requires_grad == (frozen != "everything")
    assert len(calls) == (0 if frozen == "everything" else 4)
    if loss.requires_grad:
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight")
    calls.clear()
    with torch.no_grad():
        loss_sum(hidden, weight, targets)
    assert not calls


def test_without_a_compiler_the_loss_runs_uncompiled_and_says_so_once(monkeypatch, caplog):
    from torch._inductor.exc import InductorError

    def broken(*_):
        def call(*args):
            raise InductorError(RuntimeError("no working C++ compiler"), None)

        return call

    monkeypatch.setattr(compiled, "_compiled", broken)
    monkeypatch.setattr(compiled._uncompiled, "reason", "")
    hidden, weight, targets = example()
    with caplog.at_level(logging.WARNING, logger="polargrad_dist.compiled"):
        losses = [float(loss_sum(hidden, weight, targets, backend="inductor").detach()) for _ in range(3)]
    assert losses == [float(loss_sum(hidden, weight, targets).detach())] * 3
    assert len(caplog.records) == 1
    assert "uncompiled" in caplog.text


def test_compiling_the_blocks_compiles_the_loss(monkeypatch):
    seen = []
    plain_run = models.loss.run_compiled
    monkeypatch.setattr(
        models.loss, "run_compiled", lambda f, how, *a: (seen.append(how), plain_run(f, None, *a))[1]
    )
    model = tiny("gpt2-small")
    tokens = torch.randint(0, 95, (1, 40))
    model(tokens, tokens)
    model.compile_blocks(backend="eager")
    model(tokens, tokens)
    assert seen == [None, None, "eager", "eager"]


@pytest.mark.parametrize("rows", [7, 16, 80, 1000])
@pytest.mark.parametrize("architecture", ALL)
def test_a_loss_in_pieces_has_the_gradient_of_the_whole_logits(architecture, rows, monkeypatch):
    model = awake(tiny(architecture))
    tokens, targets = torch.randint(0, 95, (2, 40)), torch.randint(0, 95, (2, 40))
    targets[1, 30:] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    (3 * expected).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setitem(models.loss.PIECE, "cpu", len(model.get_output_embeddings().weight) * rows)
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    for p, g in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_a_loss_in_pieces_never_holds_the_logits_of_the_whole_batch(monkeypatch):
    monkeypatch.setitem(models.loss.PIECE, "cpu", 96 * 16)
    sizes = []
    plain_pass = models.loss.normalizer
    monkeypatch.setattr(models.loss, "normalizer", lambda z, *a: (sizes.append(len(z)), plain_pass(z, *a))[1])
    model = tiny("qwen2.5")
    tokens = torch.randint(0, 95, (2, 40))
    model(tokens, tokens)
    assert sizes == [16] * 5


def test_a_frozen_head_still_lets_the_gradient_through():
    grads = []
    for frozen in (False, True):
        model = awake(tiny("qwen2.5"))
        model.get_output_embeddings().weight.requires_grad_(not frozen)
        tokens = torch.arange(40).view(1, 40)
        model(tokens, tokens + 1).backward()
        grads.append(model.get_input_embeddings().weight.grad)
        assert (model.get_output_embeddings().weight.grad is None) == frozen
    assert torch.equal(*grads)
    with torch.no_grad():
        assert not model(tokens, tokens + 1).requires_grad


@pytest.mark.slow
def test_the_compiled_loss_moves_at_most_fifteen_bytes_per_logit():
    from benchmarks.loss_bytes import CASES, GOAL, measure

    for case in CASES:
        compiled, eager = measure(case)
        assert compiled <= GOAL
        assert compiled < eager / 4
