"""The plain GPT against a reading of its description in fp64, one head at a time."""

import math

import pytest
import torch

from models import ModelConfig, build_model
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import route
from tests.models.tiny import awake, tiny


def described(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one sequence."""
    p = {name: q.detach().double() for name, q in model.named_parameters()}
    c, length, d = model.config, len(tokens), model.config.head_width
    eps = torch.finfo(torch.float32).eps
    unit = lambda x: x / (x.square().mean(-1, keepdim=True) + eps).sqrt()  # noqa: E731
    at = torch.arange(length)
    angle = torch.zeros(length, d // 2, dtype=torch.float64)
    angle[:, : d // 4] = at[:, None] * (1 / 1024) ** torch.linspace(0, 1, d // 4, dtype=torch.float64)

    def turned(x):
        a, b = x[:, : d // 2], x[:, d // 2 :]
        return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], 1)

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = unit(p["embed.weight"][tokens]) * p["embed_norm.weight"]
    for i in range(c.layers):
        inside = unit(x) * p[f"layers.{i}.attention_norm.weight"]
        q, k, v = (linear(f"layers.{i}.attention.{name}", inside) for name in "qkv")
        heads = []
        for h in range(c.heads):
            part = slice(h * d, h * d + d)
            scores = turned(unit(q[:, part])) @ turned(unit(k[:, part])).T * 0.12
            heads.append(scores.masked_fill(at > at[:, None], -torch.inf).softmax(-1) @ v[:, part])
        x = x + linear(f"layers.{i}.attention.o", torch.cat(heads, 1))
        inner = linear(f"layers.{i}.mlp.up", unit(x) * p[f"layers.{i}.mlp_norm.weight"])
        x = x + linear(f"layers.{i}.mlp.down", inner.clamp(min=0) ** 2)
    z = linear("head", unit(x) * p["norm.weight"])
    return 15 * z / (z**2 + 225).sqrt()


def test_the_logits_are_those_of_the_description():
    model = awake(tiny("gpt"))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    tokens = torch.randint(0, 96, (1, 200))
    found = model(tokens)[0].detach().double()
    torch.testing.assert_close(found, described(model, tokens[0]), rtol=1e-3, atol=1e-3)


def test_it_starts_as_the_benchmark_says():
    model = build_model(ModelConfig("gpt", layers=2))
    assert not model.head.weight.any()
    assert not model.layers[0].attention.o.weight.any()
    assert not model.layers[1].mlp.down.weight.any()
    assert abs(float(model.embed.weight.std()) - 1) < 0.01
    assert abs(float(model.layers[0].mlp.up.weight.std()) - math.sqrt(0.33 / 768)) < 1e-4
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert build_model(ModelConfig("gpt"), vocab_size=50_257, device="meta").vocab_size == 50_304


def test_the_heads_bias_learns_and_its_role_is_scalar():
    model = awake(tiny("gpt"))
    tokens = torch.randint(0, 95, (2, 30))
    model(tokens, tokens).backward()
    grad = model.head.bias.grad.clone()
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    torch.testing.assert_close(grad, model.head.bias.grad, rtol=1e-4, atol=1e-6)
    roles = {name: group["role"] for group in route(model) for name in group["param_names"]}
    assert roles["head.bias"] == "scalar"
    assert roles["head.weight"] == "head"
    assert roles["embed.weight"] == "embed"


def test_projections_may_start_away_from_zero_for_rules_that_keep_norms():
    model = build_model(ModelConfig("gpt", layers=1, vocab_size=128, zero_projections=False))
    weights = {
        "o": model.layers[0].attention.o,
        "up": model.layers[0].mlp.up,
        "down": model.layers[0].mlp.down,
        "q": model.layers[0].attention.q,
        "head": model.head,
    }
    stds = {name: float(layer.weight.detach().std()) for name, layer in weights.items()}
    expected = {"o": 0.026, "up": 0.031, "down": 0.031, "q": (0.33 / 768) ** 0.5, "head": (0.33 / 768) ** 0.5}
    assert all(abs(stds[name] / std - 1) < 0.02 for name, std in expected.items()), stds
    with pytest.raises(ConfigError, match="which only 'gpt' has"):
        build_model(ModelConfig("gpt2-small", zero_projections=False), device="meta")
