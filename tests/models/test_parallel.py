"""The models under DDP and FSDP2 on two real processes, their blocks compiled and checkpointed."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.gloo import run_ranks
from tests.models.tiny import ALL, awake, tiny


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 95, (2, 40), generator=torch.Generator().manual_seed(5))
    return tokens, tokens.roll(-1, 1)


def gradients(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    model(tokens, targets).backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert all(g is not None for g in grads.values())
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def _sharded(model: nn.Module) -> nn.Module:
    for unit in [*model.blocks, *getattr(model, "tables", [])]:
        fully_shard(unit)
    return fully_shard(model)


def _on_ranks(rank: int, world: int) -> float:
    """The largest difference of any gradient element from one process's."""
    tokens, targets = batch()
    mine = slice(rank, rank + 1)
    worst = 0.0
    for architecture in ALL:
        alone = gradients(awake(tiny(architecture)), tokens, targets)
        for place in (DistributedDataParallel, _sharded):
            grads = gradients(place(awake(tiny(architecture))), tokens[mine], targets[mine])
            assert grads.keys() == alone.keys()
            worst = max(worst, *(float((grads[name] - alone[name]).abs().max()) for name in alone))
    return worst


def _mixed_types(rank: int, world: int) -> bool:
    """Embedding tables in bf16, as on a GPU, the rest in fp32."""
    model = awake(tiny("gpt2-small"))
    for table in model.tables:
        table.bfloat16()
    tokens, targets = batch()
    grads = gradients(_sharded(model), tokens, targets)
    return all((g.dtype == torch.bfloat16) == ("embed" in name) for name, g in grads.items())


def test_two_ranks_have_the_gradient_of_one_process_under_ddp_and_fsdp2():
    differences = run_ranks(_on_ranks, 2)
    assert max(differences) < 1e-5


def test_tables_in_bf16_shard_on_their_own_under_fsdp2():
    assert run_ranks(_mixed_types, 2) == [True, True]


@pytest.mark.parametrize("architecture", ALL)
def test_checkpointed_and_compiled_blocks_give_the_same_gradient(architecture):
    tokens, targets = batch()
    plain = gradients(awake(tiny(architecture)), tokens, targets)
    model = awake(tiny(architecture))
    names = [name for name, _ in model.named_parameters()]
    torch._dynamo.reset()
    model.checkpoint_blocks()
    model.compile_blocks(backend="aot_eager")
    both = gradients(model, tokens, targets)
    torch._dynamo.reset()
    assert list(both) == names
    for name in names:
        torch.testing.assert_close(both[name], plain[name])
