"""How matrices, weights and small agreements travel between ranks; knows no update rule.

Every collective here has a size and a place in the order that all ranks know beforehand: none depends on a gradient's
presence, on an empty shard or on who owns what. `Traffic` counts what was started, for tests and for ``stats()``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 renames the collectives on one tensor and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Started:
    """A collective on its way; its input is kept alive until it has been read."""

    out: torch.Tensor
    work: Any
    held: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """The result, once it has arrived."""
        if self.work is not None:
            self.work.wait()
        return self.out


class Traffic:
    """Starts collectives asynchronously, and counts calls and bytes of each kind since the last `clear`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    def all_to_all(
        self, x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Started:
        """Stretches of flat ``x`` to the group's ranks in turn, of so many elements; what they send comes back."""
        x = x.contiguous()
        self.calls["all_to_all"] += 1
        self.bytes["all_to_all"] += x.nbytes
        out = x.new_empty(sum(received))
        return Started(out, dist.all_to_all_single(out, x, received, sent, group=group, async_op=True), x)

    def all_gather(self, x: torch.Tensor, group: dist.ProcessGroup) -> Started:
        """``x`` of every rank of the group: (ranks, *x.shape)."""
        out = x.new_empty(group.size(), *x.shape)
        self.calls["all_gather"] += 1
        self.bytes["all_gather"] += out.nbytes
        return Started(out, _all_gather(out.view(-1), x.reshape(-1), group=group, async_op=True), x)

    def reduce_scatter(self, x: torch.Tensor, group: dist.ProcessGroup) -> Started:
        """The sum of row i of every rank's (ranks, n) at rank i."""
        out = x.new_empty(x.shape[1:])
        self.calls["reduce_scatter"] += 1
        self.bytes["reduce_scatter"] += x.nbytes
        return Started(out, _reduce_scatter(out.view(-1), x.view(-1), group=group, async_op=True), x)

    def reduce(self, x: torch.Tensor, dst: int, group: dist.ProcessGroup) -> Started:
        """The sum of ``x`` at one rank of the group, in place; elsewhere it is garbage."""
        self.calls["reduce"] += 1
        self.bytes["reduce"] += x.nbytes
        return Started(x, dist.reduce(x, group=group, group_dst=dst, async_op=True))

    def all_reduce(self, x: torch.Tensor, group: dist.ProcessGroup) -> Started:
        """The sum of ``x`` everywhere, in place."""
        self.calls["all_reduce"] += 1
        self.bytes["all_reduce"] += x.nbytes
        return Started(x, dist.all_reduce(x, group=group, async_op=True))

    def broadcast(self, x: torch.Tensor, src: int, group: dist.ProcessGroup) -> Started:
        """One rank's ``x`` everywhere, in place."""
        self.calls["broadcast"] += 1
        self.bytes["broadcast"] += x.nbytes
        return Started(x, dist.broadcast(x, group=group, group_src=src, async_op=True))


class Agreement:
    """Small collectives of host data over all ranks of the optimizer, which never wait for a GPU's queue.

    On GPUs they need gloo: where the group has it for CPU tensors it serves itself, else a twin of it is made here, with its
    timeout, so that construction is a collective.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group = group if device.type == "cpu" else _host_twin(group, device)
        self.size = dist.get_world_size(group)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum of a CPU tensor over all ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise sum of a CPU tensor over all ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """A CPU tensor of every rank, in the order of their ranks: (ranks, *x.shape)."""
        out = x.new_empty(self.size, *x.shape)
        _all_gather(out.view(-1), x.reshape(-1), group=self.group)
        return out

    def gather_objects(self, x: Any) -> list[Any]:
        """A picklable value of every rank."""
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, x, group=self.group)
        return out

    def same(self, x: torch.Tensor) -> torch.Tensor:
        """For each element of a CPU tensor, whether all ranks have the same value."""
        extremes = self.largest(torch.stack([x, -x]))
        return extremes[0] == -extremes[1]


def _host_twin(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """The group itself where gloo serves its CPU tensors, as with "cpu:gloo,cuda:nccl"; else one of the same ranks."""
    try:
        if group._get_backend(torch.device("cpu")).name() == "gloo":
            return group
    except RuntimeError:  # it has no backend for CPU tensors
        pass
    backend = group._get_backend(device)
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    ranks = dist.get_process_group_ranks(group)
    return group_of_its_ranks(ranks, timeout if isinstance(timeout, timedelta) else None, "gloo")


def group_of_its_ranks(
    ranks: list[int], timeout: timedelta | None = None, backend: str | None = None
) -> dist.ProcessGroup:
    """A new group that its own ranks make, without the others.

    Where init_process_group was given a ``device_id`` NCCL would split it off the default group, which takes all ranks.
    """
    default = dist.group.WORLD
    assert default is not None
    bound = default.bound_device_id
    default.bound_device_id = None
    try:
        return dist.new_group(ranks, timeout, backend, use_local_synchronization=True)
    finally:
        default.bound_device_id = bound


def pack_triangle(s: torch.Tensor) -> torch.Tensor:
    """A symmetric n x n matrix as n(n+1)/2 elements: two triangles side by side, as LAPACK's rectangular full packed."""
    n = s.shape[0]
    half = (n + 1) // 2
    odd = n % 2
    packed = s.new_zeros(n + 1 - odd, half)
    packed[1 - odd :] = s[:, :half].tril()
    packed[: n - half, odd:] += s[half:, half:].triu()
    return packed.view(-1)


def unpack_triangle(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The symmetric matrix that `pack_triangle` packed."""
    half = (n + 1) // 2
    odd = n % 2
    packed = packed.view(n + 1 - odd, half)
    s = packed.new_zeros(n, n)
    s[:, :half] = packed[1 - odd :].tril()
    s[half:, half:] = packed[: n - half, odd:].triu().T
    return s + s.tril(-1).T
