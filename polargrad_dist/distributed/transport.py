"""How matrices, updates and small agreements travel between ranks; knows no update rule.

Every collective here has a size and a place in the order that all ranks know beforehand: none depends on a gradient's
presence, on an empty shard or on who owns what. `Traffic` counts what was started, for tests and for ``stats()``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from polargrad_dist.distributed.grid import Grid

# torch 2.13 renames the collectives on one tensor and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Traffic:
    """Starts collectives asynchronously, and counts calls and bytes of each kind since the last `clear`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    def _count(self, kind: str, size: int) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += size

    def all_to_all(
        self, x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, Any]:
        self._count("all_to_all", x.nbytes)
        out = x.new_empty(sum(received))
        return out, dist.all_to_all_single(out, x, received, sent, group=group, async_op=True)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup) -> Any:
        self._count("all_gather", out.nbytes)
        return _all_gather(out, x, group=group, async_op=True)

    def reduce(self, x: torch.Tensor, dst: int, group: dist.ProcessGroup) -> Any:
        self._count("reduce", x.nbytes)
        return dist.reduce(x, group=group, group_dst=dst, async_op=True)

    def all_reduce(self, x: torch.Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> Any:
        self._count("all_reduce", x.nbytes)
        return dist.all_reduce(x, op, group=group, async_op=True)

    def broadcast(self, x: torch.Tensor, src: int, group: dist.ProcessGroup) -> Any:
        self._count("broadcast", x.nbytes)
        return dist.broadcast(x, group=group, group_src=src, async_op=True)


def wait(work: Any) -> None:
    """Waits for a collective; work is None where there was nobody to talk to."""
    if work is not None:
        work.wait()


class Agreement:
    """Small all-reduces of host data over all ranks, which never wait for a GPU's queue.

    On GPUs they run on gloo groups made here beside the NCCL ones, so construction is a collective.
    """

    def __init__(self, grids: Sequence[Grid], device: torch.device):
        widest = max(grids, key=lambda grid: (grid.world, len(grid.groups)))
        twins = {group: group if device.type == "cpu" else _host_twin(group) for group in widest.groups}
        self.groups = list(twins.values())
        self._copies = [] if widest.replicate is None else [twins[widest.replicate]]

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum of a CPU tensor over all ranks, in place."""
        for group in self.groups:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
        return x

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise sum of a CPU tensor over all ranks, in place."""
        for group in self.groups:
            dist.all_reduce(x, group=group)
        return x

    def same(self, x: torch.Tensor) -> torch.Tensor:
        """For each element of a CPU tensor, whether all ranks have the same value."""
        return self.largest(x.clone()) == -self.largest(-x)

    def same_copies(self, x: torch.Tensor, everywhere: torch.Tensor) -> torch.Tensor:
        """The same for figures of copies: of whole ones where ``everywhere``, elsewhere of the shards that are copies of
        each other. All ranks get one answer."""
        high, low = x.clone(), -x
        for group in self._copies:
            for extreme in (high, low):
                dist.all_reduce(extreme, dist.ReduceOp.MAX, group=group)
        differ = torch.where(everywhere, ~self.same(x), high != -low)
        return self.largest(differ.int()) == 0


def _host_twin(group: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


class Exchange:
    """Whole matrices from their shards to their owners, and results back: two all-to-alls among one replica's ranks.

    ``rounds[s]`` are the numbers of elements that the shard rank ``s`` computes in this round, matrix by matrix, as
    ``sizes[s][i][t]``: what rank t holds of matrix i of owner s.
    """

    def __init__(self, grid: Grid, traffic: Traffic, sizes: list[list[list[int]]]):
        self.grid, self.traffic, self.sizes = grid, traffic, sizes
        here = grid.shard
        self.sent = [sum(matrix[here] for matrix in owned) for owned in sizes]
        self.received = [sum(matrix[t] for matrix in sizes[here]) for t in range(grid.shards)]

    def send(self, locals_: torch.Tensor) -> None:
        """Starts sending: ``locals_`` (sum of ``sent``) are this rank's pieces in order of owner and matrix."""
        assert self.grid.sharding is not None
        self._out, self._work = self.traffic.all_to_all(locals_, self.sent, self.received, self.grid.sharding)

    def matrices(self) -> torch.Tensor:
        """Waits, and puts this rank's own matrices (all of one size) together: (k, numel)."""
        self._work.wait()
        owned = self.sizes[self.grid.shard]
        if not owned:
            return self._out.view(0, 0)
        stack = self._out.new_empty(len(owned), sum(owned[0]))
        self._each_piece(owned, self._out, stack, lambda piece, place: place.copy_(piece))
        return stack

    def send_back(self, stack: torch.Tensor) -> None:
        """Starts returning: the results (k, numel) for the matrices that `matrices` gave."""
        assert self.grid.sharding is not None
        flat = stack.new_empty(sum(self.received))
        self._each_piece(self.sizes[self.grid.shard], flat, stack, lambda piece, place: piece.copy_(place))
        self._out, self._work = self.traffic.all_to_all(flat, self.received, self.sent, self.grid.sharding)

    def results(self) -> torch.Tensor:
        """Waits, and gives this rank's pieces of all results, in the order of `send`."""
        self._work.wait()
        return self._out

    def _each_piece(
        self, owned: list[list[int]], flat: torch.Tensor, stack: torch.Tensor, do: Callable
    ) -> None:
        at = 0
        for t in range(self.grid.shards):
            for row, matrix in zip(stack, owned, strict=True):
                first = sum(matrix[:t])
                do(flat[at : at + matrix[t]], row[first : first + matrix[t]])
                at += matrix[t]


class UpdateStream:
    """All-gathers what each replica has worked out, in equal chunks that start as soon as they are full.

    A chunk may begin and end inside a matrix: updates are elementwise, so each arriving stretch is applied at once and
    nothing waits for a whole. Every rank, the author included, applies the bytes that came out of the collective.
    ``segments[r]`` lists what replica r writes, in its order: (key, first, last) ranges of local elements.
    """

    def __init__(
        self,
        grid: Grid,
        traffic: Traffic,
        segments: list[list[tuple[Any, int, int]]],
        chunk: int,
        like: torch.Tensor,
        apply: Callable[[Any, int, int, torch.Tensor], None],
    ):
        assert grid.replicate is not None
        self.grid, self.traffic, self.apply = grid, traffic, apply
        self.length = max(sum(last - first for _, first, last in own) for own in segments)
        self.chunk = max(1, min(chunk, self.length))
        self._readers = [_Reader(own) for own in segments]
        self._like, self._filled, self._left = like, 0, self.length
        self._buffer: torch.Tensor | None = None
        self._flying: list[tuple[torch.Tensor, torch.Tensor, Any]] = []

    def write(self, values: torch.Tensor) -> None:
        """Appends this replica's next values (any shape), cast to the type in which updates travel."""
        values = values.reshape(-1)
        while values.numel():
            if self._buffer is None:
                self._buffer = self._like.new_empty(min(self.chunk, self._left))
            room = min(values.numel(), self._buffer.numel() - self._filled)
            self._buffer[self._filled : self._filled + room].copy_(values[:room])
            values, self._filled = values[room:], self._filled + room
            if self._filled == self._buffer.numel():
                self._launch()

    def finish(self) -> None:
        """Pads to the longest replica's length, and applies what is still on its way."""
        while self._left:
            self._buffer = (
                self._like.new_zeros(min(self.chunk, self._left)) if self._buffer is None else self._buffer
            )
            self._buffer[self._filled :].zero_()
            self._launch()
        while self._flying:
            self._land()

    def _launch(self) -> None:
        buffer, self._buffer, self._filled = self._buffer, None, 0
        assert buffer is not None
        assert self.grid.replicate is not None
        out = buffer.new_empty(self.grid.replicas, buffer.numel())
        self._flying.append((out, buffer, self.traffic.all_gather(out.view(-1), buffer, self.grid.replicate)))
        self._left -= buffer.numel()
        if len(self._flying) > 1:  # one chunk on its way while the next is computed: two chunks of memory
            self._land()

    def _land(self) -> None:
        out, _, work = self._flying.pop(0)
        work.wait()
        for reader, values in zip(self._readers, out, strict=True):
            reader.take(values, self.apply)


class _Reader:
    """Walks one replica's segments as its values arrive; what comes after the last one is padding."""

    def __init__(self, segments: list[tuple[Any, int, int]]):
        self.segments = iter(segments)
        self.current: tuple[Any, int, int] | None = next(self.segments, None)

    def take(self, values: torch.Tensor, apply: Callable[[Any, int, int, torch.Tensor], None]) -> None:
        while values.numel() and self.current is not None:
            key, first, last = self.current
            count = min(values.numel(), last - first)
            if count:
                apply(key, first, first + count, values[:count])
            values = values[count:]
            self.current = (key, first + count, last) if first + count < last else next(self.segments, None)


def reduce_to(x: torch.Tensor, owner: tuple[int, int], grid: Grid, traffic: Traffic) -> Any:
    """Sums ``x`` over the grid at the owner's place (replica, shard), in place there; elsewhere x is garbage after.

    Returns the work of the last stage; on a two-dimensional grid the first stage has been waited for.
    """
    replica, shard = owner
    work = None
    if grid.sharding is not None:
        work = traffic.reduce(x, shard, grid.sharding)
        if grid.replicate is not None:
            work.wait()
    if grid.replicate is not None and grid.shard == shard:
        work = traffic.reduce(x, replica, grid.replicate)
    return work


def broadcast_from(x: torch.Tensor, owner: tuple[int, int], grid: Grid, traffic: Traffic) -> Any:
    """Gives every rank of the grid the owner's ``x``, bit for bit, in place; returns the last stage's work."""
    replica, shard = owner
    work = None
    if grid.replicate is not None and grid.shard == shard:
        work = traffic.broadcast(x, replica, grid.replicate)
        if grid.sharding is not None:
            work.wait()
    if grid.sharding is not None:
        work = traffic.broadcast(x, shard, grid.sharding)
    return work


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
