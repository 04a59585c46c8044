"""Distributed setup: rank, device and process group of this process.

Reads what torchrun, ``deepspeed``, ``accelerate launch`` (RANK, …) or ``srun`` (SLURM_PROCID, …) set; a single process makes
no group.
"""

from __future__ import annotations

import os
import random
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.launcher import refuse_lone_process
from polargrad_dist.trainer.network import prepare
from polargrad_dist.trainer.watch import Watch, store_of_launcher

T = TypeVar("T")
# The private range (RFC 6335), above the ports that Linux hands out to outgoing connections.
FIRST_PORT, PORTS = 61000, 4500


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process.

    ``host`` is a gloo group for data in host memory, also the optimizer's; ``watch`` ends this rank when it has waited too
    long.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: dist.ProcessGroup | None = None
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def at(self, where: str) -> None:
        """Records where the run is, at the same places on every rank: the error about a slow rank names its last place."""
        if self.watch is not None:
            self.watch.at(where)

    def meanwhile(self, doing: str, fn: Callable[[], T]) -> T | None:
        """``fn()`` on rank 0; the other ranks wait for it and return None. The only wait that may exceed the limit."""
        self.at(doing)
        if self.watch is None:
            return fn() if self.is_main else None
        key = f"over {self.watch.places}"
        if not self.is_main:
            self.watch.wait_for_rank_0(key, doing, tell=self.local_rank == 0 or self.rank == 1)
            return None
        try:
            return fn()
        finally:
            self.watch.tell(key)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, through host memory."""
        if self.host is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def together(self, fn: Callable[[], Any]) -> Any:
        """Runs ``fn`` on every rank; an error on one rank is raised on all."""
        result, error = None, None
        try:
            result = fn()
        except Exception as caught:
            error = caught
        errors = [e for e in self.gather(error) if e is not None]
        if errors:
            raise error or errors[0]
        return result

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def close(self) -> None:
        if self.watch is not None:
            self.watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def launched() -> tuple[int, int, int]:
    """(rank, world size, local rank) as the launcher set them; (0, 1, 0) without one.

    Raises ``ConfigError`` when a launcher set only some of its variables.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # srun: one task per GPU. The batch script gives the address of the first node. (A batch script itself has
        # SLURM_NTASKS too, but is no task of a step.)
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ.setdefault("MASTER_ADDR", socket.gethostname())
        os.environ.setdefault(
            "MASTER_PORT", str(FIRST_PORT + int(os.environ.get("SLURM_JOB_ID", "0")) % PORTS)
        )
    if "RANK" not in os.environ:
        refuse_lone_process()
        return 0, 1, 0
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"RANK is set but {missing[0]} is not, expected both: start with torchrun, or unset RANK"
        )
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise ConfigError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error}): start with torchrun"
        ) from error
    if not 0 <= rank < size:
        raise ConfigError(
            f"RANK is {rank} with WORLD_SIZE {size}, expected 0 to {size - 1}: start with torchrun"
        )
    return rank, size, local_rank


def join(device: str = "auto", timeout_minutes: float = 10.0) -> World:
    """Joins the launcher's process group and selects this rank's device.

    Raises ``ConfigError`` if the requested device does not exist.
    """
    rank, size, local_rank = launched()
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device is 'cuda', but torch sees no GPU: set it to 'auto' or 'cpu'")
    use_gpu = torch.cuda.is_available() and device != "cpu"
    if use_gpu and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own, {torch.cuda.device_count()} are visible: start at most one "
            "process per GPU (torchrun --nproc_per_node, srun --ntasks-per-node)"
        )
    here = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    prepare(size, use_gpu)
    if use_gpu:
        torch.cuda.set_device(here)
    if size == 1:
        return World(device=here)
    timeout = timedelta(minutes=timeout_minutes)
    # The flight recorder, which shows where each rank waited
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=here if use_gpu else None,
    )
    limit = timeout.total_seconds()
    world = World(rank, size, local_rank, here, dist.group.WORLD)
    start = world.gather(uuid.uuid4().hex)[0]
    return replace(world, watch=Watch(store_of_launcher(size, limit, start), rank, size, limit))


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, all devices."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
