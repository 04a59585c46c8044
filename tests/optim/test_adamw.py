"""AdamW here against torch's own, for shapes, ranks and gradients that are not contiguous in memory."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from polargrad_dist.optim import PolarGrad
from tests.gloo import run_ranks

# Large enough for optimizer shards; of the first the columns divide more evenly, as of GPT-2's table of 50257 x 768.
SHAPES = [(3, 24_000), (24_000, 3), (5, 4, 4_000)]


def _off(shape: tuple[int, ...], order: str, dtype: torch.dtype = torch.float64) -> float:
    """The largest difference of weights from torch's AdamW after two steps with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator))
    q = nn.Parameter(p.detach().clone())
    ours = PolarGrad([p], lr=0.1, algorithm="adamw")
    theirs = torch.optim.AdamW([q], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(2):
        grad = torch.randn(shape, dtype=dtype, generator=generator)
        q.grad = grad
        p.grad = {
            "contiguous": grad.clone(),
            "transposed": grad.movedim(0, -1).contiguous().movedim(-1, 0),
            "strided": torch.stack([grad, grad], -1)[..., 0],
        }[order]
        ours.step()
        theirs.step()
    return float((p - q).detach().abs().max())


def _on_rank(rank: int, world: int) -> dict[str, float]:
    assert dist.get_world_size() == world
    return {f"{shape} {order}": _off(shape, order) for shape in SHAPES for order in ("contiguous", "strided")}


@pytest.mark.parametrize("world", [2, 3])
def test_on_several_ranks_adamw_is_torchs_own_whichever_way_a_parameter_is_cut(world):
    for found in run_ranks(_on_rank, world, timeout=60):
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("order", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 24_000)])
def test_a_gradient_counts_by_its_values_however_it_lies_in_memory(shape, order):
    assert _off(shape, order) < 1e-12
