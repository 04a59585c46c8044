"""What one rank cannot do, no rank does: refusals and failures reach all of them together, and name what is wrong."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from polargrad_dist.optim import PolarGrad
from tests.gloo import run_ranks
from tests.optim.bag import groups
from tests.optim.test_contract import BAG, RULES
from tests.optim.training import build


def _rank_zeros_state(rank: int, world: int, mode: str) -> list[str]:
    """What each rank says to rank 0's own state dict, to its own, and to the whole one."""
    from polargrad_dist.errors import CheckpointError
    from tests.optim.training import backward

    model, optimizer = build(
        mode, {"shapes": {"square": (8, 8), "tall": (50, 4), "bias": (7,)}}, RULES["polargradm"]
    )
    backward(mode, model, optimizer, rank, world, 0)
    optimizer.step()
    before = optimizer.full_state_dict()
    mine = optimizer.state_dict()
    foreign = dict(mine)
    places = [None] * world
    dist.all_gather_object(places, mine["place"])
    foreign["place"] = places[0]
    said = []
    for state in (foreign, mine, before):
        try:
            optimizer.load_state_dict(state)
            said.append("loaded")
        except CheckpointError as error:
            said.append(str(error))
    after = optimizer.full_state_dict()
    same = all(torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items())
    return [*said, str(same)]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_another_ranks_state_is_refused_by_all_ranks_and_changes_nothing(mode):
    for said in run_ranks(_rank_zeros_state, 2, mode, timeout=60):
        assert "rank" in said[0]
        assert said[0] != "loaded"
        assert said[1:] == ["loaded", "loaded", "True"]


def _without_ddp(rank: int, world: int, what: str) -> str:
    """Copies that nobody keeps equal: their gradients differ, or from the second step on the learning rate of AdamW."""
    from polargrad_dist.errors import ConfigError

    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(6, 6)), torch.nn.Parameter(torch.randn(6))
    optimizer = PolarGrad([{"params": [matrix]}, {"params": [vector], "algorithm": "adamw"}], lr=0.1)
    if what == "an edit":
        with torch.no_grad():
            vector += rank
    for step in range(3):
        for p in (matrix, vector):
            p.grad = torch.full_like(p, 1.0 + (rank if what == "gradients" else 0))
        if what == "rates":
            optimizer.param_groups[1]["lr"] = 0.1 * (1 + rank)
        try:
            optimizer.step()
        except ConfigError as error:
            return f"step {step}: {error}"
    return "nothing was said"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("gradients", "step 0: the gradient of param.0 differs"),
        ("rates", "step 0: the learning rate or another number of parameter group 1 differs"),
        ("an edit", "step 0: param.1 differs"),
    ],
)
def test_copies_that_drift_apart_are_named_on_all_ranks(what, expected):
    for said in run_ranks(_without_ddp, 2, what, timeout=60):
        assert said.startswith(expected), said


def _clip_with_nothing(rank: int, world: int) -> list[float]:
    """A shard without rows, and gradients that only rank 0 has."""
    torch.manual_seed(0)
    sharded = nn.Linear(8, 1, bias=False)
    fully_shard(sharded)
    one = PolarGrad(sharded.parameters(), lr=0.1)
    sharded(torch.ones(4, 8)).sum().backward()
    first = float(one.clip_grad_norm_(1.0))
    p = nn.Parameter(torch.ones(3, 3))
    two = PolarGrad([p], lr=0.1, gradients="reduce_scatter")
    if rank == 0:
        p.sum().backward()
    return [first, float(two.clip_grad_norm_(1.0))]


def test_clipping_where_a_rank_holds_no_gradient_neither_hangs_nor_fails():
    norms = run_ranks(_clip_with_nothing, 2, timeout=40)
    assert norms[0] == norms[1] == pytest.approx([4 * 8**0.5, 1.5])
    assert float(PolarGrad([nn.Parameter(torch.ones(3, 3))], lr=0.1).clip_grad_norm_(1.0)) == 0


def _dies(rank: int, world: int) -> str:
    import os
    import signal

    from tests.optim.training import backward

    model, optimizer = build("ddp", BAG, RULES["polargradm"])
    for step in range(4):
        optimizer.zero_grad()
        backward("ddp", model, optimizer, rank, world, step)
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
    return "finished"


def test_a_killed_rank_makes_the_others_fail_instead_of_hang():
    with pytest.raises(AssertionError, match=r"rank \d( of \d failed| died)"):
        run_ranks(_dies, 3, timeout=60)


def _nan(rank: int, world: int, mode: str) -> str:
    from polargrad_dist.errors import PolarError
    from tests.optim.training import backward

    model, optimizer = build(mode, BAG, RULES["polargradm"])
    backward(mode, model, optimizer, rank, world, 0)
    for p in model.parameters():
        if tuple(p.shape) == (8, 8):
            p.grad.mul_(float("nan"))
            break
    try:
        optimizer.step()
    except PolarError as error:
        return str(error)
    return "silent"


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_nan_gradient_raises_on_all_ranks_together_and_names_the_parameter(mode):
    messages = run_ranks(_nan, 3, mode)
    assert len(set(messages)) == 1
    assert "momentum of square is not finite" in messages[0]


def _unequal(rank: int, world: int) -> tuple[str, str]:
    from polargrad_dist.errors import ConfigError

    torch.manual_seed(rank)
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = PolarGrad([p], lr=0.1)
    p.grad = torch.ones_like(p)
    found = []
    for attempt in (optimizer.step, lambda: PolarGrad([torch.nn.Parameter(torch.zeros(4, 4 + rank))])):
        try:
            attempt()
            found.append("accepted")
        except ConfigError as error:
            found.append(str(error))
    dist.barrier()
    return tuple(found)


def test_copies_that_differ_and_models_that_differ_are_refused_on_all_ranks():
    for differ, models in run_ranks(_unequal, 2):
        assert "differs between ranks" in differ
        assert "parameters, shapes or rules differ between ranks" in models


def _one_bad_rate(rank: int, world: int) -> str:
    from polargrad_dist.errors import ConfigError

    torch.manual_seed(0)
    model = nn.Linear(8, 6, bias=False)
    fully_shard(model)
    optimizer = PolarGrad(groups(model))
    model(torch.ones(2, 8)).sum().backward()
    optimizer.param_groups[0]["lr"] = float("nan") if rank == 1 else 0.1
    try:
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    except ConfigError as error:
        return str(error)
    return "nothing was said"


def test_a_rate_that_is_no_number_on_one_rank_is_refused_on_all_although_they_clip_first():
    here, there = run_ranks(_one_bad_rate, 2, timeout=60)
    assert "lr is nan" in there
    assert "nothing" not in here


def _touched(rank: int, world: int, what: str) -> str:
    """Gradients that somebody writes to between backward and step, with gradients="reduce_scatter"."""
    from polargrad_dist.errors import PolarGradError

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False))
    optimizer = PolarGrad(groups(model), gradients="reduce_scatter")
    if what == "rebuilt":
        optimizer = PolarGrad(groups(model), gradients="reduce_scatter")
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))
    call = nn.parallel.DistributedDataParallel(model) if what == "wrapped in DDP" else model
    try:
        call(x).square().mean().backward()
        if what == "torch's clipping":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        if what == "finished first":
            optimizer.finish_reductions()
            for work in optimizer.works:
                optimizer.shard_gradient(work).mul_(0.5)
        optimizer.step()
    except (PolarGradError, RuntimeError) as error:
        return str(error)
    return str(float(sum(p.double().sum() for p in model.parameters())))


def test_a_gradient_on_its_way_to_its_owner_must_not_be_touched():
    for what in ("torch's clipping", "wrapped in DDP"):
        for said in run_ranks(_touched, 2, what, timeout=60):
            # torch's own words: there is nothing to write to
            assert "single memory location" in said
    plain = run_ranks(_touched, 2, "nothing", timeout=60)
    assert plain[0] == plain[1]
    assert float(plain[0]) != 0
    assert run_ranks(_touched, 2, "rebuilt", timeout=60) == plain
    halved = run_ranks(_touched, 2, "finished first", timeout=60)
    assert halved[0] == halved[1] != plain[0]


def _replicas_differ(rank: int, world: int, same: bool) -> str:
    from torch.distributed.device_mesh import init_device_mesh

    from polargrad_dist.errors import ConfigError

    torch.manual_seed(0 if same else rank // 2)
    model = nn.Linear(8, 6, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = PolarGrad(groups(model))
    model(torch.ones(2, 8)).sum().backward()
    try:
        optimizer.step()
    except ConfigError as error:
        return str(error)
    return "nothing was said"


def test_hsdp_replicas_that_were_never_made_equal_are_named_on_all_ranks():
    assert all("differs between ranks" in said for said in run_ranks(_replicas_differ, 4, False, timeout=60))
    assert run_ranks(_replicas_differ, 4, True, timeout=60) == ["nothing was said"] * 4


def _compiled_and_copied(rank: int, world: int, mode: str) -> tuple[bool, bool]:
    """Whether a compiled step moves weights as a plain one does, and whether a deep copy of the state is the state."""
    import copy

    from tests.optim.training import backward

    weights = []
    for compiled in (False, True):
        model, optimizer = build(mode, BAG, RULES["polargradm"])
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(2):
            optimizer.zero_grad()
            backward(mode, model, optimizer, rank, world, number)
            step()
        weights.append([p.detach().clone() for p in model.parameters()])
    same = all(
        torch.equal(getattr(a, "_local_tensor", a), getattr(b, "_local_tensor", b))
        for a, b in zip(*weights, strict=True)
    )
    kept = copy.deepcopy(optimizer.state_dict())
    before = optimizer.full_state_dict()
    optimizer.zero_grad()
    backward(mode, model, optimizer, rank, world, 2)
    optimizer.step()
    optimizer.load_state_dict(kept)
    after = optimizer.full_state_dict()
    return same, all(
        torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items()
    )


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_step_may_be_compiled_and_its_state_deep_copied(mode):
    assert run_ranks(_compiled_and_copied, 2, mode, timeout=100) == [(True, True)] * 2
