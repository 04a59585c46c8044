"""Any causal language model of Transformers: its logits, its loss, its cache, and how it lies on ranks."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from models import ModelConfig, adopt, build_model
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import route
from tests.gloo import run_ranks

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    # Caps its logits, and its head is its embedding
    "gemma2": {},
    "granite": {"logits_scaling": 3.0},
    # Its head has a bias
    "phi": {},
    # q, k, v in one tensor, gate and up in one tensor
    "phi3": {"pad_token_id": 0},
}


def made(kind: str, **changes):
    config = {"model_type": kind} | SIZES | KINDS[kind] | changes
    torch.manual_seed(0)
    return build_model(ModelConfig("transformers", config=config), vocab_size=96, end_of_text=95)


@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_loss_cache_and_roles_are_the_architectures_own(kind):
    model = made(kind)
    tokens = torch.randint(0, 95, (2, 30))
    expected = model.inner(input_ids=tokens).logits
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    targets = tokens.roll(-1, 1)
    model.eval()
    plain = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    theirs = torch.autograd.grad(plain, list(model.parameters()))
    model(tokens, targets).backward()
    for (name, p), g in zip(model.named_parameters(), theirs, strict=True):
        torch.testing.assert_close(
            p.grad, g, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert {"hidden", "embed", "scalar"} <= {group["role"] for group in route(model)}
    assert model.inner.config.eos_token_id == 95
    torch.testing.assert_close(model(tokens, targets), plain, rtol=1e-5, atol=1e-5)
    with_cache, without = (
        model.generate(tokens, 20, temperature=0, cached=cached) for cached in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_tensors_that_hold_several_projections_are_several_matrices():
    hints = made("phi3").parameter_hints()
    assert hints["inner.model.layers.0.self_attn.qkv_proj.weight"] == {"split_sizes": (32, 16, 16)}
    assert hints["inner.model.layers.1.mlp.gate_up_proj.weight"] == {"split_sizes": (48, 48)}
    assert made("mixtral").parameter_hints()["inner.model.layers.0.mlp.experts.gate_up_proj"] == {
        "split_sizes": (48, 48)
    }


def test_a_router_is_balanced_in_training_only():
    balanced, plain = made("mixtral"), made("mixtral", output_router_logits=False)
    tokens = torch.randint(0, 95, (2, 30))
    told = balanced.inner(input_ids=tokens, labels=tokens)
    difference = balanced(tokens, tokens) - plain(tokens, tokens)
    torch.testing.assert_close(
        difference, told.aux_loss * balanced.inner.router_aux_loss_coef, rtol=1e-3, atol=1e-6
    )
    assert float(difference) > 0
    torch.testing.assert_close(balanced.eval()(tokens, tokens), plain.eval()(tokens, tokens))
    assert plain.flops_per_token(64) < made("mixtral", num_experts_per_tok=4).flops_per_token(64)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 32}, "has no model_type"),
        ({"model_type": "lama"}, "which Transformers does not know"),
        ({"model_type": "llama", "hiden_size": 32}, r"model\.config\.hiden_size"),
        ({"model_type": "mamba", "num_hidden_layers": 2}, "no attention heads"),
        ({"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 24}, "own-model"),
        ({"model_type": "t5", "num_layers": 2}, "no causal language model"),
        # Its base model returns logits, and its head has an input of its own
        (
            {"model_type": "llama4_text"} | SIZES | {"num_local_experts": 2, "intermediate_size_mlp": 48},
            "own-model",
        ),
        ({"model_type": "electra", "num_hidden_layers": 1, "hidden_size": 24}, "own-model"),
        # They see the tokens that they are to predict
        ({"model_type": "bert-generation", "hidden_size": 24, "num_attention_heads": 4}, "sees later tokens"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True} | SIZES, "sees later tokens"),
        (
            {"model_type": "phi3", "pad_token_id": 96} | SIZES,
            r"makes no 'phi3' \(AssertionError: Padding_idx",
        ),
        # Only the forward pass finds that heads do not divide by kv heads
        (
            {"model_type": "llama"} | SIZES | {"num_key_value_heads": 3},
            r"makes no 'llama' \(\w+: .*: see LlamaConfig",
        ),
    ],
)
def test_what_makes_no_model_is_one_sentence(config, expected):
    with pytest.raises(ConfigError, match=expected):
        build_model(ModelConfig("transformers", config=config), vocab_size=96)


def test_a_kinds_default_padding_token_is_an_ordinary_word_of_another_vocabulary():
    for kind, padding in (("olmo", 1), ("phi3", 32000)):
        config = {"model_type": kind} | {k: v for k, v in SIZES.items() if k != "head_dim"}
        assert AutoConfig.for_model(kind).pad_token_id == padding
        model = build_model(ModelConfig("transformers", config=config), vocab_size=96, end_of_text=95)
        tokens = torch.arange(60)[None]
        model(tokens, tokens.roll(-1, 1)).backward()
        assert model.get_input_embeddings().weight.grad[:60].abs().sum(1).min() > 0
    stated = build_model(ModelConfig("transformers", config=config | {"pad_token_id": 7}), vocab_size=96)
    assert stated.get_input_embeddings().padding_idx == 7


def test_a_model_with_a_cache_of_its_own_kind_samples_without():
    config = {"model_type": "minimax", "num_local_experts": 2} | SIZES
    model = build_model(ModelConfig("transformers", config=config), vocab_size=96, end_of_text=95).eval()
    tokens = torch.arange(10)[None]
    found = [model.generate(tokens, 5, temperature=0, cached=cached) for cached in (True, False)]
    assert torch.equal(*found)
    assert found[0].shape == (1, 15)


def test_sizes_beside_a_configuration_and_a_configuration_beside_another_architecture_are_refused():
    with pytest.raises(ConfigError, match=r"model\.width is 32 with model\.architecture 'transformers'"):
        build_model(ModelConfig("transformers", config={"model_type": "llama"}, width=32))
    with pytest.raises(ConfigError, match=r"model\.config is set with model\.architecture 'qwen2\.5'"):
        build_model(ModelConfig(config={"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"without model\.config"):
        build_model(ModelConfig("transformers"))


def test_a_name_stands_for_the_configuration_that_lies_there(tmp_path):
    made("qwen3").inner.config.save_pretrained(tmp_path)
    adopted = adopt(ModelConfig("transformers", config=str(tmp_path)))
    assert isinstance(adopted.config, dict)
    assert adopted.config["model_type"] == "qwen3"
    torch.manual_seed(0)
    again = build_model(adopted, vocab_size=96, end_of_text=95)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(again(tokens), made("qwen3")(tokens))
    with pytest.raises(ConfigError, match="could not be fetched"):
        adopt(ModelConfig("transformers", config=str(tmp_path / "nothing")))


def _sharded(rank: int, world: int) -> float:
    tokens = torch.randint(0, 95, (2, 40), generator=torch.Generator().manual_seed(5))
    worst = 0.0
    for kind in ("llama", "qwen3", "gemma2"):
        alone = made(kind)
        alone(tokens, tokens.roll(-1, 1)).backward()
        model = made(kind)
        model.checkpoint_blocks()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        mine = slice(rank, rank + 1)
        model(tokens[mine], tokens.roll(-1, 1)[mine]).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert isinstance(p.grad, DTensor)
            worst = max(worst, float((p.grad.full_tensor() - q.grad).abs().max()))
    return worst


def test_sharded_and_checkpointed_blocks_have_the_gradient_of_one_process():
    assert max(run_ranks(_sharded, 2)) < 1e-5
