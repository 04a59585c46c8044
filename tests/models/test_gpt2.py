"""GPT-2 small and medium against a plain reading of their description, their masks, and what is compiled when."""

import math

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from models import ModelConfig, build_model
from models.attention import attend, block_mask, documents, make_mask
from models.gpt2 import rotary
from polargrad_dist.errors import ConfigError
from tests.models.tiny import awake, tiny

GPT2 = ["gpt2-small", "gpt2-medium"]


def plain(model, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """Logits (T, V) of one sequence by the description, one head and one layer at a time, in fp64."""
    p = {name: q.detach().double() for name, q in model.named_parameters()}
    c, small = model.config, model.config.architecture == "gpt2-small"
    length, d = len(tokens), model.config.head_width
    unit = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()  # noqa: E731
    at = torch.arange(length)
    docs = (tokens == c.end_of_text).cumsum(0)
    angle = torch.zeros(length, d // 2, dtype=torch.float64)
    angle[:, : d // 4] = at[:, None] * (1 / 1024) ** torch.linspace(0, 1, d // 4, dtype=torch.float64)

    def turned(x):
        a, b = x[:, : d // 2], x[:, d // 2 :]
        return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], 1)

    table_of = {0: 0, 1: 1, 2: 2, c.layers - 3: 0, c.layers - 2: 1, c.layers - 1: 2}
    skips = {6: 5, 7: 4, 8: 3, 9: 2, 10: 1, 11: 0} if small else {9: 6, 10: 4, 11: 2}
    x = x0 = unit(p["embed.weight"][tokens])
    outputs = []
    for i in range(c.layers):
        if i in skips:
            x = x + (p["skip"][i - 6] if small else p["scalars"][i]) * outputs[skips[i]]
        a, b = p[f"layers.{i}.mix"] if small else p["scalars"][16 + 2 * i : 18 + 2 * i]
        x = a * x + b * x0
        if i != 7:
            if small:
                matrices = [p[f"layers.{i}.attention.{name}.weight"] for name in "qkvo"]
                a, b = p[f"layers.{i}.attention.mix"]
                near = window
            else:
                matrices = [*p[f"layers.{i}.attention.qkvo"][:3], p[f"layers.{i}.attention.qkvo"][3].T]
                a, b = p["scalars"][48 + 2 * i : 50 + 2 * i]
                near = window if i in (0, 4, 11, 15) else window // 2 // 128 * 128
            seen = (
                (at[:, None] >= at)
                & (docs[:, None] == docs)
                & (at[:, None] // 128 - at // 128 < max(1, near // 128))
            )
            inside = unit(x) if small else x
            heads = []
            for h in range(c.heads):
                rows = slice(h * d, h * d + d)
                q, k, v = (inside @ m[rows].T for m in matrices[:3])
                v = a * (v if small else unit(v))
                if i in table_of:
                    v = v + b * p[f"value_embeds.{table_of[i]}.weight"][tokens][:, rows]
                scores = turned(unit(q)) @ turned(unit(k)).T * (1 / math.sqrt(d) if small else 0.12)
                heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
            x = x + torch.cat(heads, 1) @ matrices[3].T
        inner = (unit(x) @ p[f"layers.{i}.mlp.up.weight"].T).clamp(min=0) ** 2
        x = x + inner @ p[f"layers.{i}.mlp.down.weight"].T
        outputs.append(x)
    z = unit(x) @ p["head.weight"].T
    return 15 * torch.tanh(z / 15) if small else 15 * z / (z**2 + 225).sqrt()


@pytest.mark.parametrize("architecture", GPT2)
def test_the_logits_are_those_of_the_description(architecture):
    model = awake(tiny(architecture, layers=12 if architecture == "gpt2-small" else 16, width=32, heads=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    tokens = torch.randint(0, 95, (1, 400))
    tokens[0, 37] = tokens[0, 250] = 95
    # Windows of 256; 384 and 128
    progress = {"gpt2-small": 0.08, "gpt2-medium": 0.03}[architecture]
    logits = model(tokens, progress=progress)[0].detach().double()
    torch.testing.assert_close(logits, plain(model, tokens[0], model.window(progress)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["gpt2-small", "gpt2-medium"])
def test_documents_do_not_see_each_other(architecture):
    model = awake(tiny(architecture)).eval()
    tokens = torch.randint(0, 95, (1, 30))
    tokens[0, 12] = 95
    other = tokens.clone()
    other[0, 3] = (other[0, 3] + 1) % 95
    a, b = model(tokens), model(other)
    assert torch.equal(a[:, 12:], b[:, 12:])
    assert not torch.allclose(a[:, 3:12], b[:, 3:12])


def test_windows_are_counted_in_blocks_of_128_tokens():
    docs = torch.zeros(1, 512, dtype=torch.int64)
    dense = make_mask(docs, 256, flex=False).dense[0, 0]
    assert dense[300, 128:301].all()
    assert not dense[300, :128].any()
    assert not dense[300, 301:].any()


def test_windows_grow_as_the_records_have_it():
    small = build_model(ModelConfig("gpt2-small"), device="meta")
    assert [small.window(t) for t in (0.0, 0.5, 1.0)] == [128, 896, 1792]
    medium = build_model(ModelConfig("gpt2-medium"), device="meta")
    assert [medium.window(t) for t in (0.0, 0.5, 1.0)] == [128, 1792, 3456]
    assert medium.skip_from == {9: 6, 10: 4, 11: 2}
    assert medium.long == {0, 4, 11, 15}
    assert [i for i, layer in enumerate(medium.layers) if layer.attention is None] == [7]
    assert sorted(small.value_of.items()) == [(0, 0), (1, 1), (2, 2), (9, 0), (10, 1), (11, 2)]
    assert sorted(medium.value_of.items()) == [(0, 0), (1, 1), (2, 2), (13, 0), (14, 1), (15, 2)]


@pytest.mark.parametrize("length", [128, 300, 640])
@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_block_masks_are_those_that_pytorch_makes_of_all_pairs(length, blocks):
    torch.manual_seed(length)
    for rate in (0.0, 0.004, 0.02):
        docs = (torch.rand(3, length) < rate).cumsum(1)
        mask = block_mask(docs, torch.tensor(blocks))
        expected = create_block_mask(mask.mask_mod, 3, None, length, length, device="cpu", BLOCK_SIZE=128)
        for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(mask, part), getattr(expected, part))
        assert torch.equal(mask.to_dense(), expected.to_dense())
        assert mask.seq_lengths == (length, length)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("length", [256, 300])
def test_flex_attention_and_sdpa_agree(length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16) for _ in range(3))
    docs = documents(torch.randint(0, 40, (2, length)), 39)
    for window in (0, 128, 256):
        a = attend(q, k, v, make_mask(docs, window, flex=True), 0.12)
        b = attend(q, k, v, make_mask(docs, window, flex=False), 0.12)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("architecture", GPT2)
def test_a_model_is_the_same_on_both_paths(architecture):
    tokens = torch.randint(0, 96, (2, 384))
    with torch.no_grad():
        flex, sdpa = (awake(tiny(architecture, attention=a))(tokens, progress=0.1) for a in ("flex", "sdpa"))
    torch.testing.assert_close(flex, sdpa, rtol=1e-4, atol=1e-4)


def test_training_with_flex_attention_on_a_cpu_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="is 'flex', which"):
        tiny("gpt2-small", attention="flex")(torch.zeros(1, 8, dtype=torch.int64))


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_a_growing_window_compiles_nothing_again(attention):
    model = tiny("gpt2-medium", attention=attention)
    torch._dynamo.reset()
    counters.clear()
    model.compile_blocks(backend="eager")
    graphs = []
    with torch.no_grad():
        for progress in (0.0, 0.02, 0.1, 0.3, 1.0):
            model(torch.randint(0, 96, (1, 384)), progress=progress)
            graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    # With a value embedding, without, without attention
    assert graphs == [3] * 5


def test_half_of_the_rotary_pairs_turn_and_distances_are_all_that_counts():
    turn = rotary(10, 16, torch.device("cpu"))
    cos, sin = turn.cos, turn.sin
    assert torch.equal(cos[:, 4:], torch.ones(10, 4))
    assert float(sin[1, 0]) == pytest.approx(torch.tensor(1.0).sin().item())
    q, k = torch.randn(16), torch.randn(16)
    turned_q, turned_k = (turn(x.expand(1, 1, 10, 16))[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores.diagonal(2), scores.diagonal(2)[:1].expand(8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2-small", "gpt2-medium"])
def test_output_projections_and_head_start_at_zero(architecture):
    model = tiny(architecture)
    assert not model.head.weight.any()
    assert all(not layer.mlp.down.weight.any() for layer in model.layers)
    logits = model(torch.randint(0, 95, (1, 9)))
    assert not logits.any()


@pytest.mark.parametrize("layers", [2, 3, 5, 12])
@pytest.mark.parametrize("architecture", ["gpt2-small", "gpt2-medium"])
def test_any_number_of_layers_trains(architecture, layers):
    model = awake(tiny(architecture, layers=layers))
    tokens = torch.randint(0, 95, (1, 20))
    model(tokens, tokens.roll(-1, 1)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("architecture", GPT2)
def test_under_autocast_blocks_and_attention_compute_in_bf16(architecture, monkeypatch):
    seen = set()

    def spy(q, k, v, *rest):
        seen.update((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v, *rest)

    monkeypatch.setattr("models.gpt2.attend", spy)
    model = awake(tiny(architecture))
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    tokens = torch.randint(0, 95, (1, 20))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens)
    assert seen == {torch.bfloat16}
    assert loss.dtype == torch.float32


def test_mediums_matrices_start_as_the_record_has_them():
    model = tiny("gpt2-medium", width=256, heads=2)
    for layer in model.layers:
        assert float(layer.mlp.up.weight.detach().std()) == pytest.approx(0.5 * 256**-0.5, rel=0.02)
        assert float(layer.mlp.down.weight.detach().abs().max()) == 0
    qkvo = next(layer.attention.qkvo for layer in model.layers if layer.attention is not None)
    assert float(qkvo[:3].detach().std()) == pytest.approx(0.5 * 256**-0.5, rel=0.02)


def test_mediums_padding_rows_are_classes_that_never_occur_but_in_samples():
    model = tiny("gpt2-medium")
    tokens = torch.randint(0, 95, (1, 40))
    loss = model(tokens, tokens)
    # Not ln 96: the head starts at zero
    assert float(loss.detach()) == pytest.approx(math.log(128), rel=1e-6)
    loss.backward()
    assert model.head.weight.grad[96:].abs().sum() > 0
    assert model(tokens).shape == (1, 40, 128)
    with torch.no_grad():
        model.head.weight[100] = 1.0
        model.head.weight[101] = -1.0
        assert model.generate(tokens, 20, temperature=5.0).max() < 96
