"""What a process sets up before and around the model: descriptors, network cards, groups, wrappers."""

import os
import resource
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from polargrad_dist.distributed.teams import Groups
from polargrad_dist.distributed.transport import Agreement
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer import World, network
from polargrad_dist.trainer.config import StrategyConfig
from polargrad_dist.trainer.strategies import place
from tests.gloo import run_ranks
from tests.trainer.toy import settings, trainer

CARDS = ["lo", "eth0", "eth1", "ib0", "ib1", "docker0"]


@pytest.mark.parametrize(
    ("wish", "card"),
    [
        ("eth1", "eth1"),
        ("ib", "ib0"),
        ("=ib1", "ib1"),
        ("=ib", None),
        ("^docker,eth", "ib0"),
        ("^=eth0", "eth1"),
        ("ib1:1", "ib1"),
        ("wlan,ib", "ib0"),
        ("wlan", None),
    ],
)
def test_gloo_takes_the_network_card_that_nccl_was_given(wish, card):
    assert network.gloo_interfaces(wish, CARDS) == card


def test_the_environment_is_completed_and_what_it_says_is_kept(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=lo")
    network.prepare(2, gpu=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "other")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    network.prepare(2, gpu=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "other"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nonsense")
    with pytest.raises(ConfigError, match="'nonsense', which names no network card"):
        network.prepare(2, gpu=False)


LIMITED = """
import resource, sys
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.network import make_room_for_connections
resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[2])))
try:
    make_room_for_connections(int(sys.argv[1]))
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except ConfigError as error:
    print(error)
"""


def test_the_limit_of_open_files_is_raised_for_many_ranks_or_the_error_says_to_what():
    def told(ranks: int, hard: int) -> str:
        run = [sys.executable, "-c", LIMITED, str(ranks), str(hard)]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    assert told(330, 4096) == str(network.MESHES * 333 + network.OTHERS)
    assert "may open 1,024 files, expected 1,588 for 330 ranks" in told(330, 1024)


def _some_make_a_group(rank: int, world: int):
    """As after init_process_group(device_id=...) on GPUs, where NCCL would split the group off one of all ranks."""
    dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
    if rank < 2:
        group = Groups().of([0, 1])
        x = torch.ones(1)
        dist.all_reduce(x, group=group)
        assert dist.group.WORLD.bound_device_id == torch.device("cuda", 0)
        return float(x), group.bound_device_id
    return None


def test_a_group_of_some_ranks_is_made_without_the_others_though_a_device_is_bound():
    assert run_ranks(_some_make_a_group, 3, timeout=30.0) == [(2.0, None), (2.0, None), None]


def _groups(rank: int, world: int, folder: str) -> tuple[int, bool]:
    here = World(rank, world, rank, torch.device("cpu"), dist.group.WORLD)
    t = trainer(settings(folder, steps=1), here)
    shared = Agreement(dist.group.WORLD, torch.device("meta")).group is dist.group.WORLD
    return len(dist.distributed_c10d._world.pg_map), shared and t.optimizer.agreement.group is here.host


def test_trainer_and_optimizer_share_one_group_and_checkpoints_have_the_other(tmp_path):
    assert run_ranks(_groups, 2, str(tmp_path)) == [(2, True)] * 2


def _ddp(rank: int, world: int, folder: str) -> bool:
    here = World(rank, world, rank, torch.device("cpu"), dist.group.WORLD)
    t = trainer(settings(folder, steps=1), here)
    t.fit()
    assert not t.placed.model.broadcast_buffers
    storages = {p.grad.untyped_storage().data_ptr() for p in t.bare.parameters()}
    return len(storages) == 1


def test_gradients_lie_in_the_buckets_that_ddp_reduces(tmp_path):
    assert run_ranks(_ddp, 2, str(tmp_path)) == [True, True]


def _fsdp(rank: int, world: int, folder: str) -> bool:
    here = World(rank, world, rank, torch.device("cpu"), dist.group.WORLD)
    t = trainer(settings(folder, steps=1, strategy=StrategyConfig("fsdp")), here)
    model = t.placed.model
    with torch.no_grad():
        model(*next(t.data.validation.batches()))
    gathered = [not isinstance(p, DTensor) for p in model.parameters()]
    t.evaluate()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    # The root's own alone
    return any(gathered) and not all(gathered)


def test_fsdps_root_stays_gathered_between_forward_and_backward_but_not_after_an_evaluation(tmp_path):
    assert run_ranks(_fsdp, 2, str(tmp_path)) == [True, True]


@pytest.mark.parametrize(("tf32", "precision"), [(False, "highest"), (True, "high")])
def test_tf32_is_what_the_configuration_says(monkeypatch, tmp_path, tf32, precision):
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    model = torch.nn.Linear(2, 2)
    place(model, settings(tmp_path, tf32=tf32), World(device=torch.device("cpu")), False)
    assert said == []
    monkeypatch.setattr(model, "to", lambda device: model)
    place(model, settings(tmp_path, tf32=tf32), World(device=torch.device("cuda", 0)), False)
    assert said == [precision]


def test_batches_are_pinned_by_a_process_that_uses_a_gpu_and_on_its_own(monkeypatch):
    from tests.data.test_loader import loader

    pinned, chosen = [], []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda x: pinned.append(threading.current_thread().name) or x
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    next(loader().batches())
    # A GPU is there, but this run is on the CPU
    assert pinned == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: chosen.append((threading.current_thread().name, d))
    )
    batches = loader(prefetch=2).batches()
    next(batches)
    batches.close()
    assert chosen == [("loader", 3)]
    assert set(pinned) == {"loader"}


def test_nobody_asks_for_the_limit_where_it_is_high_enough(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("raised without need"))
    network.make_room_for_connections(512)
