"""The training loop: handed a model, data and an optimizer's configuration, it knows none of their kinds.

A step reads its loss and gradient norm back before the optimizer moves anything: a non-finite one is skipped on all
ranks alike, at the price of one wait for the device per step. Ranks agree on leaving in the same reduction.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from polargrad_dist.diagnostics import Diagnostics
from polargrad_dist.errors import CheckpointError, PolarError, TrainingError
from polargrad_dist.optim import OptimizerConfig, PolarGrad
from polargrad_dist.optim.routing import clean_name, unwrap
from polargrad_dist.optim.schedules import lr_factor, momentum_at
from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.checkpoint import CheckpointStore, folder_name, restore_rng_state, rng_state
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.evaluation import evaluate
from polargrad_dist.trainer.header import facts_of, header, write_facts
from polargrad_dist.trainer.health import culprits, poisoned, reason_to_skip
from polargrad_dist.trainer.interfaces import Batch, Data, Outcome, Progress, identity_of
from polargrad_dist.trainer.interval import Interval
from polargrad_dist.trainer.measure import Evaluator
from polargrad_dist.trainer.metrics import Metrics
from polargrad_dist.trainer.output import start_log
from polargrad_dist.trainer.phases import Phases
from polargrad_dist.trainer.preflight import check_lengths
from polargrad_dist.trainer.profiling import PREFIX, Profile
from polargrad_dist.trainer.signals import PREEMPTED, LeaveRequest
from polargrad_dist.trainer.strategies import place
from polargrad_dist.trainer.world import World, seed_everything

log = logging.getLogger("polargrad_dist.trainer")

PATIENCE = 60.0  # seconds that a start waits for another process to leave its run directory


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
        check_lengths(config, model)
        self.config, self.data, self.world = config, data, world
        self.run_dir, self.configuration = Path(config.run_dir), configuration
        self.hold = rundir.Hold(self.run_dir, min(PATIENCE, 30 * config.strategy.timeout_minutes))
        try:
            self._on_main(self.hold.take)
            self._build(model, optimizer)
        except BaseException:
            self.hold.abandon()
            raise

    def _build(self, model: nn.Module, optimizer: OptimizerConfig) -> None:
        """Everything up to the first step, while the run directory is this run's alone."""
        config, world = self.config, self.world
        resume = config.checkpoint.resume
        self._on_main(lambda: rundir.check(self.run_dir, self.configuration, config.allow_changes, resume))
        world.together(lambda: start_log(self.run_dir, world.rank))
        self.run_id = self._on_main(lambda: rundir.run_id(self.run_dir))
        self.bare = model
        self.placed = place(model, config, world, optimizer.gradients == "reduce_scatter")
        self.optimizer = PolarGrad.from_config(self.placed.model, optimizer)
        self.diagnostics = Diagnostics(self.optimizer, config.diagnostics)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.base_beta = [group["beta"] for group in self.optimizer.param_groups]
        self.progress = Progress()
        self.phases = Phases(world.device)
        self.interval = Interval(config, world, model, self.optimizer, self.phases)
        self.validated: dict[str, float] = {}
        self.evaluator = Evaluator(config, self.placed, model, self.data, world)
        self.store = CheckpointStore(
            self.run_dir / "checkpoints",
            config.checkpoint,
            identity=identity_of(self.configuration, self.data),
            configuration=self.configuration,
            run=self.run_id,
            timeout=timedelta(minutes=config.strategy.timeout_minutes),
        )

    def _on_main(self, fn: Callable[[], Any]) -> Any:
        """What ``fn`` returns on rank 0, on every rank; its error is raised on all."""
        return self.world.gather(self.world.together(lambda: fn() if self.world.is_main else None))[0]

    def fit(self) -> Outcome:
        """Trains to the last step, or until asked to leave.

        Raises ``TrainingError`` after too many skipped steps, and for weights that are not finite.
        """
        try:
            outcome = self._fit()
        finally:
            self.hold.release()
        if self.world.is_main and outcome.exit_code == 0:
            rundir.tell_launcher()
        return outcome

    def _fit(self) -> Outcome:
        config, progress = self.config, self.progress
        self._on_main(self.hold.take)
        seed_everything(config.seed * 1_000_003 + self.world.rank)
        self.world.at("resuming")
        self._resume()
        self._on_main(lambda: rundir.claim(self.run_dir, self.configuration, self.run_id))
        if keep_tokenizer := getattr(self.data, "keep_tokenizer", None):
            self._on_main(lambda: keep_tokenizer(self.run_dir))
        self._introduce()
        metrics = Metrics(
            config.logging,
            self.run_dir,
            steps=config.steps,
            first=progress.step,
            tokens_per_step=config.tokens_per_step,
            run_id=self.run_id,
            configuration=self.configuration,
            active=self.world.is_main,
            report=self.report,
        )
        profile = Profile(config.logging.profile, self.run_dir, self.world.device, self.world.is_main)
        leave = LeaveRequest(writing=lambda: self.store.writing, tell=self.world.is_main)
        batches = self.data.train.batches_from(progress.sample)
        saved = stop = False
        try:
            if progress.owing:
                stop = self._measure(metrics, leave)
            while progress.step < config.steps and not stop:
                self.world.at(f"step {progress.step + 1}")
                with record_function(f"{PREFIX}whole"):
                    record, stop = self._step(batches, leave)
                profile.step()
                self._made = True
                progress.step += 1
                progress.sample += config.global_batch
                self._report(metrics, record)
                stop = self._validate_and_save(metrics, leave, stop)
            self.world.at("the last save")
        finally:
            try:
                profile.close()
                metrics.close()
                if hasattr(batches, "close"):
                    batches.close()
                saved = self.store.close()
            finally:
                leave.close()
        return self._outcome(saved, leave if stop else None)

    def _introduce(self) -> None:
        """Says what this run is: to the log, and in ``run.json``."""
        given = (self.config, self.world, self.bare, self.optimizer, self.data, self.configuration)
        facts = facts_of(*given, self.run_id, self.progress.step)
        self._on_main(lambda: write_facts(self.run_dir, facts))
        if self.world.is_main:
            log.info("\n%s", header(facts))

    def _outcome(self, saved: bool, left: LeaveRequest | None) -> Outcome:
        """The exit code, and a line in the log where the run did not end as planned."""
        config, step, kept = self.config, self.progress.step, self.store.last_saved
        unfinished = step < config.steps or self.progress.owing
        if not self._made and not self.progress.owing and not self._due:
            return Outcome(0, step, self.validated)
        code = PREEMPTED if unfinished else 0
        if self._due and unfinished:
            log.warning("the last steps were skipped, so nothing new is saved: %s is on disk", kept)
        elif self._due:
            log.error("the run ended in %s: its weights are not kept; %s", self._unproved, self._way_back())
            code = 1
        elif not saved or kept != step:
            log.error("the last checkpoint could not be written: %s is on disk", kept)
            code = 1
        elif left is not None:
            log.info("asked to leave (%s): saved at step %d of %d", left.reason, step, config.steps)
        return Outcome(code, step, self.validated)

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
        # What ranks do next may hang on nothing that they do not share, a norm that overflowed on one of them included.
        wants = torch.tensor(float(leave.asked), dtype=torch.float64, device=mean.device)
        told = torch.stack([mean.double(), wants, (~norm.isfinite()).double().to(mean.device)])
        loss, asked, bad_norms = self.world.sum(told).tolist()
        loss, grad_norm = loss / self.world.size, math.nan if bad_norms else float(norm)
        reason = reason_to_skip(loss, grad_norm, progress.recent, config.safety)
        looked = reason is None and self.diagnostics.due(progress.step + 1)
        if looked:
            with self.phases("diagnostics"):
                self.diagnostics.before_step()
        if reason is None:
            self.world.at(f"the optimizer's step {progress.step + 1}")
            with self.phases("optimizer"):
                try:
                    self.optimizer.step()
                except PolarError as error:
                    raise TrainingError(f"step {progress.step + 1}: {error}; {self._way_back()}") from error
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
            self.world.at(f"micro-batch {k + 1} of step {self.progress.step + 1}")
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

    def _skip(self, reason: str, local_loss: float) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        where = ""
        if "spike" not in reason:
            self._refuse_poisoned(self.tensors(), f"step {progress.step + 1} cannot be made")
            optimizer = self.optimizer  # it alone has the gradients where it reduces them itself
            gradients = {work.entry.name: optimizer.shard_gradient(work) for work in optimizer.works}
            where = culprits(self.world, gradients, local_loss)
        log.warning("step %d is skipped: %s%s", progress.step + 1, reason, where)
        if progress.skipped_in_a_row >= self.config.safety.max_skipped:
            raise TrainingError(
                f"{progress.skipped_in_a_row} steps in a row were skipped ({reason}{where}), trainer.safety.max_skipped "
                f"allows fewer; {self._way_back()}"
            )

    def _refuse_poisoned(self, tensors: dict[str, torch.Tensor], what: str) -> None:
        """Raises ``TrainingError`` on all ranks when weights or optimizer state of one are not finite."""
        if (where := poisoned(self.world, tensors)) is not None:
            raise TrainingError(
                f"{what}: {where} is not finite, and no later step can mend it; {self._way_back()}"
            )

    def _way_back(self) -> str:
        """From which checkpoint to go on, and how; every rank calls it."""
        self.store.wait()
        step, change = self.store.last_saved, "lower the learning rates"
        data = f"or look at the data from sample {self.progress.sample} on"
        if step is None:
            return f"no checkpoint was saved yet: {change}, {data}, and start again in a new trainer.run_dir"
        path = self.store.folder / folder_name(step)
        return (
            f"the checkpoint of step {step} is intact: {change} ({data}) and go on from it with --trainer.checkpoint.resume "
            f"{path} --trainer.allow_changes true; the command unchanged would end here again"
        )

    # Around the steps

    def _report(self, metrics: Metrics, record: dict[str, Any]) -> None:
        """Hands the figures of the steps since the last row to the sinks, when a row is due."""
        metrics.console.tick(record)
        every = self.config.logging.stats_every
        if every and record["step"] % every == 0:
            record["polar"] = self.optimizer.stats()
        if (row := self.interval.add(record)) is not None:
            metrics.write(row)

    _due = False
    _made = False
    report: Callable[[Path], Path] | None = None
    """Writes the run's HTML report, for the sinks that take one when it ends."""
    _unproved = ""

    def _validate_and_save(self, metrics: Metrics, leave: LeaveRequest, stop: bool) -> bool:
        """What is due after a step; returns whether to leave. Who is asked to leave saves first and validates never."""
        config, step = self.config, self.progress.step
        last = step == config.steps
        every = config.evaluation.every
        self.progress.validation_owed = self.data.validation is not None and (
            bool(every and step % every == 0) or (last and config.evaluation.at_end)
        )
        self.progress.look_owed = self.evaluator.due(step)
        due = self.progress.validation_owed
        if self.progress.owing and not stop:
            with self.phases("evaluation"):
                stop = self._measure(metrics, leave)
        loss = self.validated["validation_loss"] if due and not self.progress.validation_owed else None
        self._due |= stop or last or bool(config.checkpoint.every and step % config.checkpoint.every == 0)
        self._unproved = self._doubt(loss, final=last)
        if self._due and not self._unproved:
            self.world.at(f"the save of step {step}")
            with self.phases("saving"):
                self.save(loss)
            self._due = False
        return stop

    def _measure(self, metrics: Metrics, leave: LeaveRequest) -> bool:
        """Measures and writes what is owed; returns whether some rank was asked to leave meanwhile."""
        step = self.progress.step
        if self.progress.validation_owed:
            figures = self.evaluate(lambda: leave.asked)
            named = None if figures is None else self.evaluator.named(step, lambda: leave.asked)
            if figures is None or named is None:
                return True
            self.validated, self.progress.validation_owed = figures, False
            metrics.write({"step": step, **figures, **named})
            if step == self.config.steps and not math.isfinite(figures["validation_loss"]):
                self._due, self._unproved = True, self._doubt(figures["validation_loss"], final=True)
        if self.progress.look_owed:
            looked = self.evaluator.look(step, lambda: leave.asked)
            if looked is None:
                return True
            self.progress.look_owed = False
            if looked:
                metrics.write({"step": step, **looked})
        return False

    def _doubt(self, loss: float | None, final: bool) -> str:
        """Why the weights are not fit to be kept, else nothing.

        After a skipped step they may be what broke it, and saving them would push good checkpoints out: the save waits
        for a step that works, at the very end for a finite validation.
        """
        if loss is not None and not math.isfinite(loss):
            return f"a validation loss of {loss}"
        if self.progress.skipped_in_a_row and not (final and loss is not None):
            return "skipped steps"
        return ""

    def evaluate(self, asked: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """The validation loss and, where known, bits per byte; None when a rank ``asked`` to leave meanwhile."""
        done = self.progress.step / self.config.steps
        return evaluate(self.placed, self.data.validation, self.world, done, asked)

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
        """A checkpoint of this moment; one that exists for this step already is left as it is.

        Raises ``TrainingError`` instead where a weight or a moment is not finite on any rank.
        """
        step = self.progress.step
        if self.store.last_saved == step:
            return
        tensors = self.tensors()
        self._refuse_poisoned(tensors, f"step {step} is not saved")
        self.store.save(
            step,
            tensors,
            objects={"progress": self.progress.__dict__},
            per_rank=rng_state(),
            validation_loss=validation_loss,
        )

    def _resume(self) -> None:
        path = self.store.resume_point()
        if path is None:
            return
        tensors = self.tensors()
        loaded = self.store.load(path, tensors)
        if (where := poisoned(self.world, tensors)) is not None:
            raise CheckpointError(
                f"{path} holds {where} that is not finite: go on from an older one with trainer.checkpoint.resume=PATH"
            )
        try:
            self.progress.__dict__.update(vars(Progress(**loaded.objects["progress"])))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not of this trainer, its progress is malformed ({error})"
            ) from None
        self.interval.resumed(self.progress.skipped)
        if loaded.per_rank is not None:
            restore_rng_state(loaded.per_rank)
        else:
            seed_everything((self.config.seed * 1_000_003 + self.world.rank) ^ (self.progress.step << 20))
        log.info("resumed from %s at step %d", path, self.progress.step)
        if self.progress.step >= self.config.steps:
            log.info(
                "nothing is left to do: trainer.steps is %d, and %s is of step %d; set a larger trainer.steps to go on",
                self.config.steps,
                path,
                self.progress.step,
            )
