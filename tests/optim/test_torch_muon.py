"""What the comparison page says of torch's own Muon under FSDP2, on two processes."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from tests.gloo import run_ranks


def two_steps(rank, world):
    """Largest difference of weights from one process's, and the all-gathers of a step for one 16 x 24 matrix."""
    torch.manual_seed(0)
    sharded, whole = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)
    whole.load_state_dict(sharded.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    inputs = torch.randn(8, 24)
    optimizers = [(model, torch.optim.Muon(model.parameters(), lr=0.1)) for model in (sharded, whole)]
    for _ in range(2):
        for model, optimizer in optimizers:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            with CommDebugMode() as collectives:
                optimizer.step()
            if model is sharded:
                counts = {str(name): count for name, count in collectives.get_comm_counts().items()}
    gathers = sum(count for name, count in counts.items() if "all_gather" in name)
    moved = (whole.weight - sharded.weight.full_tensor()).abs().max().item()
    return moved, gathers


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in torch 2.9")
def test_torchs_muon_is_right_under_fsdp2_and_gathers_in_every_newton_schulz_step():
    for difference, gathers in run_ranks(two_steps, 2):
        assert difference < 1e-6
        # Three products in each of five steps; other versions of torch may plan them otherwise.
        assert gathers == 15 if torch.__version__.startswith("2.13") else gathers >= 5
