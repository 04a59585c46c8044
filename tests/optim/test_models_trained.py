"""Models of transformers and of this project, a few steps under each strategy: what one process would have made of them."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from polargrad_dist import OptimizerConfig, PolarGrad, Rule
from polargrad_dist.optim import adamw_rule
from tests.gloo import run_ranks
from tests.models.tiny import ALL, awake, tiny
from tests.optim import test_routing_models as hub

STEPS = 3
HUB = (
    "llama",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "gpt2",
    "t5",
    "bert",
    "vit",
    "mamba",
    "resnet",
)


def own(architecture):
    model = awake(tiny(architecture))
    tokens = torch.arange(2, 42).reshape(2, 20)
    return model, lambda: model(tokens, tokens.roll(-1, 1))


def build(name):
    torch.manual_seed(0)
    if name in ALL:
        return own(name)
    model, loss = getattr(hub, name)()
    if hasattr(model, "set_experts_implementation"):
        # Grouped products know no fp64
        model.set_experts_implementation("eager")
    return model, loss


class Loss(nn.Module):
    """A model with its loss, for wrappers that have to see forward and backward; ranks weigh it unalike, their mean is 1."""

    def __init__(self, model, loss, weight):
        super().__init__()
        self.model, self.of, self.weight = model, loss, weight

    def forward(self):
        return self.of() * self.weight


def placed(whole, strategy, world):
    """The module to call, sharded or wrapped in place."""
    if strategy == "ddp":
        return DistributedDataParallel(whole, find_unused_parameters=True)
    if strategy in ("fsdp", "hsdp"):
        sizes = (world,) if strategy == "fsdp" else (2, world // 2)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
        lists = [name for name, part in whole.model.named_modules() if isinstance(part, nn.ModuleList)]
        for name in lists:
            if not any(name.startswith(f"{outer}.") for outer in lists):
                for block in whole.model.get_submodule(name):
                    fully_shard(block, mesh=mesh)
        fully_shard(whole.model, mesh=mesh)
    return whole


def trained(rank, world, names, strategy):
    """Each model's parameters after a few steps, whole."""
    torch.set_default_dtype(torch.float64)
    found = {}
    for name in names:
        model, loss = build(name)
        whole = Loss(model, loss, 2 * (rank + 1) / (world + 1))
        call = placed(whole, strategy, world)
        # An exact oracle: a polynomial one would lift what is left of the rounding of sums.
        rule = Rule(lr=0.01, momentum="momentum_first", oracle="svd", scale="muon")
        optimizer = PolarGrad.from_config(model, OptimizerConfig(hidden=rule, scalar=adamw_rule(1e-3)))
        for _ in range(STEPS):
            optimizer.zero_grad()
            call().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        found[name] = {
            n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
            for n, p in model.named_parameters()
        }
    return found if rank == 0 else None


def compare(names, strategy, world):
    expected, found = run_ranks(trained, 1, names, "plain")[0], run_ranks(trained, world, names, strategy)[0]
    for name in names:
        assert expected[name].keys() == found[name].keys()
        for parameter, value in expected[name].items():
            torch.testing.assert_close(
                found[name][parameter],
                value,
                rtol=0,
                atol=1e-6,
                msg=lambda m, p=parameter, n=name: f"{n} {p}: {m}",
            )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_models_train_as_on_one_process(strategy):
    compare(["llama", "mixtral", "gpt2", "t5", *ALL], strategy, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "world"), [("ddp", 3), ("fsdp", 3), ("hsdp", 4)])
@pytest.mark.parametrize("name", [*HUB, *ALL])
def test_every_model_trains_as_on_one_process(name, strategy, world):
    compare([name], strategy, world)
