"""Parameters that are swapped, moved or placed wrongly, rules and gradients that fail on one rank: what all ranks then do.

One group of processes goes through all cases of a kind.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from polargrad_dist.optim import Direction, Polar, PolarGrad, register_rule
from tests.gloo import run_ranks
from tests.optim.bag import SHAPES, Bag, groups
from tests.optim.test_contract import RULES, agree
from tests.optim.training import backward, train, whole

FEW = {name: SHAPES[name] for name in ("square", "square2", "narrow", "tall", "bias")}
BAG = {"condition": 10.0, "shapes": FEW}
# Which rank's rule fails, and how
BAD: dict[str, int | str] = {"rank": -1, "what": ""}


@register_rule("failing rule of the tests")
class Failing(Polar):
    """Fails at 8 x 8 matrices on the rank and in the way that `BAD` says."""

    def direction(self, A: torch.Tensor, state: dict, group) -> Direction:
        answer = super().direction(A, state, group)
        if A.shape[-2:] != (8, 8) or dist.get_rank() != BAD["rank"]:
            return answer
        if BAD["what"] == "error":
            raise RuntimeError("the factorization of the tests did not converge")
        if BAD["what"] == "memory":
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        if BAD["what"] == "shape":
            return answer._replace(D=answer.D[:, :-1])
        return answer._replace(D=answer.D * torch.nan, nuclear_norm=None)


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        cause = f" <- {type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else ""
        return f"{type(error).__name__}: {error}{cause}"
    return "nothing was said"


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def _swapped(optimizer: PolarGrad, model: nn.Module) -> None:
    """What Accelerate does with an optimizer that was built before ``prepare``: placeholders, then the sharded parameters."""
    for group in optimizer.param_groups:
        group["params"] = [torch.empty(1, dtype=p.dtype) for p in group["params"]]
    fully_shard(model)
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [named[name] for name in group["param_names"]]


def _adopted(rank: int, world: int, load: dict | None, start: dict | None) -> dict:
    """Three steps of an optimizer that was built before its parameters were sharded; a fourth after another swap."""
    model = Bag(**BAG)
    if start:
        model.load_state_dict(start)
    optimizer = PolarGrad(groups(model, **RULES["polargradm"]))
    _swapped(optimizer, model)
    if load:
        optimizer.load_state_dict(load)
    norms, first = [], 3 if load else 0
    for step in range(first, first + 3):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + 0.3 * step)
        backward("fsdp", model, optimizer, rank, world, step)
        norms.append(float(optimizer.clip_grad_norm_(0.5)))
        optimizer.step()
    result = {"parameters": weights(model), "norms": norms, "state": optimizer.full_state_dict()}
    before = weights(model)
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    for p in group["params"]:
        p.grad = torch.ones_like(p)
    result["again"] = [said(optimizer.step), said(optimizer.full_state_dict)]
    result["moved"] = max(float((before[n] - w).abs().max()) for n, w in weights(model).items())
    return result


def test_parameters_that_accelerate_shards_after_construction_are_stepped_clipped_and_resumed():
    rule = RULES["polargradm"] | {"lr": 0.01}
    rates = {"steps": 3, "clip": 0.5}
    half = train(0, 1, "single", BAG, rule | {"lr": 0.01}, **rates)
    one = _one_rate(6)
    first = run_ranks(_adopted, 2, None, None)
    agree(_one_rate(3)["parameters"], first[0]["parameters"])
    assert first[0]["norms"] == first[1]["norms"] == pytest.approx(_one_rate(3)["norms"], rel=1e-12)
    assert half["norms"][0] == pytest.approx(first[0]["norms"][0])
    second = run_ranks(_adopted, 2, first[0]["state"], first[0]["parameters"])
    agree(one["parameters"], second[0]["parameters"])
    for result in (*first, *second):
        assert all("replaced after its first step" in words for words in result["again"])
        assert "build a new optimizer" in result["again"][0]
        assert result["moved"] == 0


def _one_rate(steps: int) -> dict:
    """One process, all groups at one rate."""
    model, norms = Bag(**BAG), []
    optimizer = PolarGrad(groups(model, **RULES["polargradm"]))
    for step in range(steps):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + 0.3 * step)
        model(list(range(48)), step).backward()
        norms.append(float(optimizer.clip_grad_norm_(0.5)))
        optimizer.step()
    return {"parameters": weights(model), "norms": norms}


def _converted(rank: int, world: int) -> list[str]:
    out = []
    for to in (torch.float32, torch.bfloat16):
        model = Bag(**BAG)
        optimizer = PolarGrad(groups(model, **RULES["polargradm"]))
        model.to(to)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        out.append(said(optimizer.step))
    return out


def test_a_model_that_is_converted_after_construction_is_refused_on_all_ranks():
    for words in (*run_ranks(_converted, 2), _converted(0, 1)):
        assert "square is torch.float32 on cpu, expected torch.float64 on cpu as at construction" in words[0]
        assert "before you build the optimizer" in words[1]


@pytest.mark.parametrize("keys", [{"lr": 0.1}, {"beta": 0.5}, {"weight_decay": 0.1, "lr": 0.1}])
def test_a_models_rule_is_never_taken_for_one_roles_and_the_way_to_say_it_is_told(keys):
    model = nn.Sequential(nn.Linear(4, 4))
    words = said(lambda: PolarGrad(model, **keys))
    assert words.startswith(f"ConfigError: {min(keys)}=")
    assert "hidden={" in words
    assert "OptimizerConfig" in words
    PolarGrad(model, hidden=keys)


def _drifting_rate(rank: int, world: int) -> tuple[int, str]:
    """A learning rate that one rank changes after three steps; at which step that is noticed."""
    model = DistributedDataParallel(Bag({"square": (4, 4), "bias": (3,)}))
    optimizer = PolarGrad(groups(model.module, **RULES["polargrad"]))
    for step in range(110):
        optimizer.zero_grad()
        backward("ddp", model, optimizer, rank, world, 0)
        if step == 3 and rank == 1:
            optimizer.param_groups[0]["lr"] *= 2
        if (words := said(optimizer.step)) != "nothing was said":
            return step, words
    return step, "nothing was said"


def test_a_rate_that_drifts_on_one_rank_is_noticed_within_a_hundred_steps_on_all():
    for step, words in run_ranks(_drifting_rate, 2):
        assert 3 < step <= 103
        assert "the learning rate or another number of parameter group 0 differs between ranks" in words


def _failures(rank: int, world: int, mode: str) -> dict[str, dict]:
    """For each way to fail on rank 1: what is said, which weights moved, and how far the others are from a good step."""
    rule = RULES["polargradm"] | {"algorithm": "failing rule of the tests", "oracle": "svd"}
    out, good = {}, {}
    for what in ("", "error", "memory", "shape", "not finite"):
        BAD.update(rank=1 if what else -1, what=what)
        model: nn.Module = Bag(**BAG)
        if mode == "ddp":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model)
        optimizer = PolarGrad(groups(model, **rule))
        owners = {e.name: e.ranks[e.owners[0]] for e in optimizer.plan().entries if e.owners}
        before = weights(model)
        backward(mode, model, optimizer, rank, world, 0)
        words = said(optimizer.step)
        after = weights(model)
        good = good or after
        failed = [name for name, owner in owners.items() if owner == 1 and FEW[name] == (8, 8)]
        out[what] = {
            "words": words,
            "failed": failed,
            "kept": all(torch.equal(after[name], before[name]) for name in failed),
            "others": all(torch.equal(after[n], good[n]) for n in FEW if n not in failed),
            "moved": all(not torch.equal(good[n], before[n]) for n in FEW),
        }
        # The next step is an ordinary one: nothing is left half way.
        BAD.update(rank=-1)
        optimizer.zero_grad()
        backward(mode, model, optimizer, rank, world, 1)
        out[what]["next"] = said(optimizer.step)
        parts: list = [None] * world
        dist.all_gather_object(parts, weights(model))
        out[what]["equal"] = all(torch.equal(part[n], parts[0][n]) for part in parts for n in FEW)
    return out


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_rule_that_fails_on_one_rank_raises_on_all_and_leaves_its_matrices_alone(mode):
    expected = {
        "error": (
            "PolarError: the rule of square",
            "RuntimeError: the factorization of the tests did not converge",
        ),
        "memory": ("OutOfMemoryError: the polar decomposition of square", "tried to allocate 20 GiB"),
        "shape": ("ConfigError: square", "returned directions"),
        "not finite": ("PolarError: the gradient or momentum of square", "not finite"),
    }
    results = run_ranks(_failures, 3, mode)
    for rank, result in enumerate(results):
        assert result[""]["words"] == "nothing was said"
        assert result[""]["moved"]
        for what, (start, cause) in expected.items():
            case = result[what]
            assert case["failed"], "the test should fail somewhere"
            assert case["words"].startswith(start), what
            assert cause in case["words"] or rank != 1, what
            assert ("not finite" in case["words"]) == (what == "not finite")
            assert case["kept"] and case["others"], what  # noqa: PT018
            assert case["next"] == "nothing was said", what
            assert case["equal"], what


def _bad_adamw(rank: int, world: int, mode: str) -> dict[str, object]:
    model: nn.Module = Bag({"square": (8, 8), "bias": (7,), "other": (5,)})
    if mode == "ddp":
        model = DistributedDataParallel(model)
    p = dict((model.module if mode == "ddp" else model).named_parameters())
    adamw = {"algorithm": "adamw"}
    optimizer = PolarGrad(
        [{"params": [("square", p["square"])]}, {"params": [(n, p[n]) for n in ("bias", "other")], **adamw}],
        lr=0.1,
    )
    out: dict[str, object] = {}
    for value in (torch.nan, torch.inf):
        before = weights(model)
        optimizer.zero_grad()
        backward(mode, model, optimizer, rank, world, 0)
        p["bias"].grad[3] = value
        words = said(optimizer.step)
        moved = [n for n, w in weights(model).items() if not torch.equal(w, before[n])]
        out[str(value)] = (words, moved)
    return out


@pytest.mark.parametrize(("mode", "world"), [("single", 1), ("ddp", 2)])
def test_an_adamw_parameter_whose_gradient_is_not_finite_is_left_alone_and_named(mode, world):
    results = run_ranks(_bad_adamw, world, mode) if world > 1 else [_bad_adamw(0, 1, mode)]
    for result in results:
        for words, moved in result.values():
            assert words.startswith("PolarError: the gradient or momentum of bias is not finite")
            assert moved == ["square", "other"]


def _placed_wrongly(rank: int, world: int) -> list[str]:
    mesh = init_device_mesh("cpu", (world,))
    partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)
    deep = distribute_tensor(torch.ones(2, 3, 4), mesh, [Shard(2)])
    fine = distribute_tensor(torch.ones(4, 4), mesh, [Replicate()])
    return [
        said(lambda t=t: PolarGrad([("layer.weight", nn.Parameter(t))], lr=0.1))
        for t in (partial, deep, fine)
    ]


def test_placements_that_cannot_be_stepped_are_refused_by_name_at_construction():
    for partial, deep, fine in run_ranks(_placed_wrongly, 2):
        for words, placement in ((partial, "Partial"), (deep, "Shard(dim=2)")):
            assert words.startswith("ConfigError: layer.weight is placed as (" + placement)
            assert "expected Replicate, Shard(0) or Shard(1)" in words
        assert fine == "nothing was said"
