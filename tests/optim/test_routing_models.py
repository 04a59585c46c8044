"""Models of transformers, small and with random weights: what routing makes of each parameter, and two steps of training."""

import pytest
import torch

from polargrad_dist.optim import OptimizerConfig, PolarGrad, Rule, route

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
BERT = SIZES | {"max_position_embeddings": 16, "pad_token_id": 0}


def language(name, **config):
    """A causal language model and its loss on a few tokens."""
    model = build(f"{name}ForCausalLM", f"{name}Config", **config)
    tokens = torch.arange(1, 33).reshape(2, 16)
    return model, lambda: model(input_ids=tokens, labels=tokens).loss


def build(model, config, **sizes):
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).train()


def llama():
    return language("Llama", **GROUPED)


def qwen3_moe():
    return language("Qwen3Moe", **GROUPED, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)


def mixtral():
    return language("Mixtral", **GROUPED, num_local_experts=4)


def gpt_oss():
    return language("GptOss", **GROUPED, num_local_experts=4, num_experts_per_tok=2)


def deepseek_v3():
    experts = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
    }
    latents = {
        "kv_lora_rank": 8,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
    }
    return language("DeepseekV3", **SIZES, num_key_value_heads=4, **experts, **latents)


def gpt2():
    model = build(
        "GPT2LMHeadModel",
        "GPT2Config",
        n_embd=32,
        n_layer=1,
        n_head=4,
        vocab_size=64,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    tokens = torch.arange(1, 33).reshape(2, 16)
    return model, lambda: model(input_ids=tokens, labels=tokens).loss


def t5():
    model = build(
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        vocab_size=64,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
    )
    tokens = torch.arange(1, 33).reshape(2, 16)
    return model, lambda: model(input_ids=tokens, labels=tokens.flip(1)).loss


def bert():
    model = build("BertForMaskedLM", "BertConfig", **BERT)
    tokens = torch.arange(1, 33).reshape(2, 16)
    return model, lambda: model(input_ids=tokens, labels=tokens).loss


def bert_classifier():
    model = build("BertForSequenceClassification", "BertConfig", **BERT, num_labels=3)
    tokens = torch.arange(1, 33).reshape(2, 16)
    return model, lambda: model(input_ids=tokens, labels=torch.tensor([0, 2])).loss


def vit():
    sizes = {k: v for k, v in SIZES.items() if not k.endswith(("_id", "vocab_size"))}
    model = build(
        "ViTForImageClassification", "ViTConfig", **sizes, image_size=16, patch_size=4, num_labels=10
    )
    images = torch.randn(4, 3, 16, 16)
    return model, lambda: model(pixel_values=images, labels=torch.tensor([0, 2, 4, 6])).loss


def mamba():
    return language(
        "Mamba",
        hidden_size=32,
        num_hidden_layers=1,
        vocab_size=64,
        state_size=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def resnet():
    model = build(
        "ResNetForImageClassification",
        "ResNetConfig",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    images = torch.randn(4, 3, 32, 32)
    return model, lambda: model(pixel_values=images, labels=torch.tensor([0, 2, 4, 6])).loss


def phi3():
    return language("Phi3", **SIZES, num_key_value_heads=2)


# What is neither a scalar nor as a linear layer stores it is said after the role: how rows or columns (transposed) split,
# (in, out), convolution. One-dimensional parameters are left out of the tables, they are scalars everywhere.
ATTENTION = {f"self_attn.{name}_proj.weight": "hidden" for name in "qkvo"}
ENDS = {"model.embed_tokens.weight": "embed", "lm_head.weight": "head"}


def decoder(**layer):
    """The table of a language model of one layer."""
    return {f"model.layers.0.{name}": place for name, place in (ATTENTION | layer).items()} | ENDS


def t5_table():
    attention = dict.fromkeys(("q.weight", "k.weight", "v.weight", "o.weight"), "hidden")
    ends = {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}
    found = {"shared.weight": "embed"}
    for end, kinds in ends.items():
        for i, kind in enumerate(kinds):
            found |= {f"{end}.block.0.layer.{i}.{kind}.{name}": place for name, place in attention.items()}
        found[f"{end}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = "scalar"
        found |= {
            f"{end}.block.0.layer.{len(kinds)}.DenseReluDense.{name}.weight": "hidden"
            for name in ("wi", "wo")
        }
    return found


def bert_table():
    layer = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    layer += ("intermediate.dense", "output.dense")
    tables = ("word", "position", "token_type")
    return {f"bert.encoder.layer.0.{name}.weight": "hidden" for name in layer} | {
        f"bert.embeddings.{name}_embeddings.weight": "embed" for name in tables
    }


EXPERTS = {"mlp.experts.down_proj": "hidden", "mlp.gate.weight": "hidden"}
TABLES = {
    llama: decoder(**{f"mlp.{name}_proj.weight": "hidden" for name in ("gate", "up", "down")}),
    phi3: {
        "model.layers.0.self_attn.qkv_proj.weight": "hidden rows 32+16+16",
        "model.layers.0.self_attn.o_proj.weight": "hidden",
        "model.layers.0.mlp.gate_up_proj.weight": "hidden rows 48+48",
        "model.layers.0.mlp.down_proj.weight": "hidden",
    }
    | ENDS,
    qwen3_moe: decoder(**EXPERTS, **{"mlp.experts.gate_up_proj": "hidden rows 16+16"}),
    mixtral: decoder(**EXPERTS, **{"mlp.experts.gate_up_proj": "hidden rows 48+48"}),
    gpt_oss: decoder(
        **{
            "mlp.router.weight": "hidden",
            "mlp.experts.gate_up_proj": "hidden (in, out)",
            "mlp.experts.down_proj": "hidden (in, out)",
            "mlp.experts.gate_up_proj_bias": "scalar",
            "mlp.experts.down_proj_bias": "scalar",
        }
    ),
    deepseek_v3: {
        "model.layers.0.self_attn.q_a_proj.weight": "hidden",
        "model.layers.0.self_attn.q_b_proj.weight": "hidden",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": "hidden rows 8+4",
        "model.layers.0.self_attn.kv_b_proj.weight": "hidden",
        "model.layers.0.self_attn.o_proj.weight": "hidden",
        "model.layers.0.mlp.experts.gate_up_proj": "hidden rows 16+16",
        "model.layers.0.mlp.experts.down_proj": "hidden",
        "model.layers.0.mlp.gate.weight": "hidden",
        "model.layers.0.mlp.shared_experts.gate_proj.weight": "hidden",
        "model.layers.0.mlp.shared_experts.up_proj.weight": "hidden",
        "model.layers.0.mlp.shared_experts.down_proj.weight": "hidden",
    }
    | ENDS,
    gpt2: {
        "transformer.wte.weight": "embed",
        "transformer.wpe.weight": "embed",
        "transformer.h.0.attn.c_attn.weight": "hidden columns 32+32+32 (in, out)",
        "transformer.h.0.attn.c_proj.weight": "hidden (in, out)",
        "transformer.h.0.mlp.c_fc.weight": "hidden (in, out)",
        "transformer.h.0.mlp.c_proj.weight": "hidden (in, out)",
    },
    t5: t5_table(),
    bert: bert_table() | {"cls.predictions.transform.dense.weight": "hidden"},
    bert_classifier: bert_table() | {"bert.pooler.dense.weight": "hidden", "classifier.weight": "head"},
    vit: {f"vit.layers.0.attention.{name}_proj.weight": "hidden" for name in "qkvo"}
    | {
        "vit.layers.0.mlp.fc1.weight": "hidden",
        "vit.layers.0.mlp.fc2.weight": "hidden",
        "vit.embeddings.patch_embeddings.projection.weight": "hidden convolution",
        "vit.embeddings.cls_token": "scalar",
        "vit.embeddings.position_embeddings": "scalar",
        "classifier.weight": "head",
    },
    mamba: {
        "backbone.embeddings.weight": "embed",
        "backbone.layers.0.mixer.in_proj.weight": "hidden rows 64+64",
        "backbone.layers.0.mixer.x_proj.weight": "hidden rows 2+4+4",
        "backbone.layers.0.mixer.dt_proj.weight": "hidden",
        "backbone.layers.0.mixer.out_proj.weight": "hidden",
        "backbone.layers.0.mixer.conv1d.weight": "scalar",
        "backbone.layers.0.mixer.A_log": "scalar",
    },
    resnet: {
        f"resnet.{name}.convolution.weight": "hidden convolution"
        for name in (
            "embedder.embedder",
            "encoder.stages.0.layers.0.layer.0",
            "encoder.stages.0.layers.0.layer.1",
            "encoder.stages.1.layers.0.shortcut",
            "encoder.stages.1.layers.0.layer.0",
            "encoder.stages.1.layers.0.layer.1",
        )
    }
    | {"classifier.1.weight": "head"},
}
CLASSIFIER = "the last linear layer, with config.num_labels rows: taken for the head"
GUESSED = {
    bert_classifier: {"classifier.weight": CLASSIFIER},
    vit: {"classifier.weight": CLASSIFIER},
    resnet: {"classifier.1.weight": CLASSIFIER},
}


def place_of(group):
    words = [group["role"]]
    if group["split_sizes"]:
        words.append(
            f"{'columns' if group['transposed'] else 'rows'} {'+'.join(map(str, group['split_sizes']))}"
        )
    words += ["(in, out)"] * group["transposed"] + ["convolution"] * group["flatten"]
    return " ".join(words)


@pytest.mark.parametrize("family", TABLES, ids=lambda family: family.__name__)
def test_every_parameter_of_a_model_has_the_place_that_the_table_says_and_is_trained(family):
    model, loss = family()
    groups = route(model)
    assert groups.notes == GUESSED.get(family, {})
    found, vectors = {}, {}
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            (found if p.ndim > 1 else vectors)[name] = place_of(group)
    assert found == TABLES[family]
    assert set(vectors.values()) == {"scalar"}
    assert len(found) + len(vectors) == len(list(model.parameters()))

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = PolarGrad(groups)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name
    assert losses[1] < losses[0]


def polar_svd(a):
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize(
    ("family", "name", "matrices", "scale"),
    [
        # c_attn maps 32 to 3 x 32 and stores (in, out): three square matrices side by side.
        (gpt2, "transformer.h.0.attn.c_attn.weight", lambda w: w.split(32, dim=1), 1.0),
        # c_fc maps 32 to 128: Muon's scale is that of (128, 32), although (32, 128) is stored.
        (gpt2, "transformer.h.0.mlp.c_fc.weight", lambda w: [w], 2.0),
        (gpt2, "transformer.h.0.mlp.c_proj.weight", lambda w: [w], 1.0),
        # Of every expert the gate (48, 32) and the up projection (48, 32).
        (
            mixtral,
            "model.layers.0.mlp.experts.gate_up_proj",
            lambda w: w.reshape(8, 48, 32),
            (48 / 32) ** 0.5,
        ),
        (gpt_oss, "model.layers.0.mlp.experts.gate_up_proj", lambda w: w, (96 / 32) ** 0.5),
        (gpt_oss, "model.layers.0.mlp.experts.down_proj", lambda w: w, 1.0),
        (mamba, "backbone.layers.0.mixer.x_proj.weight", lambda w: w.split((2, 4, 4)), 1.0),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_fused_weights_step_by_the_polar_factor_of_each_matrix_and_its_scale(family, name, matrices, scale):
    model = family()[0].double()
    rule = Rule(lr=0.1, momentum="none", scale="muon", oracle="svd", lower=1e-12)
    optimizer = PolarGrad(route(model, OptimizerConfig(hidden=rule)))
    p = model.get_parameter(name)
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    optimizer.step()
    for change, gradient in zip(matrices(p.detach() - before), matrices(p.grad), strict=True):
        torch.testing.assert_close(change, -0.1 * scale * polar_svd(gradient), atol=1e-10, rtol=0)
