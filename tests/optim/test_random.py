"""The contract on random cases: shapes, splits, dtypes, rules, layouts, buckets, missing gradients, accumulation, resuming.

A case is drawn from its number, so that a failure names one that can be run alone. CI runs a few, `make test-slow` 200 on
each number of ranks.
"""

import random

import pytest
import torch
from torch import nn

from polargrad_dist.optim import PolarGrad
from tests.gloo import run_ranks
from tests.optim import normuon  # noqa: F401 (registers its rule)
from tests.optim.bag import Bag
from tests.optim.placed import WORLDS, Placed
from tests.optim.test_contract import RULES
from tests.optim.training import backward, whole, wrapped

CASES = 200
IN_CI = 6
NORMUON = {"lr": 0.02, "algorithm": "normuon of the tests", "momentum": "momentum_first", "scale": "muon"}
STEPS = 4


def draw(number: int, world: int) -> dict:
    """A case: what its parameters, rules and layout are, which steps lack which gradients, and when it resumes."""
    r = random.Random(1000 * world + number)
    shapes: dict[str, tuple[int, ...]] = {}
    own: dict[str, dict] = {}
    for i in range(r.randint(1, 7)):
        kind = r.choice(
            ("matrix", "twins", "tall", "fused", "heads", "conv1d", "experts", "conv", "vector", "scalar")
        )
        m, n, k = r.randint(1, 9), r.randint(1, 9), r.randint(1, 5)
        name = f"{kind}{i}"
        if kind == "twins":
            shapes |= {f"{name}.{j}".replace(".", "_"): (m, n) for j in range(k)}
        elif kind == "fused":
            sizes = [r.randint(1, 5) for _ in range(k)]
            shapes[name], own[name] = (sum(sizes), n), {"split_sizes": sizes}
        elif kind == "heads":
            shapes[name], own[name] = (k * m, n), {"num_heads": k}
        elif kind == "conv1d":
            shapes[name], own[name] = (n, k * m), {"num_heads": k, "transposed": True}
        else:
            shapes[name] = {
                "matrix": (m, n),
                "tall": (r.randint(20, 60), r.randint(1, 3)),
                "experts": (k, m, n),
                "conv": (m, r.randint(1, 3), r.randint(1, 3), 2),
                "vector": (r.randint(1, 20),),
                "scalar": (1,),
            }[kind]
    layouts = ["ddp", "reduce_scatter", "fsdp"] + ["hsdp"] * (world == 4)
    by_hand = r.random() < 0.4 and world > 1
    layout = (
        r.choice([n for n, w in WORLDS.items() if world in w and n != "absent"])
        if by_hand
        else r.choice(layouts)
    )
    # Those place the bag's own parameters
    if layout in WORLDS:
        shapes, own = {}, {}
    names = list(shapes or Bag().shapes)
    rules = [rule for rule in RULES.values() if rule.get("algorithm") != "adamw"]
    # Whose alike matrices must be on one mesh
    rules += [] if layout in WORLDS else [NORMUON]
    return {
        "shapes": shapes,
        "own": own,
        "layout": layout if world > 1 else "single",
        "dtype": torch.float64
        if layout in WORLDS
        else r.choice((torch.float64, torch.float64, torch.float32, torch.bfloat16)),
        "rules": {name: r.choice(rules) for name in names}
        if r.random() < 0.5
        else dict.fromkeys(names, r.choice(rules)),
        "bucket_mb": r.choice((32.0, 32.0, 200 / 2**20, 1500 / 2**20)),
        "missing": [frozenset(n for n in names if r.random() < 0.2) for _ in range(STEPS)],
        "accumulation": r.choice((1, 1, 2)),
        "clip": r.choice((None, 0.5)),
        "resume": r.choice((None, *range(1, STEPS))),
    }


def build(case: dict, rank: int, world: int) -> tuple[nn.Module, Placed | None, PolarGrad]:
    bag = {"condition": 10.0, "dtype": case["dtype"]} | ({"shapes": case["shapes"]} if case["shapes"] else {})
    placed, layout = None, case["layout"]
    if layout in WORLDS and world > 1:
        placed = Placed(layout, world, **bag)
        model: nn.Module = placed.model
    else:
        model = wrapped(layout if world > 1 else "single", bag)
    groups = []
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        adamw = {"algorithm": "adamw", "lr": 0.01}
        rule = adamw if p.ndim < 2 else case["rules"][name] | case["own"].get(name, {})
        same = [g for g in groups if {k: v for k, v in g.items() if k != "params"} == rule]
        if same:
            same[0]["params"].append((name, p))
        else:
            groups.append({"params": [(name, p)], **rule})
    gradients = "reduce_scatter" if layout == "reduce_scatter" and world > 1 else "all_reduced"
    return model, placed, PolarGrad(groups, bucket_mb=case["bucket_mb"], gradients=gradients)


def run(case: dict, rank: int, world: int) -> dict:
    """Weights and norms after all steps, of which the later ones may be a new optimizer's, from the old one's state."""
    model, placed, optimizer = build(case, rank, world)
    norms = []
    for step, missing in enumerate(case["missing"]):
        if step == case["resume"]:
            state = optimizer.full_state_dict()
            values = [p.detach().clone() for p in model.parameters()]
            model, placed, optimizer = build(case, rank, world)
            with torch.no_grad():
                for p, value in zip(model.parameters(), values, strict=True):
                    p.copy_(value)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        if placed is not None:
            placed.gradients(list(range(48)), step, missing)
        else:
            bag = getattr(model, "module", model)
            bag.unused = missing if len(missing) < len(case["missing"][0] | set(case["rules"])) else ()
            mode = case["layout"] if world > 1 else "single"
            backward(mode, model, optimizer, rank, world, step, case["accumulation"])
        if case["clip"] is not None:
            norms.append(float(optimizer.clip_grad_norm_(case["clip"])))
        optimizer.traffic.clear()
        optimizer.step()
        if not missing:
            assert _own(optimizer.traffic.bytes) == _own(optimizer.plan().traffic_of(rank))
    parameters = placed.whole() if placed else {n: whole(p) for n, p in model.named_parameters()}
    return {"parameters": {n.removeprefix("module."): p for n, p in parameters.items()}, "norms": norms}


def _own(sizes: dict[str, int]) -> dict[str, int]:
    """What a step itself moves, beside the reduction of gradients."""
    return {k: v for k, v in sizes.items() if k not in ("reduce_scatter", "all_reduce")}


def _cases(rank: int, world: int, numbers: range) -> list[dict]:
    out = []
    for number in numbers:
        try:
            out.append(run(draw(number, world), rank, world))
        except Exception as error:
            raise AssertionError(f"case {number} on {world} ranks: {draw(number, world)}: {error}") from error
    return out


def _check(numbers: range, world: int) -> None:
    for number, *results in zip(numbers, *run_ranks(_cases, world, numbers, timeout=280), strict=True):
        case = draw(number, world)
        one = run(case | {"layout": "single", "resume": None}, 0, 1)
        tolerance = {torch.float64: 1e-9, torch.float32: 3e-4, torch.bfloat16: 0.1}[case["dtype"]]
        for result in results:
            for name, p in one["parameters"].items():
                assert torch.equal(result["parameters"][name], results[0]["parameters"][name]), (number, name)
                error = float((p.double() - result["parameters"][name].double()).abs().max())
                assert error <= tolerance, (
                    f"case {number} on {world} ranks: {name} is off by {error:.1e} in {case}"
                )
            assert result["norms"] == results[0]["norms"], number
            assert result["norms"] == pytest.approx(one["norms"], rel=tolerance), number


@pytest.mark.parametrize("world", [2, 4])
def test_a_few_random_cases_give_the_weights_of_one_process(world):
    _check(range(IN_CI), world)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CASES, 50))
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_random_cases_give_the_weights_of_one_process(world, first):
    _check(range(first, first + 50), world)
