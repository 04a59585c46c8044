"""The models are the paper's to the last scalar, and do what their descriptions say at any size."""

import pytest
import torch

from models import ModelConfig, build_model
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import route
from tests.models.tiny import ALL, COUNTS, TINY, awake, tiny


@pytest.mark.parametrize("architecture", ALL)
def test_full_size_models_have_exactly_the_papers_parameters(architecture):
    model = build_model(ModelConfig(architecture), device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[architecture]


@pytest.mark.parametrize("architecture", ALL)
def test_loss_is_the_mean_over_targets_and_matches_the_logits(architecture):
    model = awake(tiny(architecture))
    tokens = torch.randint(0, 95, (2, 40))
    targets = torch.randint(0, 95, (2, 40))
    targets[0, :7] = -100
    expected = torch.nn.functional.cross_entropy(
        model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100
    )
    assert float(model(tokens, targets).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("architecture", ALL)
def test_no_token_sees_a_later_one(architecture):
    model = awake(tiny(architecture)).eval()
    tokens = torch.randint(0, 95, (1, 30))
    other = tokens.clone()
    other[0, 20] = (other[0, 20] + 1) % 95
    a, b = model(tokens), model(other)
    assert torch.equal(a[:, :20], b[:, :20])
    assert not torch.allclose(a[:, 20:], b[:, 20:])


@pytest.mark.parametrize("architecture", ALL)
def test_every_parameter_gets_a_gradient_and_a_role(architecture):
    model = awake(tiny(architecture))
    tokens = torch.randint(0, 95, (2, 40))
    model(tokens, tokens.roll(-1, 1)).backward()
    assert all(p.grad is not None for p in model.parameters())
    roles = {name: group["role"] for group in route(model) for name in group["param_names"]}
    assert len(roles) == len(list(model.parameters()))
    found = set(roles.values())
    assert found == {"hidden", "embed", "head", "scalar"} | (
        {"value_embed"} if "gpt2" in architecture else set()
    )


@pytest.mark.parametrize("architecture", ALL)
def test_checkpointed_blocks_give_the_same_gradient(architecture):
    tokens = torch.randint(0, 95, (1, 20))
    grads = []
    for again in (False, True):
        model = awake(tiny(architecture))
        torch.manual_seed(1)
        if again:
            model.checkpoint_blocks()
        model(tokens, tokens.roll(-1, 1)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_qwen_checkpoint_is_an_ordinary_one(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny("qwen2.5").eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 95, (1, 12))
    torch.testing.assert_close(loaded(tokens).logits.float(), model(tokens))


def test_generation_is_reproducible_and_greedy_at_temperature_zero():
    model = awake(tiny("gpt2-small")).eval()
    start = torch.tensor([[1, 2, 3]])
    one = model.generate(start, 5, generator=torch.Generator().manual_seed(3), top_k=10)
    two = model.generate(start, 5, generator=torch.Generator().manual_seed(3), top_k=10)
    assert torch.equal(one, two)
    greedy = model.generate(start, 4, temperature=0)
    for i in range(3, 7):
        assert int(greedy[0, i]) == int(model(greedy[:, :i], progress=1.0)[0, -1].argmax())


def test_generation_goes_on_beyond_the_longest_sequence():
    model = awake(tiny("qwen2.5", max_sequence_length=8)).eval()
    text = model.generate(torch.tensor([[1, 2, 3]]), 20, temperature=0)
    assert text.shape == (1, 23)
    assert int(text[0, -1]) == int(model(text[:, -9:-1])[0, -1].argmax())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30, "heads": 4}, "does not divide"),
        ({"layers": 0}, "model.layers is 0"),
        ({"kv_heads": 1, "architecture": "gpt2-small"}, "only qwen2.5 has"),
        ({"attention": "flex"}, "only the GPT-2 models have"),
        ({"heads": 3, "kv_heads": 2, "width": 48}, "multiple of model.kv_heads"),
        ({"end_of_text": 96, "architecture": "gpt2-small"}, "no document would ever end"),
    ],
)
def test_impossible_sizes_are_refused_in_a_sentence(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(**({"architecture": "qwen2.5"} | TINY | changes)))


def test_too_long_a_sequence_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="max_sequence_length allows 16"):
        tiny("qwen2.5", max_sequence_length=16)(torch.zeros(1, 17, dtype=torch.int64))


def test_rotary_frequencies_of_a_bf16_qwen_stay_exact():
    model = tiny("qwen2.5", width=64)
    exact = model.qwen.model.rotary_emb.inv_freq.clone()
    expected = 1e6 ** -(torch.arange(16, dtype=torch.float64) / 16)
    torch.testing.assert_close(exact.double(), expected, rtol=1e-6, atol=0)
    model.to(torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.qwen.model.rotary_emb.inv_freq, exact, rtol=1e-6, atol=0)


def test_a_tokenizer_says_what_the_configuration_leaves_open():
    sizes = ModelConfig("gpt2-small").resolved(50_257, 50_256)
    assert (sizes.vocab_size, sizes.end_of_text) == (50_304, 50_256)
    assert ModelConfig("gpt2-medium").resolved(50_257, 50_256).vocab_size == 50_257
    assert ModelConfig("qwen2.5", vocab_size=300).resolved(200, 5).vocab_size == 300
    assert ModelConfig("gpt2-medium").resolved(500).end_of_text == -1
    assert ModelConfig("gpt2-medium", vocab_size=500).resolved().end_of_text == -1
    assert ModelConfig("gpt2-medium", end_of_text=7).resolved(500, 9).end_of_text == 7


def test_flops_are_six_per_weight_and_the_scores():
    model = tiny("gpt2-small", layers=4, width=32)
    c = model.config
    # One of the four layers has no attention
    matrices = 3 * 4 * 32 * 32 + 4 * 8 * 32 * 32 + c.vocab_size * 32
    scalars = 3 * 2 + 4 * 2 + 2
    assert model.flops_per_token(100) == 6 * (matrices + scalars) + 12 * 4 * 32 * 100
