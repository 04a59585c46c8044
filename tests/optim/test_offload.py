"""FSDP2 with `CPUOffloadPolicy`: on CPUs offloading moves nothing, so that every number has to stay as it is."""

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from polargrad_dist.optim import PolarGrad
from tests.gloo import run_ranks
from tests.optim.bag import Bag, groups
from tests.optim.training import backward, whole

BAG = {"shapes": {"square": (8, 8), "tall": (50, 4), "bias": (7,)}}


def _offloaded(rank: int, world: int, offload: bool) -> dict:
    # Pinned memory needs a GPU.
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}

    def build() -> tuple[Bag, PolarGrad]:
        model = Bag(**BAG)
        fully_shard(model, **options)
        return model, PolarGrad(groups(model, momentum="momentum_first", oracle="svd"))

    def stepped(model: Bag, optimizer: PolarGrad, steps: range) -> list[float]:
        norms = []
        for step in steps:
            optimizer.zero_grad()
            backward("fsdp", model, optimizer, rank, world, step)
            norms.append(float(optimizer.clip_grad_norm_(0.5)))
            optimizer.step()
        return norms

    model, optimizer = build()
    norms = stepped(model, optimizer, range(2))
    again, other = build()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.full_state_dict())
    norms += stepped(again, other, range(2, 4))
    stepped(model, optimizer, range(2, 4))
    return {
        "norms": norms,
        "resumed": [whole(p) for p in again.parameters()],
        "straight": [whole(p) for p in model.parameters()],
        "devices": {str(v.device) for _, _, v in other._states()},
    }


def test_offloaded_parameters_are_stepped_clipped_and_resumed_as_others_are():
    plain, offloaded = (run_ranks(_offloaded, 2, offload)[0] for offload in (False, True))
    assert offloaded["norms"] == plain["norms"]
    for a, b, c in zip(plain["straight"], offloaded["straight"], offloaded["resumed"], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert offloaded["devices"] == {"cpu"}
