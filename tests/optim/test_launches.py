"""What a step starts on a GPU, counted without one, as one of 8 ranks; and owners by the costs of a GPU."""

import pytest
import torch
from torch import nn

from benchmarks.launches import CONFIGS, TARGETS, launches
from polargrad_dist.optim import OptimizerConfig, plan_for, polarsgdm_rule, route
from train import parse_run

# docs/gpu.md. Rank 0 of GPT-2 small owns a table's root, rank 7 hidden matrices of several shapes.
CASES = [("gpt2-small-fineweb-adam", 0), ("gpt2-small-fineweb", 0), ("gpt2-small-fineweb", 7), ("gpt2-medium-fineweb", 0),
         ("qwen2.5-muon-polarsgdm", 0)]  # fmt: skip


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_a_step_starts_few_calls(name, rank):
    run, _, _ = parse_run(["--config", str(CONFIGS / f"{name}.yaml")])
    seen = launches(run.model, run.optimizer, rank)
    assert 200 < seen.total() <= TARGETS[name], seen.most_common(12)
    assert seen["_allgather_base_"] > 5
    assert not {"_local_scalar_dense", "nonzero", "_linalg_eigh", "_linalg_svd"} & seen.keys()


def test_owners_are_dealt_by_the_costs_of_the_device():
    with torch.device("meta"):
        layers = {f"layer{i}": nn.Linear(512, 512, bias=False) for i in range(14)}
        model = nn.ModuleDict(
            {"embed": nn.Embedding(4096, 512)} | layers | {"head": nn.Linear(512, 4096, bias=False)}
        )
    groups = route(model, OptimizerConfig(embed=polarsgdm_rule()))
    ratios = {}
    for device in ("cpu", "cuda"):
        plan = plan_for(groups, replicas=4, device_type=device)
        tall = [e for e in plan.entries if e.kind == "tall"]
        assert len({e.owners[0] for e in tall}) == len(tall) == 2
        ratios[device] = tall[0].cost / next(e.cost for e in plan.entries if e.kind == "owner")
    # On a GPU a root costs many Newton-Schulz steps, whose products run there in bf16.
    assert ratios["cuda"] > 3 * ratios["cpu"]
