"""Reduces gradients during backward, straight into the optimizer shards: P bytes instead of DDP's 2P.

Replaces DDP's all-reduce for replicated parameters. Every rank starts the same reductions in the same order (last parameter
first), whatever gradients it has: a gradient that is missing on a rank counts as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from polargrad_dist.distributed.layout import volume
from polargrad_dist.distributed.plan import Entry
from polargrad_dist.distributed.transport import Started, Traffic
from polargrad_dist.errors import PolarGradError

# Parameter to the handle of its hook.
_hooks = WeakTensorKeyDictionary()


@dataclass
class Reduced:
    """A parameter whose gradient is reduced here; ``copies`` are the places of its group's ranks, in group order."""

    p: torch.Tensor
    entry: Entry
    place: int
    copies: list[int]


class ShardReducer:
    """Hooks on replicated parameters that average gradients into optimizer shards, bucket by bucket.

    `shard` then gives the average in this rank's optimizer shard. ``p.grad`` is then a NaN that takes no memory and cannot
    be written to, so that code that still reads or clips it fails visibly. Parameters that every rank updates whole are
    averaged on all ranks, by one all-reduce.
    """

    def __init__(
        self, parameters: Sequence[Reduced], group: dist.ProcessGroup | None, traffic: Traffic, limit: int
    ):
        self.group, self.traffic = group, traffic
        self.copies = 1 if group is None else group.size()
        self.all = list(parameters)
        self.buckets: list[list[int]] = []
        size = 0
        for i in range(len(self.all) - 1, -1, -1):
            e = self.all[i].entry
            if e.layout.cut is None:
                continue
            last = self.all[self.buckets[-1][0]].entry if self.buckets else None
            if last is None or size + e.bytes > limit or last.dtype != e.dtype:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(i)
            size += e.bytes
        self.small = [i for i, r in enumerate(self.all) if r.entry.layout.cut is None]
        self.enabled = True
        self._reset()
        for i, r in enumerate(self.all):
            # A hook of an earlier optimizer on the same model: two hooks would average twice.
            if r.p in _hooks:
                _hooks[r.p].remove()
            _hooks[r.p] = r.p.register_post_accumulate_grad_hook(lambda _, i=i: self._arrived(i))

    def _reset(self) -> None:
        self._here = [False] * len(self.all)
        self._sent = [False] * len(self.all)
        self._next = 0
        self._flying: list[tuple[list[int], Started | torch.Tensor]] = []
        self._shards: dict[torch.Tensor, torch.Tensor] = {}
        self._spent: dict[torch.Tensor, torch.Tensor] = {}
        self.done = False
        self.present: dict[torch.Tensor, bool] = {}

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate; use it for all but the last micro-batch of a step."""
        self.enabled, before = False, self.enabled
        try:
            yield
        finally:
            self.enabled = before

    def shard(self, p: torch.Tensor) -> torch.Tensor:
        """The averaged gradient of this rank's optimizer shard of ``p``, after `finish`."""
        return self._shards[p]

    def _arrived(self, index: int) -> None:
        if not self.enabled:
            return
        if self._here[index] or self.done:
            raise PolarGradError(
                f"a second backward reached {self.all[index].entry.name} after its gradient had been sent, "
                "expected one per step: run all but the last under optimizer.no_sync(), and begin a step with "
                "optimizer.zero_grad(), not with the model's"
            )
        self._here[index] = True
        while self._next < len(self.buckets) and all(self._here[i] for i in self.buckets[self._next]):
            self._launch(self.buckets[self._next])
            self._next += 1

    def _launch(self, bucket: list[int]) -> None:
        """Starts reducing a bucket: row j of the message has the shards of copy j, padded to the longest."""
        first = self.all[bucket[0]].p
        lengths = [max(map(volume, self.all[i].entry.layout.shards)) for i in bucket]
        flat = torch.zeros(self.copies, sum(lengths), dtype=first.dtype, device=first.device)
        places, pieces, at = [], [], 0
        for i, length in zip(bucket, lengths, strict=True):
            r = self.all[i]
            for j, place in enumerate(r.copies):
                box = r.entry.layout.shards[place]
                if r.p.grad is not None and (count := volume(box)):
                    pieces.append(r.p.grad[tuple(slice(*cut) for cut in box)])
                    places.append(flat[j, at : at + count].view(pieces[-1].shape))
            at += length
            self._sent[i] = True
        if places:
            torch._foreach_copy_(places, pieces)
        flat.div_(self.copies)
        for i in bucket:
            self._spend(self.all[i].p)
        self._flying.append(
            (bucket, self.traffic.reduce_scatter(flat, self.group) if self.group else flat[0])
        )

    def _spend(self, p: torch.Tensor) -> None:
        """Frees the memory of a gradient that has been sent."""
        p.grad = self._spent[p] = torch.full((), torch.nan, dtype=p.dtype, device=p.device).expand(p.shape)

    def finish(self) -> None:
        """Starts the reductions that backward did not reach, and waits for all. Idempotent until `clear`.

        ``present`` then says which parameters had a gradient on this rank; the others have zeros by now.
        """
        if self.done:
            return
        for sent, r in zip(self._sent, self.all, strict=True):
            if sent and r.p.grad is not self._spent[r.p]:
                raise PolarGradError(
                    f"the gradient of {r.entry.name} was changed after it had been sent to the optimizer shards, expected no "
                    "change: call the bare model, not DistributedDataParallel, clip with optimizer.clip_grad_norm_, and "
                    "call optimizer.finish_reductions() before other code changes gradients"
                )
        arrived = zip(self.all, self._sent, self._here, strict=True)
        self.present = {r.p: here if sent else r.p.grad is not None for r, sent, here in arrived}
        for bucket in self.buckets[self._next :]:
            self._launch(bucket)
        self._reduce_small()
        for bucket, started in self._flying:
            flat = started.wait() if isinstance(started, Started) else started
            at = 0
            for i in bucket:
                r = self.all[i]
                box = r.entry.layout.shards[r.place]
                shape = [last - first for first, last in box]
                self._shards[r.p] = flat[at : at + volume(box)].view(shape)
                at += max(map(volume, r.entry.layout.shards))
        self._flying.clear()
        self.done = True

    def _reduce_small(self) -> None:
        for dtype in sorted({self.all[i].p.dtype for i in self.small}, key=str):
            members = [self.all[i].p for i in self.small if self.all[i].p.dtype == dtype]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            flat = torch.cat([g.reshape(-1) for g in grads]).div_(self.copies)
            if self.group is not None:
                self.traffic.all_reduce(flat, self.group).wait()
            for p, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
                self._shards[p] = part.view(p.shape)
                self._spend(p)

    def clear(self) -> None:
        """Prepares for the next step's backward; first waits for reductions in flight."""
        for _, started in self._flying:
            if isinstance(started, Started):
                started.wait()
        self._reset()
