"""Roles come from modules, and what cannot be placed is refused."""

import pytest
import torch
from torch import nn

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
    groups = route(Tiny(hints=hints), OptimizerConfig(hidden=Rule(weight_decay=0.1)))
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
