"""The contract on tensor, sequence and expert parallelism, several meshes in one optimizer, and what mixes them.

Weights, norms and state of one process; copies equal to the bit; exactly the planned bytes. CI runs each rule with each
layout on one number of ranks, `make test-slow` on all.
"""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from polargrad_dist.optim import OptimizerConfig, PolarGrad
from tests.gloo import run_ranks
from tests.optim.bag import Bag, groups
from tests.optim.placed import WORLDS, train_placed
from tests.optim.test_contract import RULES, agree
from tests.optim.training import distance, whole

BAG = {"condition": 1e2}
GRAM = (
    # Of matrices that are not square: the Gram method's error grows with the condition number squared
    1e-9
)
SAMPLE = [
    (worlds[(i + j) % len(worlds)], layout, rule)
    for i, (layout, worlds) in enumerate(WORLDS.items())
    for j, rule in enumerate(RULES)
]
ALL = [(world, layout, rule) for layout, worlds in WORLDS.items() for world in worlds for rule in RULES]


def _one(rule: dict, steps: int = 3) -> dict:
    model = Bag(**BAG)
    optimizer = PolarGrad(groups(model, **rule))
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        model(list(range(48)), step).backward()
        norms.append(float(optimizer.clip_grad_norm_(0.5)))
        optimizer.step()
    state = optimizer.full_state_dict()
    names = {i: n for g in state["param_groups"] for i, n in zip(g["params"], g["param_names"], strict=True)}
    return {
        "parameters": {n: p.detach() for n, p in model.named_parameters()},
        "norms": norms,
        "state": {names[i]: s for i, s in state["state"].items()},
    }


def _cases(rank: int, world: int, cases: list[tuple[str, dict, dict]]) -> list[dict]:
    return [train_placed(rank, world, layout, BAG, rule, **options) for layout, rule, options in cases]


def _check(cases: list[tuple[str, dict, dict]], world: int) -> None:
    expected = {id(rule): _one(rule) for _, rule, _ in cases}
    for (layout, rule, _), *results in zip(cases, *run_ranks(_cases, world, cases), strict=True):
        one = expected[id(rule)]
        assert all(norm > 0.5 for norm in one["norms"]), "the test should clip"
        for result in results:
            agree(one["parameters"], result["parameters"], gram=GRAM)
            assert result["norms"] == results[0]["norms"], layout
            assert result["norms"] == pytest.approx(one["norms"], rel=1e-9)
            assert result["bytes"] == result["planned"], layout
            for name, states in result["state"].items():
                assert states.keys() == one["state"][name].keys()
                for key, value in states.items():
                    error = float((value - one["state"][name][key]).abs().max())
                    assert error <= GRAM, f"{layout}: {key} of {name} is off by {error:.2e}"


@pytest.mark.parametrize("world", [2, 3, 4])
def test_each_rule_with_each_layout_gives_weights_norms_and_state_of_one_process(world):
    _check([(layout, RULES[rule], {}) for its, layout, rule in SAMPLE if its == world], world)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("bucket_mb", [32.0, 300 / 2**20])
def test_each_rule_with_each_layout_on_each_number_of_ranks(world, bucket_mb):
    cases = [(layout, RULES[rule], {"bucket_mb": bucket_mb}) for its, layout, rule in ALL if its == world]
    for first in range(0, len(cases), 12):
        _check(cases[first : first + 12], world)


def test_small_buckets_and_narrow_messages_travel_as_planned_in_every_layout():
    cases = [
        (layout, RULES["polar_first"], {"bucket_mb": 300 / 2**20}) for layout in WORLDS if 4 in WORLDS[layout]
    ]
    _check(cases, 4)


class _Block(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.relu(self.up(self.norm(x))))


class _Language(nn.Module):
    def __init__(self, d: int = 8, vocabulary: int = 37):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(_Block(d) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)
        self.double()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _parallelized(model: _Language, tp, sequence: bool) -> None:
    """As torchtitan does it; ``sequence`` cuts activations between the blocks, so that norms have partial gradients."""
    between = Shard(1) if sequence else Replicate()
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
    }
    parallelize_module(model, tp, plan | ({"norm": SequenceParallel()} if sequence else {}))
    inner = {"up": ColwiseParallel(input_layouts=between), "down": RowwiseParallel(output_layouts=between)}
    for block in model.blocks:
        parallelize_module(block, tp, inner | ({"norm": SequenceParallel()} if sequence else {}))


def _language(rank: int, world: int, cases: list[str]) -> list[tuple[dict, list[float]]]:
    return [_trained(world, case) for case in cases]


def _trained(world: int, case: str) -> tuple[dict, list[float]]:
    """Four clipped steps in accumulation of two; ``case`` says which parallelisms."""
    model, share, shares = _Language(), 0, 1
    if "tp" in case or "sp" in case:
        mesh = init_device_mesh(
            "cpu", (world // 2, 2) if "fsdp" in case else (1, world), mesh_dim_names=("dp", "tp")
        )
        _parallelized(model, mesh["tp"], "sp" in case)
        if "fsdp" in case:
            share, shares = mesh["dp"].get_local_rank(), world // 2
            for module in (*model.blocks, model):
                fully_shard(module, mesh=mesh["dp"])
    config = OptimizerConfig()
    config.hidden.oracle, config.embed.momentum = "svd", "polar_first"
    optimizer = PolarGrad.from_config(model, config)
    generator, norms = torch.Generator().manual_seed(1), []
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(2):
            tokens = torch.randint(0, 37, (4, 9), generator=generator)
            size = 4 // shares
            (model(tokens[share * size : share * size + size]) / 2).backward()
        norms.append(float(optimizer.clip_grad_norm_(0.3)))
        optimizer.step()
    return {name: whole(p) for name, p in model.named_parameters()}, norms


@pytest.mark.parametrize(("world", "cases"), [(2, ["tp", "sp"]), (4, ["tp", "sp", "tp fsdp", "sp fsdp"])])
def test_a_language_model_under_real_tensor_and_sequence_parallelism_gets_the_weights_of_one_process(
    world, cases
):
    one, norms = _trained(1, "one")
    assert all(norm > 0.3 for norm in norms), "the test should clip"
    for case, *ranks in zip(cases, *run_ranks(_language, world, cases), strict=True):
        for parameters, its_norms in ranks:
            assert distance(one, parameters) <= 1e-10, case
            assert distance(ranks[0][0], parameters) == 0, case
            assert its_norms == ranks[0][1], case
            assert its_norms == pytest.approx(norms, rel=1e-12), case


def _stage(rank: int, world: int) -> tuple[dict, list[float]]:
    """Two pipeline stages of copies on two ranks each: half of the bag on each stage, one norm over both."""
    stage = rank // 2
    stages = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    model = Bag(**BAG, unused=())
    mine = [name for i, name in enumerate(model.shapes) if i % 2 == stage]
    for name in set(model.shapes) - set(mine):
        delattr(model, name)
    optimizer = PolarGrad(
        groups(model, **RULES["polargradm"]),
        process_group=stages[stage],
        norm_group=torch.distributed.group.WORLD,
    )
    full, norms = Bag(**BAG), []
    for step in range(3):
        full.zero_grad()
        with torch.no_grad():
            for name, p in model.named_parameters():
                full.get_parameter(name).copy_(p)
        full(list(range(48)), step).backward()
        for name, p in model.named_parameters():
            p.grad = full.get_parameter(name).grad.clone()
        norms.append(float(optimizer.clip_grad_norm_(0.5)))
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def test_pipeline_stages_clip_by_one_norm_and_step_as_one_process_does():
    one = _one(RULES["polargradm"])
    results = run_ranks(_stage, 4, timeout=60)
    agree(one["parameters"], results[0][0] | results[2][0], gram=GRAM)
    for (parameters, norms), (others, _) in zip(results, [results[0]] * 2 + [results[2]] * 2, strict=True):
        assert norms == results[0][1]
        assert norms == pytest.approx(one["norms"], rel=1e-12)
        assert distance(parameters, others) == 0


def _one_row(rank: int, world: int) -> dict:
    """The last rank that stores anything stores one row of one of several blocks; one column where it is transposed."""
    model = Bag({"heads": (5, 6), "fused": (7, 3), "columns": (5, 10)})
    if world > 1:
        fully_shard(model)
    own = {
        "heads": {"num_heads": 5},
        "fused": {"split_sizes": (4, 3)},
        "columns": {"num_heads": 2, "transposed": True},
    }
    optimizer = PolarGrad([{"params": [(n, p)], **own[n]} for n, p in model.named_parameters()], lr=0.1)
    model(list(range(48)), 0).backward()
    optimizer.step()
    return {n: whole(p) for n, p in model.named_parameters()}


@pytest.mark.parametrize("world", [3, 4])
def test_each_row_of_a_split_parameter_takes_the_scale_of_its_own_matrix(world):
    one = _one_row(0, 1)
    for many in run_ranks(_one_row, world):
        assert distance(one, many) <= 1e-10
