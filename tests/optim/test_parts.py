"""Every part that a rule can be composed of: the formula on one device, under DDP and FSDP2 on two ranks, and resumed."""

import pytest
import torch

from polargrad_dist import (
    CheckpointError,
    ConfigError,
    Direction,
    Polar,
    PolarError,
    PolarGrad,
    register_rule,
)
from polargrad_dist.optim.matrix import RULES, relative
from tests.gloo import run_ranks
from tests.optim.bag import Bag
from tests.optim.parts_reference import PartsReference
from tests.optim.training import build, distance, train, whole

SHAPES = {
    "a": (8, 6),
    "b": (8, 6),
    "c": (6, 9),
    "fused": (12, 6),
    "experts": (3, 5, 6),
    "tall": (50, 4),
    "bias": (7,),
}
BAG = {"shapes": SHAPES, "condition": 10.0}
BASE = {"lr": 0.02, "momentum": "momentum_first", "oracle": "svd"}
PARTS = {
    "alpha": {"alpha": 0.5},
    "alpha 0": {"alpha": 0.0, "nesterov": True},
    "center_rows": {"center_rows": True, "beta": 0.5},
    "rows": {"normalize": "rows", "scale": "muon", "nesterov": True, "betas": (0.9, 0.8)},
    "cautious": {"control": "cautious", "weight_decay": 0.5},
    "hyperball": {"control": "hyperball", "scale": "none", "nesterov": True},
    "floor": {"floor": 0.35, "scale": "muon", "normalize": "rows"},
    "nuclear_relative": {"scale": "nuclear_relative", "lr": 0.5, "beta": 0.5},
    "nuclear_shared": {"scale": "nuclear_shared", "weight_decay": 0.1},
    "nuclear_shared alpha": {"scale": "nuclear_shared", "alpha": 0.5, "floor": 0.1},
    "soap": {"precondition": "soap", "scale": "muon", "nesterov": True, "betas": (0.9, 0.9)},
    "all": {
        "precondition": "soap", "center_rows": True, "normalize": "rows", "control": "hyperball", "scale": "none",
        "nesterov": True,
    },
}  # fmt: skip
# By the Gram matrix of rows that stay where they are.
TALL = {
    "hyperball, tall": {"control": "hyperball", "scale": "none", "oracle": "auto"},
    "center_rows, tall": {"center_rows": True, "oracle": "auto", "beta": 0.5},
    "nuclear_relative, tall": {"scale": "nuclear_relative", "lr": 0.5, "oracle": "auto", "alpha": 0.5},
    "nuclear_relative, head": {"scale": "nuclear_relative", "lr": 0.5, "oracle": "auto", "role": "head"},
    "nuclear_shared, tall": {"scale": "nuclear_shared", "oracle": "auto", "floor": 0.05},
}
EVERY = PARTS | TALL


def blocks(name: str, x: torch.Tensor) -> list[torch.Tensor]:
    if name == "fused":
        return list(x.split([6, 4, 2]))
    return list(x) if x.ndim == 3 else [x]


@pytest.mark.parametrize("name", EVERY)
def test_a_part_is_its_formula(name):
    rule = BASE | EVERY[name]
    result = train(0, 1, "single", BAG, rule)
    bag = Bag(**BAG)
    names = [key for key in SHAPES if key != "bias"]
    start = [block for key in names for block in blocks(key, getattr(bag, key).detach())]
    reference = PartsReference(start, rule)
    for step in range(5):
        means = [block for key in names for block in blocks(key, bag.coefficients(step)[key].mean(0))]
        reference.step(
            [g + 0.1 * x for g, x in zip(means, reference.x, strict=True)], rule["lr"] / (1 + 0.3 * step)
        )
    got = [block for key in names for block in blocks(key, result["parameters"][key])]
    errors = [float((a - b).abs().max()) for a, b in zip(got, reference.x, strict=True)]
    assert max(errors) < 1e-8, errors
    moved = [float((a - b).abs().max()) for a, b in zip(got, start, strict=True)]
    assert min(moved) > 1e-3, "the test should step every matrix"


def _cases(rank: int, world: int, mode: str, names: list[str]) -> list[tuple[dict, dict]]:
    """Of each part: five steps, and three steps whose state and weights two further ones go on from."""
    out = []
    for name in names:
        rule = BASE | EVERY[name]
        straight = train(rank, world, mode, BAG, rule)
        first = train(rank, world, mode, BAG, rule, steps=3)
        rest = {"steps": 2, "first_step": 3, "start": first["parameters"], "load": first["state"]}
        resumed = train(rank, world, mode, BAG, rule, **rest)
        for key, value in straight["parameters"].items():
            assert torch.equal(value, resumed["parameters"][key]), f"{name}: {key} does not resume exactly"
        out.append(straight)
    return out


@pytest.mark.parametrize("mode", ["ddp", "fsdp", pytest.param("reduce_scatter", marks=pytest.mark.slow)])
def test_every_part_gives_the_weights_of_one_process_on_two_ranks_and_resumes_exactly(mode):
    names = [name for name in EVERY if name not in ("alpha 0", "nuclear_shared alpha", "rows")]
    results = run_ranks(_cases, 2, mode, names)
    for number, name in enumerate(names):
        one = train(0, 1, "single", BAG, BASE | EVERY[name])
        for result in results:
            assert distance(one["parameters"], result[number]["parameters"]) < 1e-9, name
            for kind, size in result[number]["expected"].items():
                assert max(r[number]["bytes"].get(kind, 0) for r in results) == size, (name, kind)


@pytest.mark.slow
def test_every_part_gives_the_weights_of_one_process_on_a_mesh_of_four():
    results = run_ranks(_cases, 4, "hsdp", list(EVERY))
    for number, name in enumerate(EVERY):
        one = train(0, 1, "single", BAG, BASE | EVERY[name])
        assert all(distance(one["parameters"], r[number]["parameters"]) < 1e-9 for r in results), name


def test_the_plan_counts_what_owners_keep():
    _, optimizer = build("single", BAG, BASE | PARTS["all"])
    state = optimizer.named_state()
    counted = sum(t.nbytes for name, t in state.items() if not name.endswith(".step") and "bias" not in name)
    bias = 2 * 7 * 8
    assert optimizer.plan().memory()[0]["optimizer"] == counted + bias


def _in_bf16(rank: int, world: int) -> list[dict]:
    bag = BAG | {"dtype": torch.bfloat16}
    return [
        train(rank, world, mode, bag, BASE | PARTS["hyperball"])["parameters"] for mode in ("ddp", "fsdp")
    ]


def test_the_hyperball_keeps_norms_of_bf16_weights_too():
    start = {name: p.detach() for name, p in Bag(**(BAG | {"dtype": torch.bfloat16})).named_parameters()}
    for parameters in run_ranks(_in_bf16, 2)[0]:
        for name in ("a", "c", "tall"):
            assert float(parameters[name].float().norm() / start[name].float().norm()) == pytest.approx(
                1, abs=2e-3
            )


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"control": "hyperball"}, "scale is 'nuclear' and floor 0.0 with control 'hyperball'"),
        ({"control": "hyperball", "scale": "none", "weight_decay": 0.1}, "expected weight_decay 0"),
        ({"scale": "muon", "alpha": 0.5}, "which has no nuclear norm"),
        ({"precondition": "soap"}, "expected momentum_first or heavy_ball"),
        ({"algorithm": "adamw", "normalize": "rows"}, "only the polar rules use it"),
        ({"algorithm": "adamw", "lr": 1.0}, "lr is 1.0 with algorithm 'adamw', expected a rate below 1"),
        ({"floor": -1.0}, "expected a finite number >= 0"),
        ({"normalize": "columns"}, "expected one of: none, rows"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(rule, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        PolarGrad([torch.nn.Parameter(torch.zeros(3, 3))], **rule)


def test_a_weight_of_zeros_cannot_keep_its_norm_and_a_pause_cannot_come_later():
    p = torch.nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.eye(3)
    with pytest.raises(ConfigError, match="holds a matrix of zeros with control 'hyperball'"):
        PolarGrad([p], control="hyperball", scale="none")
    optimizer = PolarGrad([p], scale="muon")
    optimizer.param_groups[0]["floor"] = 0.1
    with pytest.raises(ConfigError, match="from construction on or never"):
        optimizer.step()


def test_a_step_that_is_not_to_happen_leaves_every_state_alone():
    model, optimizer = build("single", BAG, BASE | PARTS["all"])
    for step in range(3):
        optimizer.zero_grad()
        model(list(range(48)), step).backward()
        before = {k: v.clone() for k, v in optimizer.named_state().items()} | {
            n: whole(p) for n, p in model.named_parameters()
        }
        optimizer.step(ok=torch.tensor(step != 2))
    after = optimizer.named_state() | {n: whole(p) for n, p in model.named_parameters()}
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_a_refused_matrix_of_zeros_leaves_an_optimizer_that_goes_on(lr):
    p, q = torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = PolarGrad([p], control="hyperball", scale="none", momentum="momentum_first", lr=lr)
    for x in (p, q):
        x.grad = torch.randn(4, 6)
    optimizer.step()
    with pytest.raises(ConfigError, match="holds a matrix of zeros"):
        optimizer.add_param_group({"params": [q]})
    before = optimizer.full_state_dict()
    assert len(before["state"]) == len(before["param_groups"]) == len(optimizer.works) == 1
    optimizer.step()
    q.data.fill_(1.0)
    optimizer.add_param_group({"params": [q]})
    optimizer.step()
    assert torch.linalg.matrix_norm(q.detach()) == pytest.approx(24**0.5)


def test_a_relative_scale_is_learnt_in_a_hundred_steps_and_then_stays():
    norms = [*[0.0] * 150, *[2.0] * 20, *[0.0] * 30, *[6.0] * 80, 0.0, *[3.0] * 50]
    seen, reference = torch.zeros(1, 2), PartsReference([torch.zeros(1, 1)], {})
    for step, norm in enumerate(norms):
        quotient, seen = relative(torch.tensor([norm], dtype=torch.float64), seen)
        expected = reference._relative(0, norm) if norm else 0.0
        assert float(quotient) == pytest.approx(expected, rel=1e-5), step
    mean = sum(t * x for t, x in enumerate([*[2.0] * 20, *[6.0] * 80], 1)) / 5050
    assert float(quotient) == pytest.approx(3.0 / mean, rel=1e-5)
    assert seen[0].tolist() == pytest.approx([mean, 100], rel=1e-5)


def test_a_relative_scale_learnt_from_next_to_nothing_is_bounded():
    seen = torch.zeros(2, 2)
    for _ in range(100):
        _, seen = relative(torch.tensor([1e-6, 1.0], dtype=torch.float64), seen)
    quotient, _ = relative(torch.tensor([1.0, 3.0], dtype=torch.float64), seen)
    assert quotient.tolist() == pytest.approx([10.0, 3.0])


@pytest.mark.parametrize("shape", [(6, 4), (40, 4)])
def test_a_matrix_without_a_gradient_for_a_hundred_steps_then_trains_at_its_rate(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = PolarGrad([p], lr=0.5, scale="nuclear_relative", momentum="momentum_first", beta=0.5)
    for _ in range(120):
        p.grad = torch.zeros(shape)
        optimizer.step()
    assert not p.any()
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert float(torch.linalg.matrix_norm(p.detach(), 2)) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("role", "shape", "transposed", "factor"),
    [
        ("head", (20, 16), False, 2.0),
        ("head", (5, 16), False, 2.0),
        ("head", (300, 16), False, 2.0),
        ("head", (16, 300), True, 2.0),
        ("head", (20, 256), False, 0.5),
        ("embed", (300, 16), False, 1.0),
        ("hidden", (20, 16), False, 1.0),
    ],
)
def test_a_head_s_relative_step_shrinks_with_the_root_of_its_width(role, shape, transposed, factor):
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    rule = {"lr": 0.1, "scale": "nuclear_relative", "beta": 0.5}
    optimizer = PolarGrad([{"params": [p], "role": role, "transposed": transposed, **rule}])
    p.grad = 1e3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer.step()
    assert float(torch.linalg.matrix_norm(p.detach(), 2)) == pytest.approx(0.1 * factor, rel=1e-6)


@pytest.mark.parametrize("more", [{}, {"owner_states": lambda self, group: {"calls": lambda m, n: (1,)}}])
def test_a_rule_of_one_s_own_takes_the_relative_scale_too(more):
    def direction(self, A, state, group):
        u, s, vh = torch.linalg.svd(A, full_matrices=False)
        after = {key: value + 1 for key, value in state.items() if key == "calls"}
        return Direction(u @ vh, self.scale(A.shape[-2:], s.sum(-1), group), after, s.sum(-1))

    name = "svd of the tests" + " that counts" * bool(more)
    register_rule(name)(type(f"Own{len(more)}", (Polar,), {"direction": direction, **more}))
    rule = {"lr": 0.5, "scale": "nuclear_relative"}
    weights = []
    try:
        for algorithm in ("polar", name):
            p = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
            optimizer = PolarGrad([p], algorithm=algorithm, **rule)
            for step in range(3):
                p.grad = 1e3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).double()
                optimizer.step()
            weights.append(p.detach())
            assert optimizer.named_state()["param.0.nuclear_mean"][0, 1] == 3
    finally:
        del RULES[name]
    assert float((weights[0] - weights[1]).abs().max()) < 1e-9
    if more:
        assert float(optimizer.named_state()["param.0.calls"]) == 3


@pytest.mark.parametrize("shape", [(6, 4), (40, 4)])
def test_a_relative_scale_is_left_at_any_step_and_taken_up_at_construction_only(shape):
    def stepped(scale: str) -> PolarGrad:
        p = torch.nn.Parameter(torch.zeros(shape))
        optimizer = PolarGrad([p], lr=0.1, scale=scale)
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        return optimizer

    relative, nuclear = stepped("nuclear_relative"), stepped("nuclear")
    nuclear.param_groups[0]["scale"] = "nuclear_relative"
    before = nuclear.param_groups[0]["params"][0].detach().clone()
    with pytest.raises(ConfigError, match="expected it from construction on or never: build a new optimizer"):
        nuclear.step()
    assert torch.equal(before, nuclear.param_groups[0]["params"][0])
    for scale, count in (("muon", 1), ("nuclear_relative", 2)):
        relative.param_groups[0]["scale"] = scale
        relative.step()
        assert relative.named_state()["param.0.nuclear_mean"][0, 1] == count
    for saved, mine in (("nuclear", "nuclear_relative"), ("nuclear_relative", "nuclear")):
        with pytest.raises(
            CheckpointError, match=f"has scale '{saved}' for the group of 'param.0', expected '{mine}'"
        ):
            stepped(mine).load_state_dict(stepped(saved).full_state_dict())


@pytest.mark.parametrize("scale", ["nuclear", "nuclear_relative"])
@pytest.mark.parametrize("shape", [(6, 4), (40, 4)])
def test_a_scale_that_is_not_finite_is_not_stepped(scale, shape):
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = PolarGrad([p], scale=scale, alpha=20.0)
    p.grad = 1e30 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PolarError, match=r"gradient or momentum of param\.0 is not finite"):
        optimizer.step()
    assert torch.equal(p, torch.ones(shape))
    assert all(not value.any() for value in optimizer.named_state().values())
