"""What diagnostics say is what an SVD of the whole matrices says, wherever the matrices are."""

import math

import pytest
import torch
from torch import nn

from polargrad_dist.diagnostics import Diagnostics, DiagnosticsConfig
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import PolarGrad
from tests.gloo import run_ranks
from tests.optim.bag import OWN, SHAPES, Bag
from tests.optim.training import backward, build

ALL = DiagnosticsConfig(every=2, parameters=["*"])
RULES = {
    "momentum_first": {"lr": 0.01, "momentum": "momentum_first", "nesterov": True},
    "polar_first": {"lr": 0.01, "momentum": "polar_first"},
    "truncated": {"lr": 0.01, "momentum": "heavy_ball", "oracle": "qdwh", "steps": 2},
    "adamw": {"lr": 0.01, "algorithm": "adamw"},
}


def look(rank: int, world: int, mode: str, rule: dict) -> list[dict]:
    """Figures of two steps."""
    model, optimizer = build(mode, {"condition": 1e2}, rule)
    diagnostics = Diagnostics(optimizer, ALL)
    found = []
    for step in range(2):
        optimizer.zero_grad()
        backward(mode, model, optimizer, rank, world, step)
        diagnostics.before_step()
        optimizer.step()
        found.append(diagnostics.after_step())
    return found


def blocks(name: str, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.flatten(1) if name == "conv" else x
    if name == "experts":
        return list(x)
    sizes = OWN.get(name, {}).get("split_sizes") or (
        [len(x) // OWN[name]["num_heads"]] * OWN[name]["num_heads"] if name in OWN else [len(x)]
    )
    return list(x.split(list(sizes)))


def expected(name: str, x: torch.Tensor) -> dict[str, float]:
    sigmas = [torch.linalg.svdvals(block) for block in blocks(name, x)]
    return {
        "condition": max(float(s[0] / s[-1]) for s in sigmas),
        "nuclear_norm": sum(float(s.sum()) for s in sigmas),
        "frobenius_norm": float(x.norm()),
        "spectral_norm": max(float(s[0]) for s in sigmas),
        "stable_rank": sum(float(s.square().sum() / s[0] ** 2) for s in sigmas) / len(sigmas),
    }


def gradients(step: int, parameters: dict) -> dict[str, torch.Tensor]:
    bag = Bag(condition=1e2)
    return {n: c.mean(0) + 0.1 * parameters[n] for n, c in bag.coefficients(step).items()}


def test_a_gradient_is_described_by_its_singular_values():
    start = {n: p.detach().clone() for n, p in Bag(condition=1e2).named_parameters()}
    found = look(0, 1, "single", RULES["momentum_first"])[0]
    assert found.keys() == SHAPES.keys() - {"bias"}
    for name, figures in found.items():
        want = expected(name, gradients(0, start)[name])
        assert figures["gradient"] == pytest.approx(want, rel=1e-7), name


def test_the_update_is_judged_against_the_exact_polar_factor():
    exact = look(0, 1, "single", RULES["momentum_first"])[1]
    for name, figures in exact.items():
        assert figures["update"]["cosine"] == pytest.approx(1.0, abs=1e-9), name
        assert figures["update"]["residual"] < 1e-7
    # Nesterov's mix of the first step is a multiple of the gradient; at the second it is not.
    square = exact["square"]
    assert square["momentum"]["condition"] != pytest.approx(square["gradient"]["condition"], rel=1e-3)
    rough = look(0, 1, "single", RULES["truncated"])[0]["square"]["update"]
    assert 1e-3 < rough["residual"] < 1
    assert 0.5 < rough["cosine"] < 1 - 1e-6


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_however_parameters_are_placed_all_ranks_say_what_one_process_says(world, name):
    one = look(0, 1, "single", RULES[name])
    modes = ["ddp", "reduce_scatter", "fsdp"] + ["hsdp"] * (world == 4)
    for mode, ranks in zip(
        modes, zip(*run_ranks(_look_in, world, modes, RULES[name]), strict=True), strict=True
    ):
        for found in ranks:
            assert found == ranks[0], mode
            for a, b in zip(one, found, strict=True):
                assert a.keys() == b.keys()
                for parameter, figures in a.items():
                    assert figures.keys() == b[parameter].keys()
                    for part, values in figures.items():
                        assert b[parameter][part] == pytest.approx(values, rel=1e-6, abs=1e-7), (
                            mode,
                            parameter,
                            part,
                        )


def _look_in(rank: int, world: int, modes: list[str], rule: dict) -> list[list[dict]]:
    return [look(rank, world, mode, rule) for mode in modes]


def test_what_there_is_to_say_depends_on_the_rule():
    parts = {name: set(look(0, 1, "single", rule)[0]["square"]) for name, rule in RULES.items()}
    assert parts == {
        "momentum_first": {"gradient", "momentum", "update"},
        "polar_first": {"gradient", "update"},
        "truncated": {"gradient", "momentum", "update"},
        "adamw": {"gradient"},
    }


def test_a_zero_gradient_has_no_condition_number_and_a_missing_one_counts_as_zero():
    p, q = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = PolarGrad([p, q], lr=0.1)
    p.grad = torch.zeros(4, 3)
    diagnostics = Diagnostics(optimizer, ALL)
    diagnostics.before_step()
    optimizer.step()
    for figures in diagnostics.after_step().values():
        assert math.isnan(figures["gradient"]["condition"])
        assert figures["gradient"]["nuclear_norm"] == 0


def test_it_changes_nothing():
    def run(watched: bool) -> torch.Tensor:
        model, optimizer = build("single", {}, RULES["momentum_first"])
        diagnostics = Diagnostics(optimizer, ALL)
        for step in range(2):
            optimizer.zero_grad()
            backward("single", model, optimizer, 0, 1, step)
            if watched:
                diagnostics.before_step()
            optimizer.step()
            if watched:
                diagnostics.after_step()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    assert torch.equal(run(True), run(False))


class Layers(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.head = nn.Linear(4, 20, bias=False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DiagnosticsConfig(hidden=0), ["embed.weight", "head.weight"]),
        (DiagnosticsConfig(hidden=1), ["embed.weight", "head.weight", "layers.0.weight"]),
        (
            DiagnosticsConfig(hidden=3),
            ["embed.weight", "head.weight", "layers.0.weight", "layers.3.weight", "layers.6.weight"],
        ),
        (
            DiagnosticsConfig(hidden=0, parameters=["*.2.*"]),
            ["embed.weight", "head.weight", "layers.2.weight"],
        ),
    ],
)
def test_the_ends_and_some_hidden_matrices_are_looked_at(config, expected):
    diagnostics = Diagnostics(PolarGrad(Layers(7)), config)
    assert sorted(w.entry.name for w in diagnostics.works) == expected


def test_when_a_step_is_due():
    diagnostics = Diagnostics(PolarGrad(Layers(1)), DiagnosticsConfig(every=3))
    assert [step for step in range(1, 8) if diagnostics.due(step)] == [1, 3, 6]
    assert not Diagnostics(PolarGrad(Layers(1)), DiagnosticsConfig(every=0)).due(1)


def test_a_pattern_that_names_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"'layer\.9', expected .* such as 'layers\.0\.weight'"):
        Diagnostics(PolarGrad(Layers(1)), DiagnosticsConfig(parameters=["layer.9"]))
    with pytest.raises(ConfigError, match=r"diagnostics\.every is -1"):
        Diagnostics(PolarGrad(Layers(1)), DiagnosticsConfig(every=-1))
