"""The training loop: handed a model, data and an optimizer's configuration, it knows the class of none of them.

Steps are made in `stepping`. On a GPU the figures of a step are read during the next one; before a measurement or a save,
and at the end of a run, the loop waits for those of the last step.
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
from polargrad_dist.errors import CheckpointError
from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.advice import slow_roles
from polargrad_dist.trainer.checkpoint import CheckpointStore, restore_rng_state, rng_state
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.evaluation import evaluate
from polargrad_dist.trainer.guard import Guard
from polargrad_dist.trainer.header import facts_of, header, read_facts, write_facts
from polargrad_dist.trainer.health import poisoned
from polargrad_dist.trainer.interfaces import Batch, Data, Outcome, Progress, identity_of
from polargrad_dist.trainer.interval import Interval
from polargrad_dist.trainer.measure import Evaluator
from polargrad_dist.trainer.metrics import Metrics
from polargrad_dist.trainer.output import start_log
from polargrad_dist.trainer.preflight import check_lengths
from polargrad_dist.trainer.profiling import PREFIX, Profile
from polargrad_dist.trainer.signals import PREEMPTED, LeaveRequest
from polargrad_dist.trainer.stepping import Stepper, Told
from polargrad_dist.trainer.strategies import build
from polargrad_dist.trainer.world import World, seed_everything
from polargrad_dist.trainer.wrapped import Wrapped

log = logging.getLogger("polargrad_dist.trainer")

# Seconds that a start waits for another process in its run directory
PATIENCE = 60.0


class Trainer:
    """Trains ``model`` on ``data`` for ``config.steps`` steps; resumes from the run directory if it holds a checkpoint.

    configuration: the whole run's, JSON-able, stored in the run directory and in every checkpoint.
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
        self.config, self.rules, self.data, self.world = config, optimizer, data, world
        self.run_dir, self.configuration = Path(config.run_dir), configuration
        self.hold = rundir.Hold(self.run_dir, min(PATIENCE, 30 * config.strategy.timeout_minutes))
        try:
            self._on_main(self.hold.take)
            self._build(model, optimizer)
        except BaseException:
            self.hold.abandon()
            raise

    def _build(self, model: nn.Module, optimizer: OptimizerConfig) -> None:
        """Builds everything up to the first step, with the run directory locked."""
        config, world = self.config, self.world
        resume = config.checkpoint.resume
        self._on_main(lambda: rundir.check(self.run_dir, self.configuration, config.allow_changes, resume))
        world.together(lambda: start_log(self.run_dir, world.rank))
        self.run_id = self._on_main(lambda: rundir.run_id(self.run_dir))
        self.bare = model
        self.placed, self.optimizer = build(model, optimizer, config, world)
        self.diagnostics = Diagnostics(self.optimizer, config.diagnostics)
        self.wrapped = Wrapped(model, config)
        self.progress = Progress()
        self.interval = Interval(config, world, model, self.optimizer)
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
        self.guard = Guard(config.safety, world, self.progress, self.store, self.tensors)
        self.stepper = Stepper(
            config,
            self.placed,
            self.optimizer,
            self.diagnostics,
            world,
            self.progress,
            self.guard,
            self.wrapped,
            self._heard,
        )

    def _on_main(self, fn: Callable[[], Any]) -> Any:
        """Runs ``fn`` on rank 0; returns its result, or raises its error, on every rank."""
        return self.world.gather(self.world.together(lambda: fn() if self.world.is_main else None))[0]

    def fit(self) -> Outcome:
        """Trains to the last step, or until asked to leave.

        Raises ``TrainingError`` after too many skipped steps in a row, and for non-finite weights.
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
        metrics = self.metrics = Metrics(
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
        saved = False
        try:
            if progress.owing:
                with self.wrapped.used(progress.step):
                    self._measure(leave)
            while progress.step < config.steps and not self._stop:
                self.world.at(f"step {progress.step + 1}")
                with record_function(f"{PREFIX}whole"):
                    self._step(batches, leave)
                profile.step()
                self._made = True
                progress.step += 1
                progress.sample += config.global_batch
                self._validate_and_save(leave)
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
        return self._outcome(saved, leave if self._stop else None)

    def _introduce(self) -> None:
        """Writes the run's description to the log and, if this start has anything to do, to ``run.json``."""
        given = (self.config, self.world, self.bare, self.optimizer, self.data, self.configuration)
        expected = self._on_main(self.expect) if self.expect else {}
        facts = facts_of(*given, self.run_id, self.progress.step, expected)
        # A start of a finished run, on one rank say, must not pass for how it was trained
        idle = self.progress.step >= self.config.steps and not self.progress.owing
        self._on_main(lambda: None if idle and read_facts(self.run_dir) else write_facts(self.run_dir, facts))
        if self.world.is_main:
            log.info("this run:\n%s", header(facts))

    def _outcome(self, saved: bool, left: LeaveRequest | None) -> Outcome:
        """The exit code, with a line in the log if the run did not end as planned."""
        config, step, kept = self.config, self.progress.step, self.store.last_saved
        unfinished = step < config.steps or self.progress.owing
        if not self._made and not self.progress.owing and not self._due:
            return Outcome(0, step, self.validated)
        code = PREEMPTED if unfinished else 0
        if self._due and unfinished:
            log.warning("the last steps were skipped, so nothing new is saved: %s is on disk", kept)
        elif self._due:
            log.error(
                "the run ended in %s: its weights are not kept; %s", self._unproved, self.guard.way_back()
            )
            code = 1
        elif not saved or kept != step:
            log.error("the last checkpoint could not be written: %s is on disk", kept)
            code = 1
        elif left is not None:
            log.info("asked to leave (%s): saved at step %d of %d", left.reason, step, config.steps)
        return Outcome(code, step, self.validated)

    def _step(self, batches: Iterator[Batch], leave: LeaveRequest) -> None:
        self.stepper.take(batches, leave)

    # Around the steps

    def _heard(self, told: Told) -> None:
        """Handles a step's figures: stops if a rank was asked to leave, and writes a row to the sinks if one is due."""
        self._stop |= told.asked
        self.metrics.console.tick(told.record)
        if self._spectra_due(told.record["step"]):
            told.record["polar"] = self.optimizer.stats()
            self._advise(told.record)
        if (row := self.interval.add(told.record, told.period)) is not None:
            self.metrics.write(row)

    def _advise(self, record: dict[str, Any]) -> None:
        """Warns, once a start, of rates that are far too low."""
        sentences = slow_roles(self.rules, record["polar"], record["step"])
        if sentences and self.world.is_main and not self._advised:
            self._advised = True
            for sentence in sentences:
                log.warning("%s", sentence)

    _stop = False
    _advised = False
    _due = False
    _made = False
    # Writes the run's HTML report, for sinks with ``attach``.
    report: Callable[[Path], Path] | None = None
    # What the run is expected to need on this device, as `estimate.expected` says; asked on rank 0.
    expect: Callable[[], dict[str, Any]] | None = None
    _unproved = ""

    def _spectra_due(self, step: int) -> bool:
        every = self.config.logging.stats_every
        return every > 0 and step % every == 0

    def _validate_and_save(self, leave: LeaveRequest) -> None:
        """Does what is due after a step. A run that is asked to leave saves, and leaves validation to the next start."""
        config, step = self.config, self.progress.step
        last = step == config.steps
        due = config.evaluation.due(step, config.steps)
        self.progress.validation_owed = due and self.data.validation is not None
        self.progress.look_owed = self.evaluator.due(step)
        due = self.progress.validation_owed
        self._due |= (
            self._stop or last or bool(config.checkpoint.every and step % config.checkpoint.every == 0)
        )
        if self._due or self.progress.owing or self._spectra_due(step):
            self.stepper.finish()
            self._due |= self._stop
        if self.progress.owing and not self._stop:
            with self.stepper.phases("evaluation"), self.wrapped.used(step):
                self._measure(leave)
        loss = self.validated["validation_loss"] if due and not self.progress.validation_owed else None
        self._due |= self._stop
        self._unproved = self._doubt(loss, final=last)
        if self._due and not self._unproved:
            self.world.at(f"the save of step {step}")
            with self.stepper.phases("saving"):
                self.save(loss)
            self._due = False

    def _measure(self, leave: LeaveRequest) -> None:
        """Does the measurements that are due, unless a rank is asked to leave meanwhile."""
        step = self.progress.step
        if self.progress.validation_owed:
            figures = self.evaluate(lambda: leave.asked)
            named = None if figures is None else self.evaluator.named(step, lambda: leave.asked)
            if figures is None or named is None:
                self._stop = True
                return
            self.validated, self.progress.validation_owed = figures, False
            self.metrics.write({"step": step, **figures, **named})
            if step == self.config.steps and not math.isfinite(figures["validation_loss"]):
                self._due, self._unproved = True, self._doubt(figures["validation_loss"], final=True)
        if self.progress.look_owed:
            looked = self.evaluator.look(step, lambda: leave.asked)
            if looked is None:
                self._stop = True
                return
            self.progress.look_owed = False
            if looked:
                self.metrics.write({"step": step, **looked})

    def _doubt(self, loss: float | None, final: bool) -> str:
        """Why the weights must not be saved; empty if they may.

        After a skipped step the weights may be its cause, and saving them would push out good checkpoints: the save waits
        for the next applied step, or after the last step for a finite validation loss.
        """
        if loss is not None and not math.isfinite(loss):
            return f"a validation loss of {loss}"
        if self.progress.skipped_in_a_row and not (final and loss is not None):
            return "skipped steps"
        return ""

    def evaluate(self, asked: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """The validation loss and, where known, bits per byte; None if a rank was ``asked`` to leave meanwhile."""
        done = self.progress.step / self.config.steps
        return evaluate(self.placed, self.data.validation, self.world, done, asked)

    # Saving and resuming

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint, as this rank stores it."""
        tensors = {f"model/{name}": tensor for name, tensor in self.placed.weights().items()}
        tensors |= self.wrapped.tensors()
        return tensors | {f"optim/{name}": tensor for name, tensor in self.optimizer.named_state().items()}

    def save(self, validation_loss: float | None = None) -> None:
        """Saves a checkpoint of this step, unless there is one already.

        Raises ``TrainingError`` if a weight or optimizer state is not finite on any rank.
        """
        step = self.progress.step
        if self.store.last_saved == step:
            return
        tensors = self.tensors()
        self.guard.refuse_poisoned(tensors, f"step {step} is not saved")
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
        self.wrapped.check_saved(path)
        loaded = self.store.load(path, tensors)
        self.placed.restored(tensors)
        if (where := poisoned(self.world, tensors)) is not None:
            raise CheckpointError(
                f"{path} holds {where} that is not finite: resume from an older one with trainer.checkpoint.resume=PATH"
            )
        try:
            self.progress.__dict__.update(vars(Progress(**loaded.objects["progress"])))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} has malformed progress ({error}), expected a checkpoint of this trainer: choose another"
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
