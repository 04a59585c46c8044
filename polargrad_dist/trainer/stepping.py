"""One step: the gradient of a global batch, the decision to apply or skip it, and the figures that the host reads.

On a CPU the host checks loss and gradient norm before the optimizer changes anything. On a GPU that check would make the host
wait for the device, so a flag on the device decides (the optimizer selects by it), and the figures reach the host one step
later through pinned memory. Ranks agree on leaving in the same reduction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from polargrad_dist.diagnostics import Diagnostics
from polargrad_dist.distributed.transport import Late
from polargrad_dist.errors import PolarError, TrainingError
from polargrad_dist.optim import PolarGrad
from polargrad_dist.optim.elements import shrinking
from polargrad_dist.optim.schedules import Rates
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.guard import Guard
from polargrad_dist.trainer.health import magnitudes, not_finite, reason_to_skip
from polargrad_dist.trainer.interfaces import Batch, Progress
from polargrad_dist.trainer.phases import Period, Phases
from polargrad_dist.trainer.signals import LeaveRequest
from polargrad_dist.trainer.strategies import Placed
from polargrad_dist.trainer.world import World
from polargrad_dist.trainer.wrapped import Wrapped


@dataclass
class Told:
    """What the host knows about a step: its figures, whether a rank was asked to leave, and where its time went."""

    record: dict[str, Any]
    asked: bool
    period: Period


@dataclass
class Unseen:
    """A step whose figures are on their way: [sum of losses, ranks asked to leave, bad norms, norm, own loss, largest
    gradient of each of ``names``]."""

    step: int
    sample: int
    names: list[str]
    figures: Late
    period: Period


class Stepper:
    """Runs the training steps; every method is called on all ranks.

    ``hear`` is called with the figures of each step, in order: at once, or on a GPU during the next step, and at the latest
    in `finish`.
    """

    def __init__(
        self,
        config: TrainerConfig,
        placed: Placed,
        optimizer: PolarGrad,
        diagnostics: Diagnostics,
        world: World,
        progress: Progress,
        guard: Guard,
        wrapped: Wrapped,
        hear: Callable[[Told], None],
    ):
        self.config, self.placed, self.optimizer, self.diagnostics = config, placed, optimizer, diagnostics
        self.world, self.progress, self.guard, self.hear = world, progress, guard, hear
        self.wrapped = wrapped
        self.phases = Phases(world.device)
        self.rates = Rates(optimizer.param_groups, config.schedule, config.steps)
        # A spike is judged by losses that the host knows, a look-ahead is taken back where the step is skipped, and
        # offloaded parameters are stepped where the host is.
        hosted = config.safety.spike_sigma is not None or wrapped.lookahead or config.strategy.cpu_offload
        self.late = optimizer.late and not hosted
        self._unseen: Unseen | None = None

    def take(self, batches: Iterator[Batch], leave: LeaveRequest) -> None:
        """Gradients of one global batch, and the optimizer's step unless they are not finite."""
        self.wrapped.before(self.progress.step, self.rates.set(self.progress.step))
        self.optimizer.zero_grad()
        mean = self._backward(batches)
        # At the step before, while the device works on this one's gradients
        self._look()
        looked = self.diagnostics.due(self.progress.step + 1)
        unseen = self.late and not looked
        # An unseen step shrinks gradients as it reads them
        with self.phases("optimizer"):
            limit = math.inf if unseen else self.config.clip_norm or math.inf
            norm = self.optimizer.clip_grad_norm_(limit)
        shared = self._shared(mean, norm, leave.asked)
        if unseen:
            self._step_unseen(mean, norm, shared)
        else:
            self.hear(self._step_seen(mean, norm, shared, looked))

    def finish(self) -> None:
        """Waits for the last step; raises ``TrainingError`` if it failed."""
        self._look()
        with self._failures_of(self.progress.step):
            self.optimizer.check_last_step()

    def _backward(self, batches: Iterator[Batch]) -> torch.Tensor:
        """Accumulates the gradient of the mean loss over this rank's share of the global batch; returns that mean."""
        accumulation = self.config.accumulation(self.world.size)
        device = self.world.device
        mean = torch.zeros((), device=device)
        for k in range(accumulation):
            last = k == accumulation - 1
            self.world.at(f"micro-batch {k + 1} of step {self.progress.step + 1}")
            with self.phases("data"):
                tokens, targets = next(batches)
                tokens, targets = tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with self.phases("forward_backward"), self.placed.micro_step(last):
                with self.placed.autocast():
                    done = self.progress.step / self.config.steps
                    loss = self.placed.model(tokens, targets, progress=done) / accumulation
                with nullcontext() if last else self.optimizer.no_sync():
                    self.placed.backward(loss)
                mean += loss.detach()
        return mean

    def _shared(self, mean: torch.Tensor, norm: torch.Tensor, asked: bool) -> torch.Tensor:
        """[sum of losses, ranks asked to leave, ranks whose norm is not finite] of all ranks, fp64 on the device.

        Ranks may base their next action only on numbers that they share; so a norm that overflowed on one rank is shared too.
        """
        wants = torch.full((), float(asked), dtype=torch.float64, device=mean.device)
        bad = (~norm.isfinite()).to(mean.device, torch.float64)
        return self.world.sum(torch.stack([mean.double(), wants, bad]))

    def _step_unseen(self, mean: torch.Tensor, norm: torch.Tensor, shared: torch.Tensor) -> None:
        """The optimizer's step, which the device applies if loss and norm are finite; the host does not check."""
        names, largest = magnitudes(self._gradients())
        ok = shared[0].isfinite() & (shared[2] == 0)
        own = torch.stack([norm.to(mean.device), mean.double()])
        figures = Late(torch.cat([shared, own, *[x.to(mean.device, torch.float64) for x in largest]]))
        clip = self.config.clip_norm
        self._step_optimizer(ok=ok, shrink=shrinking(norm, clip) if clip else None)
        self.wrapped.after(self.progress.step + 1)
        self._unseen = Unseen(self.progress.step + 1, self.progress.sample, names, figures, self.phases.cut())

    def _look(self) -> None:
        """Reads the figures of a step that the host did not check."""
        unseen, self._unseen = self._unseen, None
        if unseen is None:
            return
        loss, asked, bad_norms, norm, own_loss, *largest = unseen.figures.tolist()
        loss, norm = loss / self.world.size, math.nan if bad_norms else norm
        reason = reason_to_skip(loss, norm, [], self.config.safety)
        if reason is None:
            self.guard.made(loss)
        else:
            bad = [name for name, x in zip(unseen.names, largest, strict=True) if not math.isfinite(x)]
            self.guard.skip(unseen.step, unseen.sample, reason, bad, own_loss)
        self.hear(Told(self._record(unseen.step, loss, norm), asked > 0, unseen.period))

    def _step_seen(self, mean: torch.Tensor, norm: torch.Tensor, shared: torch.Tensor, looked: bool) -> Told:
        """The optimizer's step, if the host finds loss and norm finite."""
        loss, asked, bad_norms = shared.tolist()
        loss, grad_norm = loss / self.world.size, math.nan if bad_norms else float(norm)
        step, progress = self.progress.step + 1, self.progress
        reason = reason_to_skip(loss, grad_norm, progress.recent, self.config.safety)
        looked = looked and reason is None
        if looked:
            with self.phases("diagnostics"):
                self.diagnostics.before_step()
        if reason is None:
            self._step_optimizer()
            self.wrapped.after(step)
            self.guard.made(loss)
        else:
            self.wrapped.undo(step)
            bad = None if "spike" in reason else not_finite(self._gradients())
            self.guard.skip(step, progress.sample, reason, bad, float(mean))
        record = self._record(step, loss, grad_norm)
        if looked:
            with self.phases("diagnostics"):
                record["diagnostics"] = self.diagnostics.after_step()
        return Told(record, asked > 0, self.phases.cut())

    def _step_optimizer(self, **options: Any) -> None:
        step = self.progress.step + 1
        self.world.at(f"the optimizer's step {step}")
        with self.phases("optimizer"), self._failures_of(step - self.optimizer.late):
            self.optimizer.step(**options)

    @contextmanager
    def _failures_of(self, step: int) -> Iterator[None]:
        """Names the step in which an oracle failed: on a GPU that is the step before."""
        try:
            yield
        except PolarError as error:
            raise TrainingError(f"step {step}: {error}; {self.guard.way_back()}") from error

    def _gradients(self) -> dict[str, torch.Tensor]:
        """This rank's gradient shards; where the optimizer reduces gradients itself, only it has them."""
        optimizer = self.optimizer
        return {work.entry.name: optimizer.shard_gradient(work) for work in optimizer.works}

    def _record(self, step: int, loss: float, norm: float) -> dict[str, Any]:
        return {"step": step, "loss": loss, "grad_norm": norm, "skipped": self.progress.skipped}
