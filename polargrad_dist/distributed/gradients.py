"""Gradients reduced, while backward still runs, only to the rank that needs them: P bytes instead of DDP's 2P.

Takes the place of DDP's all-reduce for replicated parameters. Every rank starts the same reductions in the same order
(last parameter first) whatever gradients it has: one that is missing on some rank counts as zeros there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from polargrad_dist.distributed.grid import Grid
from polargrad_dist.distributed.plan import Entry, chunk
from polargrad_dist.distributed.transport import Traffic
from polargrad_dist.errors import PolarGradError

_hooks = WeakTensorKeyDictionary()  # parameter to the handle of its hook
SMALL = 1 << 16  # elements below which elementwise parameters share one all-reduce


class OwnerReducer:
    """Hooks on replicated parameters that average each gradient where it is needed.

    Afterwards ``p.grad`` holds the average at the owner of a matrix, in the rows that a rank works out of a row-sharded
    one, and everywhere for elementwise parameters; what it holds elsewhere is garbage.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], entries: Sequence[Entry], grid: Grid, traffic: Traffic
    ):
        self.grid, self.traffic = grid, traffic
        self.order = list(reversed(list(zip(parameters, entries, strict=True))))
        self.small = [e.kind == "everywhere" and e.numel < SMALL for _, e in self.order]
        self.enabled = True
        self._reset()
        for i, (p, _) in enumerate(self.order):
            if p in _hooks:  # of an optimizer built earlier on the same model: two would average twice
                _hooks[p].remove()
            _hooks[p] = p.register_post_accumulate_grad_hook(lambda _, i=i: self._arrived(i))

    def _reset(self) -> None:
        self._here = [False] * len(self.order)
        self._next = 0
        self._flying: list[Any] = []
        self._versions: dict[int, int] = {}
        self.done = False
        self.present: dict[torch.Tensor, bool] = {}

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate, as all but the last micro-batch of a step must."""
        self.enabled, before = False, self.enabled
        try:
            yield
        finally:
            self.enabled = before

    def _arrived(self, index: int) -> None:
        if not self.enabled:
            return
        if self._here[index] or self.done:
            raise PolarGradError(
                f"a second backward reached {self.order[index][1].name} after its gradient had been sent to its owner, "
                "expected one per step: run all but the last under optimizer.no_sync(), and begin a step with "
                "optimizer.zero_grad(), not with the model's"
            )
        self._here[index] = True
        self._note(index)
        while self._next < len(self.order) and self._here[self._next]:
            self._launch(self._next)
            self._next += 1

    def _launch(self, index: int) -> None:
        p, e = self.order[index]
        if self.small[index]:
            return
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        grad = p.grad.div_(self.grid.replicas)
        group = self.grid.replicate
        if group is None:
            self._note(index)
            return
        if e.kind == "everywhere":
            self._flying.append(self.traffic.all_reduce(grad, group))
        elif e.kind == "owner":
            self._flying.append(self.traffic.reduce(grad, e.owner, group))
        else:
            for rank in range(self.grid.replicas):
                first, last = chunk(e.shape[0], self.grid.replicas, rank)
                if first < last:
                    self._flying.append(self.traffic.reduce(grad[first:last], rank, group))
        self._note(index)

    def _note(self, index: int) -> None:
        """Remembers how often a gradient has been written, to see whether somebody else does before `finish`."""
        grad = self.order[index][0].grad
        assert grad is not None
        self._versions[index] = grad._version

    def finish(self) -> None:
        """Starts what backward did not reach, waits for everything. Idempotent until `clear`.

        ``present`` then tells which parameters had a gradient on this rank: the others have zeros by now.
        """
        if self.done:
            return
        for index, version in self._versions.items():
            p, e = self.order[index]
            if p.grad is None or p.grad._version != version:
                raise PolarGradError(
                    f"the gradient of {e.name} was changed while it was on its way to its owner: call the model itself and "
                    "no DistributedDataParallel around it, clip with optimizer.clip_grad_norm_, and call "
                    "optimizer.finish_reductions() before anything else touches gradients"
                )
        self.present = {p: p.grad is not None for p, _ in self.order}
        for index in range(self._next, len(self.order)):
            self._launch(index)
        small = [p for (p, _), is_small in zip(self.order, self.small, strict=True) if is_small]
        for p in small:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        group = self.grid.replicate
        for dtype in sorted({p.dtype for p in small}, key=str) if group is not None else ():
            assert group is not None
            grads = [p.grad for p in small if p.dtype == dtype and p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in grads]).div_(self.grid.replicas)
            self.traffic.all_reduce(flat, group).wait()
            parts = flat.split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])
        for work in self._flying:
            work.wait()
        self._flying.clear()
        self.done = True

    def clear(self) -> None:
        """Makes ready for the next step's backward; what is still on its way is waited for first."""
        for work in self._flying:
            work.wait()
        self._reset()
