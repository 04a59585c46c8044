"""What other hands do to an optimizer between two steps: it is honoured or refused, never passed over in silence."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils.parametrizations import weight_norm

from polargrad_dist import ConfigError, PolarGrad, PolarGradM
from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.optim.alike import RATES_CHECKED
from polargrad_dist.optim.elements import join_bf16
from tests.gloo import run_ranks


def stepped(optimizer: PolarGrad, *params: nn.Parameter) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("rule", [{}, {"algorithm": "adamw"}])
def test_weights_that_are_no_longer_contiguous_are_refused(rule):
    layer = nn.Conv2d(4, 8, 3, bias=False)
    optimizer = PolarGrad(layer.parameters(), lr=0.1, **rule)
    layer.to(memory_format=torch.channels_last)
    with pytest.raises(ConfigError, match="no longer contiguous"):
        stepped(optimizer, layer.weight)
    # As the message advises.
    layer.weight.data = layer.weight.data.contiguous()
    before = layer.weight.detach().clone()
    stepped(optimizer, layer.weight)
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("rule", [{}, {"momentum": "momentum_first"}, {"algorithm": "adamw"}])
@pytest.mark.parametrize("rows", [3, 6])
def test_weights_that_were_resized_are_refused(rule, rows):
    table = nn.Embedding(4, 4)
    optimizer = PolarGrad(table.parameters(), lr=0.1, **rule)
    stepped(optimizer, table.weight)
    # As resize_token_embeddings() of transformers does.
    table.weight.data = torch.randn(rows, 4)
    table.weight.grad = None
    with pytest.raises(ConfigError, match=rf"param\.0 has shape \({rows}, 4\), expected \(4, 4\)"):
        stepped(optimizer, table.weight)


@pytest.mark.parametrize("state", [torch.zeros(2, 4), torch.zeros(4, 4, dtype=torch.float16)])
@pytest.mark.parametrize("rule", [{"momentum": "momentum_first"}, {"algorithm": "adamw"}])
def test_a_state_of_another_shape_or_dtype_is_refused(rule, state):
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = PolarGrad([p], lr=0.1, **rule)
    stepped(optimizer, p)
    key = next(iter(optimizer.state[p]))
    kept = optimizer.state[p][key]
    optimizer.state[p][key] = state
    for _ in range(2):
        with pytest.raises(ConfigError, match="another shape or dtype"):
            stepped(optimizer, p)
    optimizer.state[p][key] = kept
    stepped(optimizer, p)


def test_states_and_groups_that_are_replaced_are_taken_up_and_a_lack_is_refused():
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = PolarGradM([p], lr=0.1)
    stepped(optimizer, p)
    optimizer.state[p] = {"momentum": torch.zeros(4, 4)}
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)
    for key in ("momentum",):
        optimizer.state[p][key].data = torch.full((4, 4), 2.0)
    optimizer.step()
    assert float(optimizer.full_state_dict()["state"][0]["momentum"][0, 0]) == pytest.approx(1.9)
    optimizer.param_groups = [dict(group, lr=0.0) for group in optimizer.param_groups]
    before = p.detach().clone()
    stepped(optimizer, p)
    assert torch.equal(p, before)
    optimizer.state.clear()
    with pytest.raises(ConfigError, match=r"param\.0 was replaced by an incomplete one"):
        optimizer.step()


def test_schedulers_that_leave_keys_of_their_own_and_numbers_of_numpy_serve():
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = PolarGrad([p], lr=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    for _ in range(5):
        stepped(optimizer, p)
        schedule.step()
    optimizer = PolarGrad([p], lr=np.float32(0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float32(0.5))
    stepped(optimizer, p)
    schedule.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)


def test_a_rate_held_in_a_tensor_is_watched_like_any_other():
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = PolarGrad([p], lr=torch.tensor(0.1))
    stepped(optimizer, p)
    optimizer.param_groups[0]["lr"].fill_(torch.nan)
    with pytest.raises(ConfigError, match="lr is nan"):
        stepped(optimizer, p)
    for several in ([0.1, 0.2], [0.1]):
        with pytest.raises(ConfigError, match=r"lr is tensor\(\[0.1.*expected a number, or a tensor without"):
            PolarGrad([p], lr=torch.tensor(several))


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(monkeypatch):
    p, q = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3, 3))
    optimizer = PolarGrad([p], lr=0.1)

    def refuse(*_):
        raise ConfigError("placed in a way that cannot be stepped")

    with monkeypatch.context() as patched:
        patched.setattr(optimizer._world, "add", refuse)
        with pytest.raises(ConfigError, match="cannot be stepped"):
            optimizer.add_param_group({"params": [q]})
    stepped(optimizer, p)
    assert len(optimizer.param_groups) == len(optimizer.state_dict()["param_groups"]) == 1
    optimizer.add_param_group({"params": [("q", q)]})
    stepped(optimizer, p, q)


def test_a_group_that_is_added_through_lightnings_wrapper_is_stepped():
    wrappers = pytest.importorskip("lightning.pytorch.core.optimizer")
    first, second = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    optimizer = PolarGrad([first], lr=0.1)
    stepped(optimizer, first)
    # What self.optimizers() returns: an object of a class derived from PolarGrad, with attributes of its own.
    wrappers.LightningOptimizer(optimizer).add_param_group({"params": [second], "lr": 0.1})
    stepped(optimizer, first, second)
    assert second.any()


def test_what_is_no_predicate_is_refused():
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = PolarGrad([p], lr=0.1)
    for wrong in (True, torch.tensor(1.0), torch.tensor([True])):
        with pytest.raises(ConfigError, match="expected a 0-d bool tensor"):
            optimizer.step(ok=wrong)


def test_autocast_around_the_step_changes_nothing():
    weights = []
    for enabled in (False, True):
        p = nn.Parameter(torch.arange(12.0).view(4, 3))
        optimizer = PolarGrad([p], lr=0.1, oracle="svd")
        p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.step()
        weights.append(p.detach())
    assert torch.equal(*weights)


def _few_tokens(rank: int, world: int) -> torch.Tensor:
    """A gradient of rank 2 in bf16, whose momentum an exact oracle must be given unrounded."""
    generator = torch.Generator().manual_seed(3)
    p = nn.Parameter(torch.randn(16, 16, generator=generator).bfloat16())
    other = nn.Parameter(torch.randn(16, 16, generator=generator).bfloat16())
    optimizer = PolarGradM([p, other], lr=0.1, beta=0.9, scale="none")
    for _ in range(3):
        for q in (p, other):
            q.grad = (
                torch.randn(16, 1, generator=generator) @ torch.randn(1, 16, generator=generator)
            ).bfloat16()
        optimizer.step()
    held = optimizer.full_state_dict()["state"][0]["low_bits"]
    return join_bf16(p.detach(), held.view(torch.int16).view(16, 16))


def test_momenta_of_bf16_weights_reach_an_exact_oracle_unrounded():
    one = _few_tokens(0, 1)
    for many in run_ranks(_few_tokens, 2):
        # Directions come back in bf16; noise would be of their own size
        assert (many - one).norm() <= 0.02 * 0.3 * 2**0.5


def _assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def _another_head(model: nn.Module) -> None:
    model[1] = nn.Linear(6, 5, bias=False)


@pytest.mark.parametrize("change", [_assigned, _another_head])
@pytest.mark.parametrize("config", [False, True])
def test_parameters_that_were_replaced_in_the_model_are_refused(change, config):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 6, bias=False))
    optimizer = PolarGrad.from_config(model, OptimizerConfig()) if config else PolarGrad(model)
    change(model)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ConfigError, match=r"(1\.weight was|0\.weight and 1 more were) replaced"):
        optimizer.step()


@pytest.mark.parametrize("change", [_assigned, _another_head, lambda model: weight_norm(model[1])])
def test_parameters_that_were_replaced_amid_a_run_are_refused_though_their_gradients_remain(change):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 6, bias=False))
    optimizer = PolarGrad(model)

    def step():
        # Unlike the optimizer's, it leaves the gradients of parameters that are no longer the model's.
        model.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    step()
    change(model)
    for _ in range(RATES_CHECKED - 1):
        step()
    with pytest.raises(ConfigError, match=r"(1\.weight was|0\.weight and 1 more were) replaced"):
        step()


def _unfrozen(model: nn.ModuleDict) -> nn.Module:
    return model["frozen"].requires_grad_(True)


def _beside(model: nn.ModuleDict) -> nn.Module:
    model["new"] = nn.Linear(4, 4, bias=False)
    return model["new"]


@pytest.mark.parametrize("change", [_unfrozen, _beside])
def test_a_module_that_was_taken_out_while_another_optimizer_trains_a_new_one_is_no_error(change):
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("used", "frozen", "aside")})
    model["frozen"].requires_grad_(False)
    optimizer = PolarGrad(model)
    del model["aside"]
    other = change(model)
    for _ in range(2):
        model["used"](other(torch.ones(2, 4))).sum().backward()
        before = model["used"].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(model["used"].weight, before)


@pytest.mark.parametrize("change", [_unfrozen, _beside])
@pytest.mark.parametrize("added", [False, True])
def test_parameters_that_train_nowhere_are_warned_of_once_unless_a_group_holds_them(change, added):
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("used", "frozen")})
    model["frozen"].requires_grad_(False)
    optimizer = PolarGrad(model)
    other = change(model)
    if added:
        optimizer.add_param_group({"params": list(other.parameters())})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(RATES_CHECKED + 1):
            optimizer.zero_grad()
            model["used"](other(torch.ones(2, 4))).square().sum().backward()
            optimizer.step()
    said = [str(w.message) for w in caught if "this optimizer does not train it" in str(w.message)]
    assert len(said) == (0 if added else 1)
    assert all(one.startswith(("frozen.weight has", "new.weight has")) for one in said)


def test_a_parameter_of_the_root_that_was_taken_out_is_not_replaced_by_one_elsewhere():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model.scale = nn.Parameter(torch.ones(4))
    optimizer = PolarGrad(model)
    del model.scale
    model.append(nn.Linear(4, 4, bias=False))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def test_a_module_that_was_taken_out_or_is_unused_is_no_error():
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("used", "idle", "aside")})
    optimizer = PolarGrad(model)
    del model["aside"]
    for _ in range(2):
        model["used"](torch.ones(2, 4)).sum().backward()
        before = model["used"].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(model["used"].weight, before)


def test_a_default_dtype_of_bf16_does_not_stop_the_count_of_steps():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = PolarGrad([{"params": [ours], "algorithm": "adamw", "betas": (0.9, 0.999), "lr": 1e-3}])
    finally:
        torch.set_default_dtype(torch.float32)
    torchs = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    for _ in range(400):
        ours.grad = torch.randn(3)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def _under_meta(rank: int, world: int) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with torch.device("meta"):
        optimizer = PolarGrad(model, hidden={"control": "hyperball", "scale": "none", "lr": 0.1})
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.full_state_dict())
        optimizer.stats()
    return model[0].weight.flatten().tolist()


def test_an_optimizer_that_was_built_in_inference_mode_steps_outside_it():
    params = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]
    with torch.inference_mode():
        matrix = {"params": params[:1], "momentum": "momentum_first", "lr": 0.1}
        optimizer = PolarGrad([matrix, {"params": params[1:], "algorithm": "adamw", "lr": 0.1}])
    stepped(optimizer, *params)
    assert all((p < 1).all() for p in params)


def test_a_default_device_is_not_the_optimizers():
    # As torch.set_default_device("cuda") around a whole program, whose small collectives are of host tensors.
    alone = _under_meta(0, 1)
    for many in run_ranks(_under_meta, 2, timeout=100):
        assert many == pytest.approx(alone, rel=1e-5)


def test_a_first_step_without_any_gradient_is_warned_of_once():
    model = nn.Linear(4, 4, bias=False)
    optimizer = PolarGrad(model.parameters(), lr=0.1)
    _assigned(model)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match="no parameter of the optimizer has a gradient on any rank") as said:
        optimizer.step()
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def _sharded_afterwards(rank: int, world: int, mode: str) -> str:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = PolarGrad(model)
    if mode == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif mode == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif rank == 1:
        _assigned(model)
    model(torch.ones(2, 8)).sum().backward()
    try:
        optimizer.step()
    except ConfigError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize("mode", ["fsdp2", "fsdp1", "one rank"])
def test_a_model_that_is_sharded_after_the_optimizer_was_built_is_refused_on_all_ranks(mode):
    said = run_ranks(_sharded_afterwards, 2, mode, timeout=100)
    assert "0.weight and 3 more were replaced in the model" in said[1]
    assert ("another rank cannot step" if mode == "one rank" else "3 more were replaced") in said[0]
