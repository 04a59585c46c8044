"""The models are the paper's to the last scalar, and do what their descriptions say at any size."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from models import ModelConfig, build_model
from models.attention import attend, documents, make_mask
from models.gpt2 import rotary, rotate
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import route
from tests.gloo import run_ranks

COUNTS = {"qwen2.5": 540_865_536, "gpt2-small": 275_742_772, "gpt2-medium": 454_496_336}
TINY = {"vocab_size": 96, "width": 32, "layers": 4, "heads": 2, "max_sequence_length": 512, "end_of_text": 95}
ALL = list(COUNTS)


def tiny(architecture: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(architecture, **(TINY | changes)))


def awake(model: torch.nn.Module) -> torch.nn.Module:
    """With the projections and head that start at zero made random, so that everything matters."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                for matrix in p if p.ndim == 3 else [p]:
                    if not matrix.any():
                        matrix.normal_(std=0.2)
    return model


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


@pytest.mark.parametrize("rows", [7, 16, 80, 1000])
@pytest.mark.parametrize("architecture", ALL)
def test_a_loss_in_pieces_has_the_gradient_of_the_whole_logits(architecture, rows, monkeypatch):
    model = awake(tiny(architecture))
    tokens, targets = torch.randint(0, 95, (2, 40)), torch.randint(0, 95, (2, 40))
    targets[1, 30:] = -100
    expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    (3 * expected).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr("models.loss.PIECE", {"cpu": 96 * rows, "cuda": 0})
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    for p, g in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_a_loss_in_pieces_never_holds_the_logits_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr("models.loss.PIECE", {"cpu": 96 * 16, "cuda": 0})
    sizes = []
    model = tiny("gpt2-small")
    plain = model.logits
    monkeypatch.setattr(model, "logits", lambda h, w: (sizes.append(len(h)), plain(h, w))[1])
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


@pytest.mark.parametrize("architecture", ALL)
def test_no_token_sees_a_later_one(architecture):
    model = awake(tiny(architecture)).eval()
    tokens = torch.randint(0, 95, (1, 30))
    other = tokens.clone()
    other[0, 20] = (other[0, 20] + 1) % 95
    a, b = model(tokens), model(other)
    assert torch.equal(a[:, :20], b[:, :20])
    assert not torch.allclose(a[:, 20:], b[:, 20:])


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


def test_flex_attention_and_sdpa_agree():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 256, 16) for _ in range(3))
    tokens = torch.randint(0, 40, (2, 256))
    docs = documents(tokens, 39)
    for window in (128, 256):
        a = attend(q, k, v, make_mask(docs, window, flex=True), 0.12)
        b = attend(q, k, v, make_mask(docs, window, flex=False), 0.12)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_half_of_the_rotary_pairs_turn_and_distances_are_all_that_counts():
    cos, sin = rotary(10, 16, torch.device("cpu"))
    assert torch.equal(cos[:, 4:], torch.ones(10, 4))
    assert float(sin[1, 0]) == pytest.approx(torch.tensor(1.0).sin().item())
    q, k = torch.randn(16), torch.randn(16)
    turned_q, turned_k = (rotate(x.expand(1, 1, 10, 16), cos, sin)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores.diagonal(2), scores.diagonal(2)[:1].expand(8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2-small", "gpt2-medium"])
def test_output_projections_and_head_start_at_zero(architecture):
    model = tiny(architecture)
    assert not model.head.weight.any()
    assert all(not layer.mlp.down.weight.any() for layer in model.layers)
    logits = model(torch.randint(0, 95, (1, 9)))
    assert not logits.any()


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


@pytest.mark.parametrize("layers", [2, 3, 5, 12])
@pytest.mark.parametrize("architecture", ["gpt2-small", "gpt2-medium"])
def test_any_number_of_layers_trains(architecture, layers):
    model = awake(tiny(architecture, layers=layers))
    tokens = torch.randint(0, 95, (1, 20))
    model(tokens, tokens.roll(-1, 1)).backward()
    assert all(p.grad is not None for p in model.parameters())


def _placed(rank: int, world: int, architecture: str, how: str) -> float:
    model = tiny(architecture)
    if how == "ddp":
        placed = DistributedDataParallel(model)
    else:
        for block in model.blocks:
            fully_shard(block)
        placed = fully_shard(model)
    tokens = torch.arange(40).view(1, 40) + rank
    placed(tokens, tokens + 1).backward()
    return float(sum(p.grad is not None for p in placed.parameters()))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("architecture", ALL)
def test_models_run_under_ddp_and_fsdp2(architecture, how):
    count = len(list(tiny(architecture).parameters()))
    assert run_ranks(_placed, 2, architecture, how) == [count, count]


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
    greedy = model.generate(start, 1, temperature=0)
    assert int(greedy[0, -1]) == int(model(start)[0, -1].argmax())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30, "heads": 4}, "does not divide"),
        ({"layers": 0}, "model.layers is 0"),
        ({"kv_heads": 1, "architecture": "gpt2-small"}, "only qwen2.5 has"),
        ({"attention": "flex"}, "only the GPT-2 models have"),
        ({"heads": 3, "kv_heads": 2, "width": 48}, "multiple of model.kv_heads"),
    ],
)
def test_impossible_sizes_are_refused_in_a_sentence(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(**({"architecture": "qwen2.5"} | TINY | changes)))


def test_too_long_a_sequence_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="max_sequence_length allows 16"):
        tiny("qwen2.5", max_sequence_length=16)(torch.zeros(1, 17, dtype=torch.int64))
