"""Sends matrices, weights and small agreements between ranks; knows no update rule.

All ranks know the size and order of every collective in advance: neither depends on which gradients exist, on empty shards
or on who owns what. `Traffic` counts what was started, for tests and for ``stats()``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from polargrad_dist.distributed.layout import Cut3, Split, overlap, slices, volume
from polargrad_dist.distributed.plan import NUMBERS

# torch 2.13 renames the collectives on one tensor and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Started:
    """A collective in flight; its input is kept alive until it has been read."""

    out: torch.Tensor
    work: Any
    held: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """The result, once it has arrived."""
        if self.work is not None:
            self.work.wait()
        return self.out


class Traffic:
    """Starts collectives asynchronously, and counts the calls and bytes of each kind since the last `clear`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    def all_to_all(
        self, x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Started:
        """Sends consecutive parts of flat ``x``, of the given sizes, to the group's ranks; returns what they send."""
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
        """At rank i, the sum of row i of every rank's (ranks, n)."""
        out = x.new_empty(x.shape[1:])
        self.calls["reduce_scatter"] += 1
        self.bytes["reduce_scatter"] += x.nbytes
        return Started(out, _reduce_scatter(out.view(-1), x.view(-1), group=group, async_op=True), x)

    def reduce(self, x: torch.Tensor, dst: int, group: dist.ProcessGroup) -> Started:
        """At one rank of the group, the sum of ``x``, in place; undefined on the others."""
        self.calls["reduce"] += 1
        self.bytes["reduce"] += x.nbytes
        return Started(x, dist.reduce(x, group=group, group_dst=dst, async_op=True))

    def all_reduce(self, x: torch.Tensor, group: dist.ProcessGroup) -> Started:
        """On all ranks, the sum of ``x``, in place."""
        self.calls["all_reduce"] += 1
        self.bytes["all_reduce"] += x.nbytes
        return Started(x, dist.all_reduce(x, group=group, async_op=True))

    def broadcast(self, x: torch.Tensor, src: int, group: dist.ProcessGroup) -> Started:
        """On all ranks, one rank's ``x``, in place."""
        self.calls["broadcast"] += 1
        self.bytes["broadcast"] += x.nbytes
        return Started(x, dist.broadcast(x, group=group, group_src=src, async_op=True))


class Exchange:
    """Exchanges the matrices of a bucket between the shards of all ranks and the owners, in both directions.

    ``boxes`` are the shards of each rank of the group within every item of the bucket, as ranges of (slice, row, column),
    ``owned`` the matrices that each owns: (item, number within ``split``). ``rank`` is this rank's index in both. Shards are
    stacked: (items, slices, rows, columns). Pieces are sent rank by rank, in the order of the matrices at their owner.
    """

    def __init__(
        self,
        traffic: Traffic,
        group: dist.ProcessGroup | None,
        split: Split,
        owned: Sequence[list[tuple[int, int]]],
        boxes: Sequence[Cut3],
        rank: int,
    ):
        self.traffic, self.group, self.split = traffic, group, split
        self.owned, mine, here = owned, owned[rank], boxes[rank]
        self.shapes = [split.stored_shape(j) for _, j in mine]
        # The same pieces are sent to owners and back: this rank's part of each matrix, each rank's part of those owned here.
        parts = [[(i, overlap(here, split.matrices[j])) for i, j in own] for own in owned]
        self.pieces = [[(i, slices(part)) for i, part in own] for own in parts]
        self.here = self.pieces[rank]
        self.gaps = [[overlap(split.matrices[j], box) for _, j in mine] for box in boxes]
        self.sent = [sum(volume(part) for _, part in own) for own in parts]
        self.received = [sum(map(volume, cuts)) for cuts in self.gaps]
        # Bytes that each owner sends in addition to its directions.
        self.numbers = [8 * NUMBERS * len(own) for own in owned]
        axes = [axis for axis in range(3) if len({box[axis] for box in boxes}) > 1]
        in_turn = [ij for own in owned for ij in own]
        # If true, all pieces have one shape and come in rank order, and moving one dimension assembles them.
        self.even = (
            len({tuple(b - a for a, b in box) for box in boxes}) == 1
            and list(boxes) == sorted(boxes)
            and in_turn == [(i, 0) for i in range(len(in_turn))]
            and len(split.matrices) == len(axes) == 1
        )
        self.axis = axes[0] if axes else 0
        self.piece = [b - a for a, b in here][1:]
        # Whether shards with whole matrices consist of consecutive matrices of one shape.
        self.in_a_row = (
            bool(mine) and len(split.runs) == 1 and not (split.transposed and split.runs[0][1] > 1)
        )

    def to_owners(self, A: torch.Tensor) -> Started:
        """Starts sending this rank's pieces of all matrices, from its shards A."""
        if self.even:
            flat = A.reshape(-1)
        else:
            flat = A.new_empty(sum(self.sent))
            _copy(flat, [A[i][cut] for own in self.pieces for i, cut in own], into_views=False)
        assert self.group is not None
        return self.traffic.all_to_all(flat, self.sent, self.received, self.group)

    def matrices(self, received: torch.Tensor) -> list[torch.Tensor]:
        """Assembles the matrices owned here, those of one shape as (k, m, n), in at least fp32."""
        wide = torch.promote_types(received.dtype, torch.float32)
        if self.even:
            parts = received.view(len(self.gaps), len(self.shapes), *self.piece).movedim(0, self.axis)
            return [parts.reshape(len(self.shapes), self.split.rows, self.split.cols).to(wide)]
        batches = self._room(received)
        _copy(received, self._gap_views(batches), into_views=True)
        return [batch.to(wide) for batch in batches]

    def to_shards(self, D: list[torch.Tensor], numbers: torch.Tensor) -> Started:
        """Starts sending each rank its pieces of the directions D, after this owner's numbers (matrices, NUMBERS)."""
        bits, ranks = numbers.reshape(-1).view(D[0].dtype), len(self.gaps)
        if self.even:
            stored = D[0].flatten(1).unsqueeze(-1) if self.split.flattened else D[0]
            parts = stored.unflatten(self.axis, (ranks, -1)).movedim(self.axis, 0).reshape(ranks, -1)
            flat = torch.cat([bits.expand(ranks, -1), parts], 1).view(-1)
        else:
            flat, views = D[0].new_empty(ranks * len(bits) + sum(self.received)), self._gap_views(D)
            count = len(self.shapes)
            pieces = [x for k in range(ranks) for x in (bits, *views[k * count : (k + 1) * count])]
            _copy(flat, pieces, into_views=False)
        size = bits.element_size()
        back = [count // size + sent for count, sent in zip(self.numbers, self.sent, strict=True)]
        given = [len(bits) + received for received in self.received]
        assert self.group is not None
        return self.traffic.all_to_all(flat, given, back, self.group)

    def shards(self, received: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's shards of the directions, and the numbers of all matrices in the order of their owners."""
        size = received.element_size()
        sizes = [
            n for count, sent in zip(self.numbers, self.sent, strict=True) for n in (count // size, sent)
        ]
        stretches = received.split(sizes)
        numbers = torch.cat(stretches[::2]).view(torch.float64).view(-1, NUMBERS)
        if self.even:
            return torch.cat(stretches[1::2]).view(shape), numbers
        D = received.new_empty(shape)
        for own, stretch in zip(self.pieces, stretches[1::2], strict=True):
            _copy(stretch, [D[i][cut] for i, cut in own], into_views=True)
        return D, numbers

    def whole_here(self, A: torch.Tensor) -> list[torch.Tensor]:
        """The matrices of shards that hold them whole, as from `matrices`: views if they are consecutive."""
        if self.in_a_row:
            return [A.reshape(-1, *self.shapes[0])]
        batches = self._room(A)
        if self.here:
            matrices = [m for batch in batches for m in batch]
            torch._foreach_copy_(matrices, [A[i][cut].squeeze(0) for i, cut in self.here])
        return batches

    def as_shards(self, D: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
        """The directions for `whole_here`, as shards."""
        if self.in_a_row:
            return D[0].reshape(shape)
        out = D[0].new_zeros(shape)
        if self.here:
            places = [out[i][cut].squeeze(0) for i, cut in self.here]
            torch._foreach_copy_(places, [d for batch in D for d in batch])
        return out

    def _room(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Empty batches for the matrices owned here, one per shape; a single batch of none if there are none."""
        kinds = list(dict.fromkeys(self.shapes)) or [(1, 1)]
        return [like.new_empty(self.shapes.count(shape), *shape) for shape in kinds]

    def _gap_views(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each rank's pieces of the matrices owned here, rank by rank; for a flattened matrix, ranges of elements."""
        stored = [batch.flatten(1).unsqueeze(-1) if self.split.flattened else batch for batch in batches]
        matrices = [matrix.unsqueeze(0) for batch in stored for matrix in batch]
        return [m[slices(cut)] for cuts in self.gaps for m, cut in zip(matrices, cuts, strict=True)]


def _copy(flat: torch.Tensor, views: list[torch.Tensor], *, into_views: bool) -> None:
    """Copies consecutive parts of ``flat`` into the views, or the views into ``flat``."""
    if views:
        pieces = zip(flat.split([v.numel() for v in views]), views, strict=True)
        stretches = [piece.view(v.shape) for piece, v in pieces]
        torch._foreach_copy_(views, stretches) if into_views else torch._foreach_copy_(stretches, views)


class Late:
    """A copy of a tensor to the host, in flight; from a GPU through pinned memory, so that nothing waits for its queue."""

    def __init__(self, x: torch.Tensor):
        self._event: Any = None
        if x.device.type == "cuda":
            self._host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = x.clone()

    def tolist(self) -> list[Any]:
        """The numbers as nested lists; waits for the work that was queued before the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class Agreement:
    """Small collectives of host data over all ranks of the optimizer, which never wait for a GPU's queue.

    On GPUs they need gloo. If the group has gloo for CPU tensors, it is used itself; else a second group of the same ranks
    and timeout is created here, which makes construction a collective.
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
    """The group itself if it has gloo for CPU tensors, as "cpu:gloo,cuda:nccl" does; else a new one of the same ranks."""
    try:
        if group._get_backend(torch.device("cpu")).name() == "gloo":
            return group
    # The group has no backend for CPU tensors.
    except RuntimeError:
        pass
    backend = group._get_backend(device)
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    ranks = dist.get_process_group_ranks(group)
    return group_of_its_ranks(ranks, timeout if isinstance(timeout, timedelta) else None, "gloo")


def group_of_its_ranks(
    ranks: list[int], timeout: timedelta | None = None, backend: str | None = None
) -> dist.ProcessGroup:
    """A new group, created by its own ranks only.

    If init_process_group was given a ``device_id``, NCCL would split it off the default group, which takes all ranks.
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
    """A symmetric n x n matrix as n(n+1)/2 elements: two triangles side by side, LAPACK's rectangular full packed form."""
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
