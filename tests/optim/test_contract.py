"""The contract: on 1, 2, 3 and 4 processes, however parameters are placed, the weights of one process.

One group of processes runs many cases, since starting it costs more than a case.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from polargrad_dist.optim import OptimizerConfig, PolarGrad
from tests.gloo import run_ranks
from tests.optim import reference
from tests.optim.bag import OWN, SHAPES, Bag, groups
from tests.optim.training import build, distance, train, whole

RULES = {
    "polargrad": {"lr": 0.01},
    "polargradm": {"lr": 0.01, "momentum": "momentum_first", "weight_decay": 0.1},
    "polar_first": {"lr": 0.01, "momentum": "polar_first", "weight_decay": 0.1, "control": "cautious"},
    "heavy_ball": {"lr": 0.005, "momentum": "heavy_ball", "nesterov": True},
    "muon": {"lr": 0.05, "momentum": "momentum_first", "nesterov": True, "scale": "muon", "oracle": "svd"},
    "moonlight": {"lr": 0.05, "momentum": "momentum_first", "scale": "moonlight", "weight_decay": 0.1},
    "spectral": {"lr": 0.05, "momentum": "polar_first", "scale": "spectral"},
    "unscaled": {"lr": 0.05, "scale": "none", "oracle": "qdwh"},
    "homogenized": {"lr": 0.01, "momentum": "momentum_first", "spectrum": "homogenized"},
    "adamw": {"lr": 0.05, "algorithm": "adamw", "weight_decay": 0.1},
}
BAG = {"condition": 1e3}
# Not square: by the Gram method, whose error grows with the condition squared
GRAM = {
    "tall",
    "narrow",
    "wide",
    "conv",
}


def agree(one: dict, many: dict, tolerance: float = 1e-10, gram: float = 1e-8) -> None:
    for name, value in one.items():
        error = float((value.double() - many[name].double()).abs().max())
        assert error <= (gram if name in GRAM else tolerance), f"{name}: {error:.2e}"


def _cases(rank: int, world: int, cases: list[tuple[str, dict]]) -> list[dict]:
    return [train(rank, world, mode, **arguments) for mode, arguments in cases]


def same_on_all_ranks(results: list[list[dict]]) -> list[dict]:
    for case in range(len(results[0])):
        for other in results[1:]:
            for name, value in results[0][case]["parameters"].items():
                assert torch.equal(value, other[case]["parameters"][name]), f"ranks differ in {name}"
    return results[0]


@pytest.mark.parametrize("name", RULES)
def test_one_process_agrees_with_the_paper_written_in_svd(name):
    rule = RULES[name]
    result = train(0, 1, "single", BAG, rule)
    bag = Bag(**BAG)
    for key, shape in SHAPES.items():
        if key == "bias":
            continue
        x = dict(bag.named_parameters())[key].detach()
        rows = x.view(-1, shape[-1]) if key != "conv" else x.flatten(1)
        sizes = (
            OWN.get(key, {}).get("split_sizes") or [len(rows) // OWN[key]["num_heads"]] * 2
            if key in OWN
            else [len(rows)]
        )
        if key == "experts":
            sizes = [shape[1]] * shape[0]
        for number, (first, size) in enumerate(
            zip(torch.tensor([0, *sizes]).cumsum(0).tolist(), sizes, strict=False)
        ):
            arguments = {k: v for k, v in rule.items() if k not in ("lr", "oracle", "algorithm")}
            kind = reference.ReferenceAdamW if rule.get("algorithm") == "adamw" else reference.Reference
            if kind is reference.Reference:
                arguments["beta"] = rule.get("beta", 0.95)
            block = kind(rows[first : first + size], **arguments)
            for step in range(5):
                mean = bag.coefficients(step)[key].mean(0).view(rows.shape)[first : first + size]
                block.step(mean + 0.1 * block.x, rule["lr"] / (1 + 0.3 * step))
            got = result["parameters"][key].view(rows.shape)[first : first + size]
            error = float((got - block.x).abs().max())
            assert error <= (1e-8 if key in GRAM else 1e-10), f"{key}[{number}]: {error:.2e}"


# Three ranks, in CI, are test_layouts' and test_random's.
@pytest.mark.parametrize("world", [*(pytest.param(w, marks=pytest.mark.slow) for w in (1, 3)), 2, 4])
def test_every_rule_gives_the_weights_of_one_process_in_every_mode(world):
    cases = [(mode, {"bag": BAG, "rule": rule}) for mode in modes_of(world) for rule in RULES.values()]
    expected = {id(rule): train(0, 1, "single", BAG, rule)["parameters"] for rule in RULES.values()}
    results = same_on_all_ranks(run_ranks(_cases, world, cases))
    for (_, arguments), result in zip(cases, results, strict=True):
        agree(expected[id(arguments["rule"])], result["parameters"])


def modes_of(world: int) -> list[str]:
    return ["ddp", "reduce_scatter", "fsdp"] + ["hsdp"] * (world == 4)


@pytest.mark.parametrize("world", [2, 4])
def test_accumulated_and_clipped_steps_give_the_weights_of_one_process(world):
    rule = RULES["polargradm"]
    extra = {"accumulation": 4, "clip": 0.5}
    cases = [(mode, {"bag": BAG, "rule": rule, **extra}) for mode in modes_of(world)]
    one = train(0, 1, "single", BAG, rule, clip=0.5)
    for result in same_on_all_ranks(run_ranks(_cases, world, cases)):
        agree(one["parameters"], result["parameters"])
        assert result["norms"] == pytest.approx(one["norms"], rel=1e-12)
    assert all(norm > 0.5 for norm in one["norms"]), "the test should clip"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_small_buckets_change_nothing(world):
    rule = RULES["polar_first"]
    options = {"bucket_mb": 100 / 2**20}
    cases = [(mode, {"bag": BAG, "rule": rule, "options": options}) for mode in modes_of(world)]
    one = train(0, 1, "single", BAG, rule)["parameters"]
    for result in same_on_all_ranks(run_ranks(_cases, world, cases)):
        agree(one, result["parameters"])


@pytest.mark.parametrize("world", [2, 3])
def test_a_parameter_without_gradient_anywhere_is_left_alone(world):
    rule = RULES["polargradm"]
    bag = BAG | {"unused": ("square", "bias", "tall")}
    one = train(0, 1, "single", bag, rule)
    start = dict(Bag(**bag).named_parameters())
    for result in same_on_all_ranks(
        run_ranks(_cases, world, [(m, {"bag": bag, "rule": rule}) for m in modes_of(world)])
    ):
        agree(one["parameters"], result["parameters"])
        for name in bag["unused"]:
            assert torch.equal(result["parameters"][name], start[name])


def _half_present(rank: int, world: int, mode: str) -> dict:
    """Odd ranks have no gradient of two parameters."""
    model, optimizer = build(
        mode, BAG | {"unused": ("square", "tall") if rank % 2 else ()}, RULES["polargradm"]
    )
    for step in range(2):
        optimizer.zero_grad()
        per_rank = list(range(rank * 12, rank * 12 + 12))
        model(per_rank, step).backward()
        optimizer.step()
    return {n.removeprefix("module."): whole(p) for n, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["ddp", "reduce_scatter"])
def test_a_gradient_that_only_some_ranks_have_counts_as_zero_on_the_others(mode):
    results = run_ranks(_half_present, 2, mode)
    assert distance(results[0], results[1]) == 0

    model = Bag(**BAG)
    optimizer = PolarGrad(groups(model, **RULES["polargradm"]))
    absent = Bag(**BAG, unused=("square", "tall"))
    for step in range(2):
        optimizer.zero_grad()
        absent.load_state_dict(model.state_dict())
        (model(list(range(12)), step) / 2).backward()
        absent.zero_grad()
        (absent(list(range(12, 24)), step) / 2).backward()
        for p, q in zip(model.parameters(), absent.parameters(), strict=True):
            p.grad += 0 if q.grad is None else q.grad
        optimizer.step()
    agree({n: p.detach() for n, p in model.named_parameters()}, results[0])


@pytest.mark.parametrize("world", [2, 4])
def test_updates_in_bf16_leave_ranks_identical_and_close(world):
    rule = RULES["polargradm"]
    options = {"comm_dtype": "bfloat16"}
    one = train(0, 1, "single", BAG, rule)["parameters"]
    cases = [(mode, {"bag": BAG, "rule": rule, "options": options}) for mode in modes_of(world)]
    for result in same_on_all_ranks(run_ranks(_cases, world, cases)):
        agree(one, result["parameters"], 3e-2, 3e-2)


def _tiny_gradients(rank: int, world: int) -> list[float]:
    """Norms of a first step of fp16 parameters: over all ranks, and on this one alone."""
    alone = dist.new_group([rank], use_local_synchronization=True)
    gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 1e-6
    rule = {
        "lr": 0.02,
        "momentum": "momentum_first",
        "beta": 0.95,
        "scale": "muon",
        "oracle": "newton_schulz",
    }
    norms = []
    for group in (None, alone):
        p = nn.Parameter(torch.zeros(8, 8, dtype=torch.float16))
        optimizer = PolarGrad([p], process_group=group, **rule)
        # The momentum is a twentieth of it, less than fp16 can hold.
        p.grad = gradient.half()
        optimizer.step()
        norms.append(float(p.detach().float().norm()))
    return norms


def test_fp16_parameters_are_stepped_on_two_ranks_as_on_one():
    for together, alone in run_ranks(_tiny_gradients, 2):
        assert together == pytest.approx(alone, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_and_bf16_parameters_agree_with_one_process(dtype):
    bag = {"condition": 100.0, "dtype": dtype}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name in ("polargradm", "adamw"):
        one = train(0, 1, "single", bag, RULES[name])["parameters"]
        cases = [(mode, {"bag": bag, "rule": RULES[name]}) for mode in modes_of(4)]
        for result in same_on_all_ranks(run_ranks(_cases, 4, cases)):
            agree(one, result["parameters"], tolerance, tolerance)


def test_fewer_matrices_than_ranks_and_tiny_ones_neither_hang_nor_differ():
    bag = {"shapes": {"square": (2, 2), "bias": (3,), "tall": (17, 2)}, "condition": 10.0}
    one = train(0, 1, "single", bag, RULES["polargradm"])["parameters"]
    for result in same_on_all_ranks(
        run_ranks(_cases, 4, [(m, {"bag": bag, "rule": RULES["polargradm"]}) for m in modes_of(4)])
    ):
        agree(one, result["parameters"])


@pytest.mark.parametrize("name", ["polargradm", pytest.param("polar_first", marks=pytest.mark.slow)])
def test_state_saved_at_any_world_size_and_mode_continues_at_any_other(name):
    rule = RULES[name]
    few = {name: SHAPES[name] for name in ("square", "narrow", "tall", "fused", "bias")}
    BAG = {"condition": 1e3, "shapes": few}
    straight = train(0, 1, "single", BAG, rule, steps=6)["parameters"]
    saved = [train(0, 1, "single", BAG, rule, steps=3)]
    for world in (2, 3, 4):
        cases = [(mode, {"bag": BAG, "rule": rule, "steps": 3}) for mode in modes_of(world)]
        saved += run_ranks(_cases, world, cases)[0]
    for world in (1, 2, 3, 4):
        cases = [
            (
                mode,
                {
                    "bag": BAG,
                    "rule": rule,
                    "steps": 3,
                    "first_step": 3,
                    "load": s["state"],
                    "start": s["parameters"],
                    "gather_state": False,
                },
            )
            for mode in modes_of(world)
            for s in saved
        ]
        for result in run_ranks(_cases, world, cases)[0]:
            agree(straight, result["parameters"])


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_are_as_many_and_as_large_as_planned(world):
    shapes = (
        {f"m{i}": (64, 64) for i in range(8)} | {f"n{i}": (128, 64) for i in range(8)} | {"tall": (2048, 32)}
    )
    bag = {"shapes": shapes, "condition": 10.0, "dtype": torch.float32}
    cases = [(mode, {"bag": bag, "rule": RULES["polargradm"], "steps": 1}) for mode in modes_of(world)]
    for (mode, _), result in zip(cases, run_ranks(_cases, world, cases)[0], strict=True):
        for kind, size in result["expected"].items():
            assert result["bytes"][kind] == size, f"{mode} {kind}"
        assert set(result["bytes"]) == set(result["expected"]), mode
        parameters = sum(torch.Size(s).numel() for s in shapes.values()) * 4
        assert result["bytes"]["reduce"] == 4 * 32 * 33
        assert result["bytes"].get("all_gather", 0) == {"fsdp": 0, "hsdp": parameters // 2}.get(
            mode, parameters
        )
        assert result["bytes"].get("reduce_scatter", 0) == (parameters if mode == "reduce_scatter" else 0)
        travelling = parameters - 2048 * 32 * 4
        assert result["bytes"]["all_to_all"] == pytest.approx(2 * travelling / world, rel=0.03)


class Language(nn.Module):
    """Embedding, two layers, norm and a head that may be tied: gradients as language models have them."""

    def __init__(self, tied: bool):
        super().__init__()
        torch.manual_seed(1)
        self.tokens = nn.Embedding(40, 6)
        self.up, self.down = nn.Linear(6, 15), nn.Linear(15, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 40, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.double()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens[:, :-1])
        logits = self.head(self.norm(x + self.down(self.up(x).relu())))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _language(rank: int, world: int, mode: str, tied: bool) -> dict:
    model: nn.Module = Language(tied)
    config = OptimizerConfig(gradients="reduce_scatter" if mode == "reduce_scatter" else "all_reduced")
    if mode == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif mode == "fsdp":
        for layer in (model.up, model.down):
            fully_shard(layer)
        fully_shard(model)
    optimizer = PolarGrad.from_config(model, config)
    tokens = torch.randint(0, 40, (12, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        optimizer.zero_grad()
        model(tokens[rank * 12 // world : (rank + 1) * 12 // world]).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["ddp", "reduce_scatter", "fsdp"])
def test_a_language_model_with_its_roles_gets_the_weights_of_one_process(mode, tied):
    one = _language(0, 1, "single", tied)
    for world in (2, 3):
        for many in run_ranks(_language, world, mode, tied):
            assert distance(one, many) <= 1e-8


def test_truncated_qdwh_of_a_tall_matrix_is_worked_out_where_its_rows_lie():
    rule = {"lr": 0.01, "momentum": "momentum_first", "oracle": "qdwh", "steps": 2}
    bag = {
        "shapes": {"tall": (50, 4), "square": (8, 8), "taller": (90, 3)},
        "condition": 30.0,
        "dtype": torch.float32,
    }
    one = train(0, 1, "single", bag, rule)
    whole = train(0, 1, "single", bag, rule | {"row_sharded": False})
    agree(one["parameters"], whole["parameters"], 1e-5, 1e-5)
    for world in (2, 4):
        cases = [(mode, {"bag": bag, "rule": rule}) for mode in modes_of(world)]
        for result in same_on_all_ranks(run_ranks(_cases, world, cases)):
            agree(one["parameters"], result["parameters"], 1e-5, 1e-5)
            assert result["bytes"] == result["expected"]
            assert result["bytes"]["broadcast"] == 8 * (4 * 4 + 4 + 3 * 3 + 4)
