"""The rule that docs/rules.md writes in twenty lines, distributed: one process's weights, its state saved and resumed."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from polargrad_dist import ConfigError, Muon, PolarGrad, PolarSGDM, register_rule
from polargrad_dist.optim.matrix import RULES
from tests.gloo import run_ranks
from tests.optim.bag import Bag
from tests.optim.training import build, distance, train

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
SHAPES = {"a": (8, 6), "b": (8, 6), "c": (6, 9), "d": (8, 6), "experts": (3, 4, 6), "bias": (7,)}
RULE = {
    "lr": 0.02,
    "algorithm": "normuon",
    "momentum": "momentum_first",
    "scale": "muon",
    "oracle": "svd",
    "beta2": 0.9,
}
BAG = {"shapes": SHAPES, "condition": 10.0}


def load_the_page() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    if "normuon" not in RULES:
        exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})


def trained(rank: int, world: int, mode: str, **more) -> dict:
    load_the_page()
    return train(rank, world, mode, BAG, RULE, **more)


@pytest.mark.parametrize(
    ("mode", "world"), [("ddp", 2), ("ddp", 3), ("fsdp", 2), ("reduce_scatter", 2), ("hsdp", 4)]
)
def test_the_page_s_rule_gives_the_weights_of_one_process_and_resumes_anywhere(mode, world):
    one = trained(0, 1, "single", steps=5)
    results = run_ranks(trained, world, mode)
    assert all(distance(one["parameters"], result["parameters"]) < 1e-10 for result in results)
    first = trained(0, 1, "single", steps=3)
    rest = {"steps": 2, "first_step": 3, "start": first["parameters"], "load": first["state"]}
    resumed = run_ranks(_trained_on, world, mode, rest)
    assert all(distance(one["parameters"], result["parameters"]) < 1e-10 for result in resumed)


def _trained_on(rank: int, world: int, mode: str, rest: dict) -> dict:
    return trained(rank, world, mode, **rest)


def test_its_state_per_matrix_is_what_it_says_and_moves_with_every_step():
    load_the_page()
    model, optimizer = build("single", BAG, RULE)
    model(list(range(48)), 0).backward()
    optimizer.step()
    energy = {name: t for name, t in optimizer.named_state().items() if name.endswith("row_energy")}
    assert {tuple(t.shape) for t in energy.values()} == {(3, 8), (1, 6), (3, 4)}
    assert all((t > 0).all() for t in energy.values())


def test_what_is_no_rule_or_has_a_taken_name_is_refused():
    with pytest.raises(ConfigError, match=r"expected a subclass of polargrad_dist\.Polar"):
        register_rule("mine")(int)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="algorithm is 'nonesuch'"):
        PolarGrad(Bag(**BAG).parameters(), algorithm="nonesuch")
    with pytest.raises(ConfigError, match="beta2"):
        PolarGrad([torch.nn.Parameter(torch.zeros(3, 3))], beta2=0.9)


@pytest.mark.parametrize("name", ["muon", "Muon", "PolarSGDM"])
def test_a_name_that_is_an_algorithm_elsewhere_is_answered_with_the_fields_that_make_it_here(name):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9))
    with pytest.raises(ConfigError, match=rf"algorithm is '{name}', .*; {name} is 'polar' with") as refused:
        PolarGrad(model, hidden={"algorithm": name, "lr": 0.02})
    fields = dict(re.findall(r"(scale|nesterov|oracle|beta) '?([\w.]+)'?", str(refused.value)))
    made = PolarGrad(model, hidden={"lr": 0.02} | {k: yaml.safe_load(v) for k, v in fields.items()})
    family = {"muon": Muon, "polarsgdm": PolarSGDM}[name.lower()](model, 0.02)
    for key in fields:
        assert made.param_groups[0][key] == family.param_groups[0][key]


def test_a_registered_rule_s_options_are_set_in_the_configuration(tmp_path):
    from train import parse_run

    load_the_page()
    path = tmp_path / "run.yaml"
    path.write_text(
        "optimizer: {hidden: {algorithm: normuon, lr: 0.02, options: {beta2: 0.7}, control: cautious}}\n"
    )
    config, _, _ = parse_run(["--config", str(path)])
    config.optimizer.check()
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 8))
    hidden = next(
        g for g in PolarGrad.from_config(model, config.optimizer).param_groups if g["role"] == "hidden"
    )
    assert (hidden["beta2"], hidden["control"]) == (0.7, "cautious")
    assert "options" not in hidden
    config.optimizer.hidden.options["beta3"] = 1
    with pytest.raises(
        ConfigError, match=r"optimizer\.hidden\.options has 'beta3', expected an option .*: beta2"
    ):
        config.optimizer.check()
