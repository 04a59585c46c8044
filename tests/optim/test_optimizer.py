"""What a user of any torch optimizer expects, on one process."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

from polargrad_dist import Muon, PolarGrad, PolarGradM, PolarHB, PolarMuon, PolarSGDM, muon_rule
from polargrad_dist.errors import CheckpointError, ConfigError, PolarError
from polargrad_dist.optim.elements import join_bf16, split_bf16
from polargrad_dist.optim.rules import relative_rule
from tests.optim.bag import Bag, groups, spectrum

SQUARE = nn.Parameter(torch.zeros(3, 3))


def quadratic(p: torch.Tensor) -> torch.Tensor:
    return 0.5 * p.square().sum()


def test_step_returns_the_closures_loss_and_evaluates_it_with_gradients():
    p = nn.Parameter(torch.randn(5, 3))
    optimizer = PolarGrad([p], lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = quadratic(p)
        loss.backward()
        return loss

    before = float(quadratic(p).detach())
    assert float(optimizer.step(closure)) == pytest.approx(before)
    assert float(quadratic(p).detach()) < before


def test_lr_schedulers_of_torch_drive_the_step_length():
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = PolarGrad([p], lr=1.0, scale="none")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    lengths = []
    for _ in range(3):
        p.grad = torch.eye(4)
        before = p.detach().clone()
        optimizer.step()
        scheduler.step()
        lengths.append(float((p.detach() - before).norm()))
    assert lengths == pytest.approx([2.0, 1.0, 0.5], rel=1e-5)


def test_a_scheduler_starts_from_the_rate_that_a_group_has_then():
    optimizer = PolarGrad([nn.Parameter(torch.zeros(4, 4))], lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.5
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_groups_may_be_added_later_and_keep_what_was_there():
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))
    optimizer = PolarGradM([a], lr=0.1)
    a.grad = torch.randn(4, 3)
    optimizer.step()
    momentum = optimizer.state[a]["momentum"].clone()
    optimizer.add_param_group({"params": [b], "algorithm": "adamw", "lr": 0.01})
    assert torch.equal(optimizer.state[a]["momentum"], momentum)
    before = b.detach().clone()
    b.grad = torch.ones(5)
    optimizer.step()
    assert float((b.detach() - before).abs().max()) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"params": [nn.Parameter(torch.zeros(3))]}, "expected a matrix"),
        ({"params": [{"params": []}]}, "empty"),
        ({"params": [nn.Parameter(torch.zeros(3, 3))], "gradients": "somewhere"}, "reduce_scatter"),
        ({"params": [nn.Parameter(torch.zeros(3, 3))], "scale": "nuclaer"}, "scale is 'nuclaer'"),
        ({"params": [nn.Parameter(torch.zeros(3, 3))], "beta": 1.0}, "beta is 1.0"),
        ({"params": [nn.Parameter(torch.zeros(6, 3))], "split_sizes": (4, 4)}, "add up to 8"),
        (
            {"params": [nn.Parameter(torch.zeros(7, 3))], "num_heads": 2},
            "num_heads=2, expected a divisor of its 7 rows",
        ),
        ({"params": [nn.Parameter(torch.zeros(3, 4).T)]}, "contiguous"),
        (
            {"params": [("w", nn.Parameter(torch.zeros(3, 3))), ("w", nn.Parameter(torch.zeros(3, 3)))]},
            "names two parameters",
        ),
        ({"params": [{"params": [SQUARE], "wieght_decay": 0.1}]}, "did you mean 'weight_decay'"),
        ({"params": [SQUARE, SQUARE]}, "twice"),
        ({"params": [SQUARE], "lr": math.inf}, "finite"),
        ({"params": [SQUARE], "lr": "0.1"}, "lr is '0.1', expected a number"),
        ({"params": [SQUARE, ("w", nn.Parameter(torch.zeros(3, 3)))]}, "holds a tuple at index 1"),
        ({"params": "weights"}, "holds a str at index 0"),
        ({"params": [SQUARE], "betas": (0.9,)}, "two numbers"),
        ({"params": [SQUARE], "oracle_dtype": "float61"}, "oracle_dtype is float61"),
        ({"params": [SQUARE], "comm_dtype": "int8"}, "comm_dtype is 'int8'"),
        ({"params": [SQUARE], "comm_dtype": "float61"}, "comm_dtype is 'float61'"),
        ({"params": [SQUARE], "comm_dtype": torch.float16}, "comm_dtype is float16, whose range"),
        ({"params": [SQUARE], "bucket_mb": 0}, "bucket_mb is 0"),
        ({"params": [SQUARE], "spectrum": "homogenized", "oracle": "qdwh"}, "spectrum is 'homogenized'"),
        ({"params": [SQUARE], "num_heads": 0}, "num_heads is 0"),
        ({"params": [SQUARE], "split_sizes": (3, 0)}, "split_sizes is"),
        ({"params": [nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))]}, "complex64"),
        ({"params": [torch.zeros(3, 3, dtype=torch.int64)]}, "int64"),
        ({"params": [nn.Parameter(torch.zeros(3, 3, device="meta"))]}, "meta device"),
    ],
)
def test_an_invalid_argument_is_refused_in_a_sentence(arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        PolarGrad(**arguments)


@pytest.mark.parametrize(
    ("build", "momentum", "scale"),
    [
        (PolarGrad, "none", "nuclear"),
        (PolarGradM, "momentum_first", "nuclear"),
        (PolarSGDM, "momentum_first", "nuclear"),
        (PolarHB, "heavy_ball", "nuclear"),
        (PolarMuon, "momentum_first", "nuclear"),
        (Muon, "momentum_first", "muon"),
    ],
)
def test_the_familys_names_set_what_they_stand_for(build, momentum, scale):
    group = build([nn.Parameter(torch.zeros(3, 3))]).param_groups[0]
    assert (group["momentum"], group["scale"]) == (momentum, scale)


def test_muon_agrees_with_torchs_own_muon_on_a_well_conditioned_gradient():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    start = torch.randn(16, 8)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([ours], lr=0.05, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    for step in range(3):
        g = spectrum((16, 8), 3.0, torch.Generator().manual_seed(step)).float()
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
    # both iterate in bf16, in different orders
    assert float((ours - theirs).detach().norm() / (ours.detach() - start).norm()) < 0.02


def test_bf16_weights_accumulate_like_fp32_ones():
    start = torch.randn(32, 16).bfloat16()
    half, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    a, b = PolarGradM([half], lr=1e-4), PolarGradM([full], lr=1e-4)
    for step in range(200):
        g = torch.randn(32, 16, generator=torch.Generator().manual_seed(step)).bfloat16()
        half.grad, full.grad = g, g.float()
        a.step()
        b.step()
    assert (full - start.float()).abs().max() > 1e-4
    exact = join_bf16(half.detach().view(-1), a.state[half]["low_bits"].view(torch.int16).view(-1))
    assert torch.equal(exact.view(32, 16), full.detach())
    assert torch.equal(half.detach(), full.detach().bfloat16()) or (half.float() - full).abs().max() < 2**-8


def test_splitting_fp32_into_bf16_and_the_rest_loses_nothing():
    x = torch.cat(
        [torch.randn(1000) * 10.0**e for e in (-30, -3, 0, 3, 30)] + [torch.tensor([0.0, -0.0, 1.0, -1.0])]
    )
    low = torch.empty_like(x, dtype=torch.int16)
    high = split_bf16(x, low)
    assert torch.equal(join_bf16(high, low), x)
    assert ((high.float() - x).abs() <= x.abs() * 2.0**-8).all()


def test_a_zero_gradient_moves_nothing_and_a_nan_is_never_silent():
    p = nn.Parameter(torch.randn(6, 4))
    before = p.detach().clone()
    optimizer = PolarGrad([p], lr=0.1)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)
    p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(PolarError, match=r"momentum of param\.0 is not finite"):
        optimizer.step()
    assert torch.equal(p, before)


def test_rows_of_an_embedding_without_gradient_do_not_move_and_keep_zero_momentum():
    p = nn.Parameter(torch.randn(100, 5))
    before = p.detach().clone()
    optimizer = PolarSGDM([{"params": [p], "role": "embed"}], lr=0.1)
    p.grad = torch.zeros_like(p)
    p.grad[[3, 50, 99]] = torch.randn(3, 5)
    optimizer.step()
    moved = (p != before).any(1).nonzero().flatten().tolist()
    assert moved == [3, 50, 99]
    assert optimizer.state[p]["momentum"].ne(0).any(1).nonzero().flatten().tolist() == [3, 50, 99]


def test_gradients_are_left_as_they_were():
    bag = Bag()
    optimizer = PolarGradM(groups(bag), lr=0.1)
    bag(list(range(48)), 0).backward()
    before = {n: p.grad.clone() for n, p in bag.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p.grad, before[n]) for n, p in bag.named_parameters())


def test_clipping_measures_and_scales_the_global_norm():
    bag = Bag()
    optimizer = PolarGrad(groups(bag), lr=0.1)
    bag(list(range(48)), 0).backward()
    grads = [p.grad.clone() for p in bag.parameters()]
    expected = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert float(optimizer.clip_grad_norm_(math.inf)) == pytest.approx(expected, rel=1e-12)
    assert all(torch.equal(p.grad, g) for p, g in zip(bag.parameters(), grads, strict=True))
    optimizer.clip_grad_norm_(1.0)
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in bag.parameters()))
    assert after == pytest.approx(1.0, rel=1e-5)
    for norm in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="max_norm is"):
            optimizer.clip_grad_norm_(norm)


def test_state_exists_from_construction_and_round_trips():
    bag = Bag()
    optimizer = PolarGradM(groups(bag), lr=0.1)
    assert set(optimizer.named_state()) >= {"wide.momentum", "bias.exp_avg", "bias.exp_avg_sq", "bias.step"}
    for step in range(2):
        bag(list(range(48)), step).backward()
        optimizer.step()
    other_bag = copy.deepcopy(bag)
    other = PolarGradM(groups(other_bag), lr=7.0)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    third_bag = copy.deepcopy(bag)
    third = PolarGradM(groups(third_bag), lr=0.1)
    third.load_named_state(optimizer.named_state())
    for model, optim in ((bag, optimizer), (other_bag, other), (third_bag, third)):
        optim.zero_grad()
        model(list(range(48)), 2).backward()
        optim.step()
    for p, q, r in zip(bag.parameters(), other_bag.parameters(), third_bag.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_the_state_of_another_model_is_refused_before_anything_changes():
    a = PolarGradM([("w", nn.Parameter(torch.zeros(3, 3)))], lr=0.1)
    b = PolarGradM([("v", nn.Parameter(torch.zeros(3, 3)))], lr=0.1)
    c = PolarGradM([("w", nn.Parameter(torch.zeros(4, 3)))], lr=0.1)
    for other in (b, c):
        with pytest.raises(CheckpointError):
            a.load_state_dict(other.state_dict())
        with pytest.raises(CheckpointError):
            a.load_named_state(other.named_state())


@pytest.mark.parametrize(
    "state", [None, {}, {"state": {}}, torch.optim.AdamW([nn.Parameter(torch.zeros(3, 3))]).state_dict()]
)
def test_what_is_no_state_of_this_optimizer_is_refused_in_a_sentence(state):
    with pytest.raises(CheckpointError, match="not the state of a PolarGrad"):
        PolarGradM([nn.Parameter(torch.zeros(3, 3))], lr=0.1).load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "value"), [("momentum", "none"), ("algorithm", "adamw"), ("oracle", "newton_schulz")]
)
def test_what_state_and_owners_were_laid_out_for_cannot_change_between_steps(key, value):
    p = nn.Parameter(torch.zeros(3, 3))
    optimizer = PolarGradM([p], lr=0.1)
    p.grad = torch.eye(3)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ConfigError, match=f"'{key}' of parameter group 0 became '{value}'"):
        optimizer.step()
    assert not p.detach().any()


@pytest.mark.parametrize(
    ("key", "value"), [("lr", math.nan), ("scale", "nucular"), ("spectrum", "homogenised")]
)
def test_a_value_that_cannot_be_meant_is_refused_between_steps_too(key, value):
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = PolarGradM([p], lr=0.1)
    p.grad = torch.eye(3)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ConfigError, match=f"parameter group 0.{key} is"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 3))


@pytest.mark.parametrize(
    "bad", [{"lr": -1}, {"params": [torch.zeros(3, 3, dtype=torch.complex64)]}, {"wieght": 1}]
)
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(bad):
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = PolarGrad([p], lr=0.1)
    with pytest.raises(ConfigError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]} | bad)
    assert len(optimizer.param_groups) == 1
    p.grad = torch.eye(3)
    optimizer.step()
    assert not torch.equal(p.detach(), torch.ones(3, 3))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (None, "params is a NoneType, expected a model"),
        (nn.Parameter(torch.ones(3, 3)), "params is a Parameter, expected a model"),
        ([], "params is empty"),
        ([{"lr": 0.1}], "parameter group 0 has no key 'params'"),
    ],
)
def test_what_holds_no_parameters_is_refused(params, said):
    with pytest.raises(ConfigError, match=said):
        PolarGrad(params)


def test_groups_are_not_written_to_and_may_be_used_again():
    first, second = {"params": [nn.Parameter(torch.ones(3, 3))]}, {"params": [nn.Parameter(torch.ones(3, 3))]}
    PolarGrad([first, second])
    PolarGrad([second])
    assert first.keys() == second.keys() == {"params"}


@pytest.mark.parametrize("rule", [{}, {"algorithm": "adamw"}])
def test_bf16_weights_that_are_set_to_zero_between_steps_go_on_from_there(rule):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(16, 16).bfloat16())
    optimizer = PolarGrad([p], lr=1e-2, **rule)
    for step in range(12):
        if step == 5:
            with torch.no_grad():
                p.zero_()
        p.grad = torch.randn(16, 16).bfloat16()
        optimizer.step()
    assert int((p == 0).sum()) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s["state"][0].update(momentum=3.0),
        lambda s: s["state"].update({0: None}),
        lambda s: s["param_groups"][0].update(lr="fast"),
        lambda s: s["param_groups"].append(s["param_groups"][0] | {"params": [], "param_names": []}),
    ],
)
def test_a_damaged_state_is_refused_before_anything_changes(damage):
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = PolarGradM([p], lr=0.1)
    p.grad = torch.eye(3)
    optimizer.step()
    momentum = optimizer.state[p]["momentum"].clone()
    state = copy.deepcopy(optimizer.full_state_dict())
    state["state"][0]["momentum"] += 1
    damage(state)
    with pytest.raises(CheckpointError):
        optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[p]["momentum"], momentum)


def test_a_state_with_other_sums_over_ranks_is_refused_before_anything_is_loaded():
    built = [PolarGrad([nn.Parameter(torch.ones(3, 2))], scale=scale) for scale in ("nuclear_shared", "muon")]
    with pytest.raises(
        CheckpointError, match=r"has scale, control, floor .*nuclear_shared.*, expected .*muon"
    ):
        built[1].load_state_dict(built[0].state_dict())
    assert built[1].param_groups[0]["scale"] == "muon"


def test_a_state_of_another_rule_is_refused():
    saved = PolarGradM([nn.Parameter(torch.zeros(3, 3))], lr=0.1, oracle="svd").state_dict()
    with pytest.raises(CheckpointError, match="oracle 'svd'"):
        PolarGradM([nn.Parameter(torch.zeros(3, 3))], lr=0.1).load_state_dict(saved)


def test_a_sparse_gradient_is_refused_before_anything_moves():
    embedding = nn.Embedding(10, 3, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = PolarGrad(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    for act in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(ConfigError, match=r"gradient of param\.0 is sparse"):
            act()
    assert torch.equal(embedding.weight, before)
    with pytest.raises(ConfigError, match="sparse=True"):
        PolarGrad(nn.Sequential(embedding))


@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps])
def test_a_copy_that_would_lose_its_parts_is_refused(copying):
    with pytest.raises(ConfigError, match="full_state_dict"):
        copying(PolarGrad([SQUARE]))


def test_the_plan_prints_its_table():
    assert "oracle work per rank" in str(PolarGrad([SQUARE]).plan())


def test_stats_tell_the_nuclear_norm_and_condition_of_what_was_stepped():
    p, q = nn.Parameter(torch.zeros(40, 4)), nn.Parameter(torch.zeros(6, 6))
    optimizer = PolarGrad([{"params": [p], "role": "embed"}, {"params": [q], "oracle": "svd"}], lr=0.1)
    p.grad = spectrum((40, 4), 10.0, torch.Generator().manual_seed(0)).float()
    q.grad = spectrum((6, 6), 100.0, torch.Generator().manual_seed(1)).float()
    optimizer.step()
    stats = optimizer.stats()
    assert stats["embed"]["condition"] == pytest.approx(10.0, rel=1e-3)
    assert stats["embed"]["nuclear_norm"] == pytest.approx(
        float(torch.linalg.matrix_norm(p.grad, "nuc")), rel=1e-5
    )
    assert stats["hidden"]["condition"] == pytest.approx(100.0, rel=1e-2)
    assert set(optimizer.stats(by="parameter")) == {"param.0", "param.1"}


def test_the_muon_scale_of_a_split_is_that_of_its_blocks():
    p = nn.Parameter(torch.zeros(12, 4))
    optimizer = Muon([{"params": [p], "split_sizes": (8, 4)}], lr=1.0, oracle="svd", nesterov=False, beta=0.0)
    p.grad = torch.randn(12, 4)
    optimizer.step()
    assert float(p[:8].norm()) == pytest.approx(math.sqrt(2) * 2, rel=1e-4)
    assert float(p[8:].norm()) == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("momentum", ["momentum_first", "polar_first", "none"])
def test_a_step_that_is_not_to_happen_changes_no_bit_and_one_that_is_changes_as_without_a_word(
    dtype, momentum
):
    def built() -> tuple[Bag, PolarGrad]:
        bag = Bag(dtype=dtype)
        return bag, PolarGrad(groups(bag, momentum=momentum, weight_decay=0.1), lr=0.1)

    (plain, one), (told, two) = built(), built()
    for step in range(3):
        for bag in (plain, told):
            bag.zero_grad()
            bag(list(range(48)), step).backward()
        one.step()
        two.step(ok=torch.tensor(True))
        if step == 1:
            before = {n: p.detach().clone() for n, p in told.named_parameters()}
            states = {n: t.clone() for n, t in two.named_state().items()}
            told.square.grad.fill_(torch.nan)
            two.step(ok=torch.tensor(False))
            assert all(torch.equal(p, before[n]) for n, p in told.named_parameters())
            assert all(torch.equal(t, states[n]) for n, t in two.named_state().items())
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), told.parameters(), strict=True))
    assert all(torch.equal(t, two.named_state()[n]) for n, t in one.named_state().items())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: PolarGrad(m, hiden={"lr": 0.1}), "did you mean 'hidden'"),
        (lambda m: PolarGrad(m, hidden={"learning_rate": 0.1}), "did you mean 'lr'"),
        (lambda m: Muon(m, ns_steps=5), "did you mean 'steps'"),
        (lambda m: Muon(m, hidden={"lr": 0.1}), "expected the fields of that rule as arguments"),
    ],
)
def test_a_first_guess_is_answered_with_what_was_meant(make, said):
    with pytest.raises(ConfigError, match=said):
        make(torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 10)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda m: PolarGrad(m, hidden={"algorithm": "adamw"}),
            "hidden has algorithm 'adamw' but no lr of its own, expected one, since 0.02 is a rate for algorithm 'polar': "
            "start at lr 0.003",
        ),
        (
            lambda m: PolarGrad(m, embed={"scale": "nuclear"}),
            "embed has scale 'nuclear' but no lr of its own, expected one, since 1 is a rate for scale 'nuclear_relative': "
            "start at lr 0.5 over the nuclear norm of its momentum",
        ),
        (
            lambda m: PolarGrad(m, embed={"algorithm": "adamw", "lr": 0.01}, head={"algorithm": "polar"}),
            "head has algorithm 'polar' but no lr of its own, expected one, since 0.01 is a rate for algorithm 'adamw': "
            "start at lr 1.0",
        ),
        (
            lambda m: PolarGrad(m, hidden={"scale": "spectral"}),
            "hidden has scale 'spectral' but no lr of its own, expected one, since 0.02 is a rate for scale 'muon': "
            "docs/rules.md, Rates, converts known ones",
        ),
        (
            lambda m: Muon(m, scale="moonlight"),
            "Muon has scale 'moonlight' but no lr of its own, expected one, since 0.02 is a rate for scale 'muon': "
            "start at lr 0.003",
        ),
        (
            lambda m: PolarSGDM(list(m.parameters()), scale="muon"),
            "PolarSGDM has scale 'muon' but no lr of its own, expected one, since 0.001 is a rate for scale 'nuclear': "
            "start at lr 0.02",
        ),
        (
            lambda m: PolarGrad(m, hidden=muon_rule(scale="moonlight")),
            "muon_rule has scale 'moonlight' but no lr of its own, expected one, since 0.02 is a rate for scale 'muon': "
            "start at lr 0.003",
        ),
        (
            lambda m: PolarGrad(m, embed=relative_rule(algorithm="adamw")),
            "relative_rule has algorithm 'adamw' but no lr of its own, expected one, since 1 is a rate for algorithm "
            "'polar': start at lr 0.03",
        ),
        (
            lambda m: PolarGrad(m, hidden={"scale": "muonn"}),
            "optimizer.hidden.scale is 'muonn', expected one of",
        ),
        (
            lambda m: PolarGrad(m, scalar={"algorithm": "polar"}),
            "optimizer.scalar.algorithm is 'polar', expected 'adamw'",
        ),
    ],
)
def test_a_rule_never_keeps_the_rate_of_another_one(make, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        make(torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 10)))


@pytest.mark.parametrize(("key", "value", "role"), [("lr", 0.1, "hidden"), ("betas", (0.9, 0.99), "scalar")])
def test_what_was_given_with_a_model_is_asked_for_with_a_role_that_reads_it(key, value, role):
    with pytest.raises(ConfigError, match=f"set {role}={{'{key}': "):
        PolarGrad(torch.nn.Sequential(torch.nn.Linear(4, 4)), **{key: value})


def test_a_rule_has_the_rate_that_was_given_or_that_of_the_role_it_follows():
    def rates(**rules) -> dict[str, float]:
        model = torch.nn.Sequential(
            torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 10)
        )
        return {group["role"]: group["lr"] for group in PolarGrad(model, **rules).param_groups}

    default = {"hidden": 0.02, "embed": 1.0, "head": 1.0, "scalar": 0.05}
    assert rates() == rates(hidden={"algorithm": "polar"}, embed={"scale": "nuclear_relative"}) == default
    adamw = {"algorithm": "adamw", "lr": 0.01}
    assert rates(embed=adamw) == default | {"embed": 0.01, "head": 0.01}
    # AdamW reads no scale, so that its rate is none for a scale.
    assert rates(embed=adamw, head={"scale": "nuclear"}) == default | {"embed": 0.01, "head": 0.01}
    assert rates(hidden={"beta": 0.9}, scalar={"betas": (0.9, 0.99)}) == default
    p = nn.Parameter(torch.zeros(3, 3))
    assert [f([p]).param_groups[0]["lr"] for f in (Muon, PolarGradM, PolarSGDM)] == [0.02, 1e-3, 1e-3]
    assert Muon([{"params": [p], "lr": 0.004}], scale="moonlight").param_groups[0]["lr"] == 0.004


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_momentum_is_the_same_whichever_neighbours_have_gradients_and_after_a_load(dtype):
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(6, 4, 5, 4, generator=generator, dtype=torch.float64).to(dtype)
    start = torch.randn(4, 5, 4, generator=generator, dtype=torch.float64).to(dtype)
    # The neighbours between which the first and last lie come and go: theirs are other buckets each time.
    present = [(1, 0, 0, 1), (1, 1, 0, 1), (1, 0, 0, 1), (1, 0, 1, 1), (1, 0, 0, 1), (1, 1, 0, 1)]
    together = [torch.nn.Parameter(x.clone()) for x in start]
    alone = [torch.nn.Parameter(x.clone()) for x in start]
    rule = {"lr": 0.1, "momentum": "momentum_first", "scale": "none", "oracle": "svd"}
    one = PolarGrad(together, **rule)
    several = [PolarGrad([p], **rule) for p in alone]
    for step, here in enumerate(present):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad, q.grad = (grads[step, i].clone(), grads[step, i].clone()) if here[i] else (None, None)
        one.step()
        for optimizer in several:
            optimizer.step()
        for p, q in zip(together, alone, strict=True):
            assert torch.equal(p, q), step
    saved = one.full_state_dict()
    for p in together:
        p.grad = grads[0, 0].clone()
    together[1].grad = together[2].grad = None
    weights = [p.detach().clone() for p in together]
    outcomes = []
    for _ in range(2):
        one.load_state_dict(saved)
        for p, w in zip(together, weights, strict=True):
            p.data.copy_(w)
        one.step()
        outcomes.append([p.detach().clone() for p in together])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
