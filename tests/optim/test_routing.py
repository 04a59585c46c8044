"""Roles come from modules, and what cannot be placed is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import OptimizerConfig, PolarGrad, Rule, route, routing_table
from polargrad_dist.optim.rules import polarsgdm_rule


class Tiny(nn.Module):
    def __init__(self, tied=False, hints=None):
        super().__init__()
        self.tokens = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.conv = nn.Conv1d(8, 8, 3)
        self.gain = nn.Parameter(torch.ones(1, 8))
        self.out = nn.Linear(8, 50, bias=False)
        self.hints = hints
        if tied:
            self.out.weight = self.tokens.weight
        if hints is not None:
            self.parameter_hints = lambda: hints


def roles(groups):
    return {name: group["role"] for group in groups for name in group["param_names"]}


class Adapter(nn.Module):
    """A layer in an attribute called as DDP's, with a parameter of its own beside it."""

    def __init__(self, module, leaf):
        super().__init__()
        self.module = module
        setattr(self, leaf, nn.Parameter(torch.zeros_like(getattr(module, leaf))))
        self.leaf = leaf

    def forward(self, x):
        own = getattr(self, self.leaf)
        return self.module(x) + (x @ own.T if own.dim() == 2 else own)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_an_attribute_called_module_keeps_its_name_so_that_no_parameter_hides_another(leaf):
    torch.manual_seed(0)
    model = nn.Sequential(Adapter(nn.Linear(6, 6), leaf), nn.ReLU(), nn.Linear(6, 4))
    optimizer = PolarGrad(model)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_names_are_the_same_with_wrappers_around_and_inside():
    plain = nn.Sequential(Adapter(nn.Linear(6, 6), "bias"), nn.Linear(6, 4))
    expected = [name for group in route(plain) for name in group["param_names"]]
    inner = nn.Sequential(torch.compile(nn.DataParallel(plain[0])), checkpoint_wrapper(plain[1]))
    for wrapped in (inner, torch.compile(inner), nn.DataParallel(inner)):
        assert [name for group in route(wrapped) for name in group["param_names"]] == expected


def test_roles_are_read_from_modules():
    found = roles(route(Tiny()))
    assert found == {
        "tokens.weight": "embed",
        "out.weight": "head",
        "qkv.weight": "hidden",
        "conv.weight": "hidden",
        "qkv.bias": "scalar",
        "conv.bias": "scalar",
        "norm.weight": "scalar",
        "norm.bias": "scalar",
        "gain": "scalar",
    }


def test_hints_override_roles_and_say_how_fused_matrices_split():
    hints = {"qkv.weight": {"split_sizes": (8, 8, 8), "weight_decay_scale": 2.0}, "gain": {"role": "scalar"}}
    groups = route(Tiny(hints=hints), OptimizerConfig(hidden=Rule(0.02, weight_decay=0.1)))
    (qkv,) = [g for g in groups if "qkv.weight" in g["param_names"]]
    assert qkv["split_sizes"] == (8, 8, 8)
    assert qkv["weight_decay"] == pytest.approx(0.2)


def test_a_tied_weight_is_an_embedding_whichever_module_comes_first():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 50, bias=False)
            self.tokens = nn.Embedding(50, 8)
            self.tokens.weight = self.out.weight

    assert roles(route(HeadFirst())) == {"out.weight": "embed"}


def test_a_bag_of_embeddings_is_an_embedding():
    assert roles(route(nn.Sequential(nn.EmbeddingBag(50, 8)))) == {"0.weight": "embed"}


def test_a_tied_weight_is_routed_once_as_embedding():
    found = roles(route(Tiny(tied=True)))
    assert found["tokens.weight"] == "embed"
    assert "out.weight" not in found


def test_a_head_rule_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.head is set"):
        route(Tiny(tied=True), OptimizerConfig(head=polarsgdm_rule()))


def test_a_hint_for_a_parameter_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="'qvk"):
        route(Tiny(hints={"qvk.weight": {"role": "hidden"}}))


def test_an_unknown_role_is_refused():
    with pytest.raises(ConfigError, match="'lead'"):
        route(Tiny(hints={"gain": {"role": "lead"}}))


def test_flattened_parameters_are_refused_with_the_alternative():
    model = Tiny()
    model.qkv.weight._is_flat_param = True
    with pytest.raises(ConfigError, match="fully_shard"):
        route(model)
    part = Tiny()
    # As use_orig_params=True leaves it: a rank's elements of the weight, as a vector.
    part.qkv.weight = nn.Parameter(part.qkv.weight.detach().flatten()[:7])
    part.qkv.weight._fsdp_flattened = True
    for build in (lambda: PolarGrad(part), lambda: PolarGrad(part.parameters(), lr=0.1)):
        with pytest.raises(ConfigError, match=r"FSDP1 FlatParameter.*fully_shard"):
            build()
    other = Tiny()
    other.qkv.weight.ds_id = 0
    with pytest.raises(ConfigError, match="ZeRO"):
        PolarGrad([other.qkv.weight])


def test_frozen_parameters_are_left_out():
    model = Tiny()
    model.qkv.weight.requires_grad_(False)
    assert "qkv.weight" not in roles(route(model))


def test_names_are_those_of_the_bare_model_whatever_wraps_it():
    model = Tiny()
    model.qkv = torch.compile(model.qkv)
    assert "qkv.weight" in roles(route(model))


def test_the_table_names_every_parameter():
    groups = route(Tiny())
    table = routing_table(groups)
    for name in roles(groups):
        assert name in table
    assert "hidden: 2 parameters" in table


def test_routing_works_on_the_meta_device():
    with torch.device("meta"):
        model = Tiny()
    assert roles(route(model))["tokens.weight"] == "embed"


def test_a_model_can_be_handed_over_whole():
    model = Tiny()
    optimizer = PolarGrad(model)
    x = model.tokens(torch.tensor([[1, 2, 3, 4]]))
    model.out(model.qkv(model.norm(x * model.gain))[..., :8]).sum().backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert not torch.equal(model.tokens.weight, before["tokens.weight"])
    assert torch.equal(model.conv.weight, before["conv.weight"])


def place_of(model, name):
    (group,) = [g for g in route(model) if name in g["param_names"]]
    return {key: group[key] for key in ("role", "split_sizes", "num_heads", "flatten", "transposed")}


def plain(role, **changes):
    return {
        "role": role,
        "split_sizes": None,
        "num_heads": None,
        "flatten": False,
        "transposed": False,
    } | changes


def beside(module, attribute):
    """A model that holds a module under a name of its own."""
    model = nn.Module()
    setattr(model, attribute, module)
    return model


class Holder(nn.Module):
    """A module of the user's, which torch knows nothing of."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class Experts(Holder):
    pass


class TopKRouter(Holder):
    pass


@pytest.mark.parametrize(
    ("module", "leaf", "expected"),
    [
        (nn.LSTM(6, 5, proj_size=3), "weight_ih_l0", plain("hidden", split_sizes=(5, 5, 5, 5))),
        (nn.LSTM(6, 5, proj_size=3), "weight_hr_l0", plain("hidden")),
        (nn.GRU(6, 5), "weight_hh_l0", plain("hidden", split_sizes=(5, 5, 5))),
        (nn.RNN(6, 5), "weight_hh_l0", plain("hidden")),
        (nn.LSTMCell(6, 5), "weight_hh", plain("hidden", split_sizes=(5, 5, 5, 5))),
        (nn.GRUCell(6, 5), "weight_ih", plain("hidden", split_sizes=(5, 5, 5))),
        (nn.MultiheadAttention(8, 2), "in_proj_weight", plain("hidden", split_sizes=(8, 8, 8))),
        (nn.MultiheadAttention(8, 2, kdim=4, vdim=6), "k_proj_weight", plain("hidden")),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "bias_k", plain("scalar")),
        (nn.Bilinear(4, 5, 6), "weight", plain("hidden")),
        (nn.Conv2d(4, 8, 3), "weight", plain("hidden", flatten=True)),
        (nn.Conv2d(4, 8, 3, groups=2), "weight", plain("hidden", flatten=True, split_sizes=(4, 4))),
        (nn.Conv2d(4, 8, 3, groups=4), "weight", plain("scalar")),
        (nn.Conv2d(8, 4, 3, groups=4), "weight", plain("scalar")),
        (nn.Conv2d(1, 8, 3), "weight", plain("hidden", flatten=True)),
        (nn.ConvTranspose2d(4, 8, 3), "weight", plain("hidden", flatten=True, transposed=True)),
        (nn.LayerNorm((4, 6)), "weight", plain("scalar")),
        (nn.Linear(6, 1), "weight", plain("scalar")),
        (nn.Embedding(1, 6), "weight", plain("scalar")),
        (TopKRouter(weight=(4, 6)), "weight", plain("hidden")),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
            "parametrizations.weight.original0",
            plain("scalar"),
        ),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
            "parametrizations.weight.original1",
            plain("hidden", flatten=True),
        ),
    ],
)
def test_modules_of_torch_say_what_their_parameters_are(module, leaf, expected, caplog):
    assert place_of(beside(module, "layer"), f"layer.{leaf}") == expected
    assert not caplog.records


def test_sharded_modules_keep_the_place_of_their_class():
    module = nn.LSTMCell(6, 5)
    module.__class__ = type("FSDPLSTMCell", (nn.LSTMCell,), {})
    assert place_of(beside(module, "cell"), "cell.weight_ih") == plain("hidden", split_sizes=(5, 5, 5, 5))


def test_a_padded_head_is_found_without_get_output_embeddings_and_said():
    model = Tiny()
    model.out = nn.Linear(8, 64, bias=False)
    groups = route(model)
    assert roles(groups)["out.weight"] == "head"
    assert "vocabulary of 50" in groups.notes["out.weight"]


def test_a_last_layer_much_longer_than_the_vocabulary_is_no_head():
    model = Tiny()
    model.out = nn.Linear(8, 128, bias=False)
    assert roles(route(model))["out.weight"] == "hidden"


def test_as_many_rows_as_positions_make_no_head():
    model = nn.Module()
    model.tokens, model.wpe, model.down = nn.Embedding(50, 8), nn.Embedding(16, 8), nn.Linear(32, 16)
    assert roles(route(model))["down.weight"] == "hidden"


def test_the_last_layer_of_a_convolutional_network_is_its_head():
    groups = route(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10)))
    assert roles(groups)["2.weight"] == "head"
    assert "2.weight" in groups.notes


def test_the_last_layer_of_a_block_after_convolutions_is_no_head():
    block = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))
    assert roles(route(nn.Sequential(nn.Conv2d(3, 8, 3), block)))["1.1.weight"] == "hidden"


@pytest.mark.parametrize(
    ("module", "name", "role"),
    [
        (Holder(weight=(4, 6)), "weight", "hidden"),
        (Holder(pos_embed=(9, 6)), "pos_embed", "scalar"),
        (Holder(query=(9, 6)), "query", "scalar"),
        (Holder(W_query=(4, 6)), "W_query", "hidden"),
        (Holder(A_log=(9, 6)), "A_log", "scalar"),
        (Holder(attention_bias=(3, 9, 9)), "attention_bias", "scalar"),
        (Holder(expert_bias=(4, 6)), "expert_bias", "scalar"),
        (Experts(w1=(3, 4, 6)), "w1", "hidden"),
        (nn.Embedding(9, 4), "weight", "scalar"),
    ],
)
def test_what_is_guessed_is_in_the_notes_the_table_and_one_warning(module, name, role, caplog):
    model = nn.Module()
    model.layers = nn.ModuleList(
        [beside(module, "relative_bias"), beside(copy.deepcopy(module), "relative_bias")]
    )
    groups = route(model)
    names = [f"layers.{i}.relative_bias.{name}" for i in range(2)]
    assert roles(groups) == dict.fromkeys(names, role)
    assert sorted(groups.notes) == names
    (record,) = caplog.records
    assert f"layers.*.relative_bias.{name} (2): " in record.getMessage()
    for line in routing_table(groups).splitlines()[:2]:
        assert line.endswith(f"# {groups.notes[line.split()[0]]}")


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 4, 6, 2)])
def test_a_stack_that_nobody_explains_is_refused_with_the_way_to_explain_it(shape):
    model = beside(Holder(w=shape), "mixer")
    with pytest.raises(
        ConfigError, match=r"mixer\.w of shape .* parameter of Holder, expected .* parameter_hints"
    ):
        route(model)
    model.parameter_hints = lambda: {"mixer.w": {"role": "hidden", "transposed": True}}
    assert place_of(model, "mixer.w") == plain("hidden", transposed=True)


def test_a_fused_layer_that_is_not_known_is_said_until_the_model_says_how_it_splits(caplog):
    assert "stepped as one matrix" in route(Tiny()).notes["qkv.weight"]
    caplog.clear()
    groups = route(Tiny(hints={"qkv.weight": {"num_heads": 3}, "out.weight": {"role": "head"}}))
    assert groups.notes == {}
    assert not caplog.records


def test_hints_win_over_what_modules_say():
    hints = {"conv.weight": {"flatten": False, "transposed": True}, "qkv.weight": {"role": "scalar"}}
    assert place_of(Tiny(hints=hints), "conv.weight") == plain("hidden", transposed=True)
    assert place_of(Tiny(hints=hints), "qkv.weight") == plain("scalar")
    model = beside(nn.MultiheadAttention(8, 2), "attention")
    model.parameter_hints = lambda: {"attention.in_proj_weight": {"num_heads": 6}}
    assert place_of(model, "attention.in_proj_weight") == plain("hidden", num_heads=6)


def test_a_hint_with_an_unknown_key_is_refused():
    with pytest.raises(
        ConfigError, match=r"'qkv\.weight' the key 'splits', expected one of: role, split_sizes"
    ):
        route(Tiny(hints={"qkv.weight": {"splits": 3}}))


def test_a_lazy_module_is_refused_before_its_first_batch():
    with pytest.raises(ConfigError, match=r"lazy\.weight has no shape yet"):
        route(beside(nn.LazyLinear(4), "lazy"))


def test_the_table_says_every_part_of_a_rule_that_is_not_the_usual_one():
    parts = {
        "alpha": 0.5,
        "control": "cautious",
        "floor": 0.3,
        "normalize": "rows",
        "center_rows": True,
        "steps": 3,
    }
    config = OptimizerConfig(hidden=replace(OptimizerConfig().hidden, scale="nuclear", lr=0.1, **parts))
    line = next(
        line for line in routing_table(route(Tiny(), config)).splitlines() if line.startswith("qkv.weight")
    )
    assert "polar+centred+rows nuclear^0.5 momentum_first+nesterov newton_schulz:3 cautious floor 0.3" in line


def test_the_table_says_how_matrices_are_stored():
    model = nn.Module()
    model.attention, model.up = nn.MultiheadAttention(8, 2), nn.ConvTranspose2d(4, 8, 3)
    table = routing_table(route(model))
    assert "rows 8+8+8" in table
    assert "(in, out), convolution" in table
