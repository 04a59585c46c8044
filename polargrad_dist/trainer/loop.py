"""The training loop: handed a model, data and an optimizer's configuration, it knows none of their kinds.

A step reads its loss and gradient norm back before the optimizer moves anything: a non-finite one is skipped on all
ranks alike, at the price of one wait for the device per step. Ranks agree on leaving in the same reduction.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from polargrad_dist.diagnostics import Diagnostics
from polargrad_dist.errors import ConfigError, PolarGradError
from polargrad_dist.optim import OptimizerConfig, PolarGrad
from polargrad_dist.optim.routing import clean_name, unwrap
from polargrad_dist.optim.schedules import lr_factor, momentum_at
from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.checkpoint import CheckpointStore, restore_rng_state, rng_state
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.measure import Evaluator
from polargrad_dist.trainer.metrics import Metrics
from polargrad_dist.trainer.phases import Phases, memory_gib, peak_flops
from polargrad_dist.trainer.profiling import PREFIX, Profile
from polargrad_dist.trainer.signals import PREEMPTED, LeaveRequest
from polargrad_dist.trainer.strategies import place
from polargrad_dist.trainer.world import World, seed_everything

log = logging.getLogger("polargrad_dist.trainer")

PATIENCE = 60.0  # seconds that a start waits for another process to leave its run directory

Batch = tuple[torch.Tensor, torch.Tensor]


class TrainData(Protocol):
    """Micro-batches of this rank, in an order that is a function of the sample index alone."""

    def batches_from(self, sample: int) -> Iterator[Batch]: ...


class ValidationData(Protocol):
    """A fixed set of tokens, each on one rank; as many batches on every rank. Targets of -100 are padding."""

    bytes_per_token: float | None

    def batches(self) -> Iterator[Batch]: ...


class Data(Protocol):
    """What the loop asks of the data."""

    @property
    def train(self) -> Any: ...

    @property
    def validation(self) -> Any: ...

    def fingerprint(self) -> dict[str, Any]: ...


class TrainingError(PolarGradError):
    """The run cannot go on: too many steps in a row were not finite."""


@dataclass
class Progress:
    """What a run has done; saved with every checkpoint. ``sample`` is the index of the next one."""

    step: int = 0
    sample: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """How a run ended: 0 and its last figures, or `PREEMPTED` when it was asked to leave and saved."""

    exit_code: int
    step: int
    validation: dict[str, float]


def identity_of(configuration: dict[str, Any], data: Data) -> dict[str, Any]:
    """What a checkpoint must share with a run to be loaded by it. Other data may be allowed, another tokenizer not."""
    fingerprint = dict(data.fingerprint())
    tokenizer = {"tokenizer": fingerprint.pop("tokenizer", None)}
    # Where the first weights came from makes no other model, nor does a key that is newer than the checkpoint and not set.
    model = {
        k: v
        for k, v in configuration.get("model", {}).items()
        if k != "init_from" and (k, v) != ("config", None)
    }
    return {"model": model, "tokenizer": tokenizer, "data": fingerprint}


class Trainer:
    """Trains ``model`` on ``data`` for ``config.steps`` steps, resuming from the run directory where it can.

    configuration: the whole run's, JSON-able, kept in the run directory and in every checkpoint.
    """

    def __init__(
        self,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        model: nn.Module,
        data: Data,
        world: World,
        configuration: dict[str, Any],
    ):
        config.check(world.size)
        limit = getattr(model, "max_sequence_length", None)
        if limit is not None and config.sequence_length > limit:
            raise ConfigError(
                f"trainer.sequence_length is {config.sequence_length}, but model.max_sequence_length is {limit}: lower the "
                "one, or raise the other"
            )
        self.config, self.data, self.world = config, data, world
        self.run_dir = Path(config.run_dir)
        resume = config.checkpoint.resume
        self._on_main(lambda: rundir.check(self.run_dir, configuration, config.allow_changes, resume))
        if self.run_dir.is_dir():
            rundir.start_log(self.run_dir, world.rank)
        self.configuration = configuration
        self.bare = model
        self.placed = place(model, config, world, optimizer.gradients == "reduce_scatter")
        self.optimizer = PolarGrad.from_config(self.placed.model, optimizer)
        self.diagnostics = Diagnostics(self.optimizer, config.diagnostics)
        self._parameters = sum(p.numel() for p in model.parameters())
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.base_beta = [group["beta"] for group in self.optimizer.param_groups]
        self.progress = Progress()
        self.phases = Phases(world.device)
        self.peak = peak_flops(world.device) if config.precision != "fp32" else None  # the peaks are bf16's
        self.validated: dict[str, float] = {}
        self.evaluator = Evaluator(config, self.placed, model, data, world)
        self.store = CheckpointStore(
            self.run_dir / "checkpoints",
            config.checkpoint,
            identity=identity_of(configuration, data),
            configuration=configuration,
        )

    def _on_main(self, fn: Callable[[], Any]) -> Any:
        """What ``fn`` returns on rank 0, on every rank; its error is raised on all."""
        return self.world.gather(self.world.together(lambda: fn() if self.world.is_main else None))[0]

    def fit(self) -> Outcome:
        """Trains to the last step, or until asked to leave. Raises ``TrainingError`` after too many skipped steps."""
        hold = rundir.Hold(self.run_dir, min(PATIENCE, 30 * self.config.strategy.timeout_minutes))
        try:
            self._on_main(hold.take)
            return self._fit(hold)
        finally:
            hold.release()

    def _fit(self, hold: rundir.Hold) -> Outcome:
        config, progress = self.config, self.progress
        seed_everything(config.seed * 1_000_003 + self.world.rank)
        self._resume()
        self.run_id = self._on_main(lambda: rundir.claim(self.run_dir, self.configuration))
        self._on_main(hold.take)  # a new directory
        if keep_tokenizer := getattr(self.data, "keep_tokenizer", None):
            self._on_main(lambda: keep_tokenizer(self.run_dir))
        rundir.start_log(self.run_dir, self.world.rank)
        metrics = Metrics(
            config.logging,
            self.run_dir,
            steps=config.steps,
            first=progress.step,
            run_id=self.run_id,
            configuration=self.configuration,
            active=self.world.is_main,
            report=self.report,
        )
        profile = Profile(config.logging.profile, self.run_dir, self.world.device, self.world.is_main)
        leave = LeaveRequest()
        batches = self.data.train.batches_from(progress.sample)
        try:
            stop = False
            while progress.step < config.steps and not stop:
                with contextlib.suppress(
                    OSError, ValueError, AttributeError
                ):  # needs a stderr that is a file
                    faulthandler.dump_traceback_later(
                        60 * config.strategy.timeout_minutes
                    )  # who hangs shows where
                with record_function(f"{PREFIX}whole"):
                    record, stop = self._step(batches, leave)
                profile.step()
                progress.step += 1
                progress.sample += config.global_batch
                self._report(metrics, record)
                self._validate_and_save(metrics, stop)
            if stop:
                name = leave.signal.name if leave.signal else "another rank's signal"
                log.info("asked to leave (%s): saved at step %d of %d", name, progress.step, config.steps)
        finally:
            faulthandler.cancel_dump_traceback_later()
            leave.close()
            profile.close()
            metrics.close()
            if hasattr(batches, "close"):
                batches.close()
            saved = self.store.close()
        if progress.step < config.steps and self._due:
            log.warning(
                "the last steps were skipped, so nothing new is saved: %s is on disk", self.store.last_saved
            )
            return Outcome(PREEMPTED, progress.step, self.validated)
        if self._due:
            log.error(
                "the run ended in skipped steps, its weights are not kept: %s is on disk",
                self.store.last_saved,
            )
            return Outcome(1, progress.step, self.validated)
        if not saved or self.store.last_saved != progress.step:
            log.error("the last checkpoint could not be written: %s is on disk", self.store.last_saved)
            return Outcome(1, progress.step, self.validated)
        return Outcome(PREEMPTED if progress.step < config.steps else 0, progress.step, self.validated)

    # One step

    def _step(self, batches: Iterator[Batch], leave: LeaveRequest) -> tuple[dict[str, Any], bool]:
        """Gradients of one global batch, and the optimizer's step unless they are not finite.

        Returns the step's figures and whether some rank was asked to leave.
        """
        config, progress = self.config, self.progress
        factor = lr_factor(config.schedule, progress.step, config.steps)
        for group, lr, beta in zip(self.optimizer.param_groups, self.base_lr, self.base_beta, strict=True):
            group["lr"] = lr * factor
            if group["role"] == "hidden":
                group["beta"] = momentum_at(config.schedule, progress.step, beta)
        self.optimizer.zero_grad()
        mean = self._backward(batches)
        with self.phases("optimizer"):
            norm = self.optimizer.clip_grad_norm_(config.clip_norm or math.inf)
        told = torch.stack(
            [mean.double(), torch.tensor(float(leave.asked), dtype=torch.float64, device=mean.device)]
        )
        loss, asked = self.world.sum(told).tolist()
        loss, grad_norm = loss / self.world.size, float(norm)
        reason = self._reason_to_skip(loss, grad_norm)
        looked = reason is None and self.diagnostics.due(progress.step + 1)
        if looked:
            with self.phases("diagnostics"):
                self.diagnostics.before_step()
        if reason is None:
            with self.phases("optimizer"):
                self.optimizer.step()
            progress.skipped_in_a_row = 0
            progress.recent = [*progress.recent, loss][-config.safety.spike_window :]
        else:
            self._skip(reason, float(mean))
        record = {
            "step": progress.step + 1,
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped": progress.skipped,
        }
        if looked:
            with self.phases("diagnostics"):
                record["diagnostics"] = self.diagnostics.after_step()
        return record, asked > 0

    def _backward(self, batches: Iterator[Batch]) -> torch.Tensor:
        """Accumulates the gradient of the mean loss over this rank's share of the global batch; returns that mean."""
        accumulation = self.config.accumulation(self.world.size)
        device = self.world.device
        mean = torch.zeros((), device=device)
        for k in range(accumulation):
            last = k == accumulation - 1
            with self.phases("data"):
                tokens, targets = next(batches)
                tokens, targets = tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with self.phases("forward_backward"), self.placed.micro_step(last):
                with self.placed.autocast():
                    done = self.progress.step / self.config.steps
                    loss = self.placed.model(tokens, targets, progress=done) / accumulation
                if last:
                    loss.backward()
                else:
                    with self.optimizer.no_sync():
                        loss.backward()
                mean += loss.detach()
        return mean

    def _reason_to_skip(self, loss: float, norm: float) -> str | None:
        """Why this step must not reach the weights, from figures that all ranks share; None where it may."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        sigma, recent = self.config.safety.spike_sigma, self.progress.recent
        if sigma is not None and len(recent) == self.config.safety.spike_window:
            mean = sum(recent) / len(recent)
            spread = math.sqrt(sum((x - mean) ** 2 for x in recent) / len(recent))
            if loss > mean + sigma * spread:
                return f"the loss {loss:.4f} is a spike above {mean:.4f} + {sigma} x {spread:.4f}"
        return None

    def _skip(self, reason: str, local_loss: float) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        where = "" if "spike" in reason else self._culprits(local_loss)
        log.warning("step %d is skipped: %s%s", progress.step + 1, reason, where)
        if progress.skipped_in_a_row >= self.config.safety.max_skipped:
            last = self.store.last_saved
            kept = (
                f"the checkpoint of step {last} is intact"
                if last is not None
                else "no checkpoint was saved yet"
            )
            raise TrainingError(
                f"{progress.skipped_in_a_row} steps in a row were skipped ({reason}{where}), trainer.safety.max_skipped "
                f"allows fewer; {kept}: lower the learning rates, or look at the data from sample {progress.sample} on"
            )

    def _culprits(self, local_loss: float) -> str:
        """Which ranks and parameters a non-finite step came from."""
        bad = [
            work.entry.name
            for work in self.optimizer.works
            if work.p.grad is not None and not bool(work.p.grad.isfinite().all() if not isinstance(work.p.grad, DTensor)
            else work.p.grad.to_local().isfinite().all())
        ]  # fmt: skip
        found = self.world.gather((math.isfinite(local_loss), len(bad), bad[:1]))
        losses = [rank for rank, (finite, _, _) in enumerate(found) if not finite]
        parts = [f"; loss of rank {', '.join(map(str, losses))}"] if losses else []
        for rank, (_, count, first) in enumerate(found):
            if count:
                parts.append(
                    f"; on rank {rank} the gradient of {first[0]}"
                    + (f" and {count - 1} more" if count > 1 else "")
                )
        return "".join(parts)

    # Around the steps

    def _report(self, metrics: Metrics, record: dict[str, Any]) -> None:
        """Adds rates, shares and facts to the figures of a log step and hands them to the sinks."""
        logging_config, step = self.config.logging, record["step"]
        metrics.console.tick(step)
        if logging_config.stats_every and step % logging_config.stats_every == 0:
            record["polar"] = self.optimizer.stats()
        if (
            step % logging_config.every
            and step != self.config.steps
            and not {"polar", "diagnostics"} & record.keys()
        ):
            return
        wall, shares = self.phases.report()
        steps = step - self._reported
        self._reported = step
        per_second = steps * self.config.tokens_per_step / wall
        if self._parameters:  # once per start
            record["parameters"], self._parameters = self._parameters, 0
        record["lr"] = {group["role"]: group["lr"] for group in self.optimizer.param_groups}
        record["tokens_per_second"] = per_second
        if self.peak is not None and hasattr(self.bare, "flops_per_token"):
            flops = self.bare.flops_per_token(self.config.sequence_length) * per_second  # type: ignore[operator]
            record["mfu"] = flops / (self.peak * self.world.size)
        record["memory_gib"] = memory_gib(self.world.device)
        record["share"] = shares
        metrics.write(record)

    _reported = 0
    _due = False
    report: Callable[[Path], Path] | None = None
    """Writes the run's HTML report, for the sinks that take one when it ends."""

    def _validate_and_save(self, metrics: Metrics, stop: bool) -> None:
        config, step = self.config, self.progress.step
        last = step == config.steps
        loss = None
        every = config.evaluation.every
        if self.data.validation is not None and (
            (every and step % every == 0) or (last and config.evaluation.at_end)
        ):
            self.validated = self.evaluate()
            loss = self.validated["validation_loss"]
            metrics.write({"step": step, **self.validated, **self.evaluator.named(step)})
        if looked := self.evaluator.look(step, last):
            metrics.write({"step": step, **looked})
        self._due |= stop or last or bool(config.checkpoint.every and step % config.checkpoint.every == 0)
        if self._due and self._proved(loss if last else None):
            self.save(loss)
            self._due = False

    def _proved(self, final_loss: float | None) -> bool:
        """Whether the weights are fit to be kept. After a skipped step they may be what broke it, and saving them would
        push good checkpoints out: the save waits for a step that works, at the very end for a finite validation."""
        return self.progress.skipped_in_a_row == 0 or (final_loss is not None and math.isfinite(final_loss))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss over the fixed validation tokens, in nats per token and, where known, bits per byte of their text."""
        validation = self.data.validation
        model = self.placed.model
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        done = self.progress.step / self.config.steps
        for tokens, targets in validation.batches():
            count = int((targets != -100).sum())
            tokens, targets = tokens.to(self.world.device), targets.to(self.world.device)
            with self.placed.autocast():
                loss = model(tokens, targets, progress=done)
            if count:
                total += torch.stack(
                    [loss.double() * count, torch.full_like(loss, count, dtype=torch.float64)]
                )
        model.train()
        summed, count = self.world.sum(total).tolist()
        out = {"validation_loss": summed / count}
        if validation.bytes_per_token:
            out["bits_per_byte"] = summed / count / math.log(2) / validation.bytes_per_token
        return out

    # Saving and resuming

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint holds, as this rank holds it."""
        model = unwrap(self.placed.model)
        named = [*model.named_parameters(), *model.named_buffers()]
        persistent = set(map(clean_name, model.state_dict()))
        tensors = {
            f"model/{clean_name(name)}": tensor.detach()
            for name, tensor in named
            if clean_name(name) in persistent
        }
        return tensors | {f"optim/{name}": tensor for name, tensor in self.optimizer.named_state().items()}

    def save(self, validation_loss: float | None = None) -> None:
        """A checkpoint of this moment; one that exists for this step already is left as it is."""
        if self.store.last_saved == self.progress.step:
            return
        self.store.save(
            self.progress.step,
            self.tensors(),
            objects={"progress": self.progress.__dict__, "run_id": self.run_id},
            per_rank=rng_state(),
            validation_loss=validation_loss,
        )

    def _resume(self) -> None:
        path = self.store.resume_point()
        if path is None:
            return
        loaded = self.store.load(path, self.tensors())
        self.progress.__dict__.update(json.loads(json.dumps(loaded.objects["progress"])))
        self._reported = self.progress.step
        if loaded.per_rank is not None:
            restore_rng_state(loaded.per_rank)
        else:
            seed_everything((self.config.seed * 1_000_003 + self.world.rank) ^ (self.progress.step << 20))
        log.info("resumed from %s at step %d", path, self.progress.step)
        if self.progress.step >= self.config.steps:
            log.info("nothing is left to do: trainer.steps is %d", self.config.steps)
