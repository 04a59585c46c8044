"""The trainer's configuration: typed, documented, and checked before anything is built."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from polargrad_dist.diagnostics import DiagnosticsConfig
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.around import AverageConfig, LookaheadConfig, check_around
from polargrad_dist.optim.schedules import ScheduleConfig
from polargrad_dist.trainer.checkpoint import CheckpointConfig, checkpoints_in
from polargrad_dist.trainer.launcher import check_launcher
from polargrad_dist.words import counted


@dataclass
class StrategyConfig:
    """How the model is replicated or sharded.

    Args:
        name: "ddp": a copy on every rank; "fsdp": FSDP2, sharded by block over all ranks; "hsdp": sharded within groups of
            ranks and replicated between them; "deepspeed": DeepSpeed's ZeRO.
        zero_stage: what "deepspeed" shards: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too. Defaults to 2.
        replicas: copies of the model under "hsdp"; the world size must be a multiple of it.
        reshard_after_forward: free gathered parameters between forward and backward (less memory, more traffic).
        cpu_offload: keep sharded parameters, gradients and optimizer state in host memory.
        timeout_minutes: how long a rank waits for the others before it names the missing ones and ends. Only the wait for
            data preparation may be longer, and is logged.
    """

    name: Literal["ddp", "fsdp", "hsdp", "deepspeed"] = "ddp"
    replicas: int = 1
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    timeout_minutes: float = 10.0
    # Last: earlier versions had the fields before it in this order.
    zero_stage: int | None = None

    @property
    def zero_stage_or_default(self) -> int:
        return 2 if self.zero_stage is None else self.zero_stage


@dataclass
class EvaluationConfig:
    """When the validation loss is measured.

    Args:
        every: steps between validations; 0 for only at the end.
        late_every: steps between validations in the last tenth of the run; 0 for the same as ``every``.
        at_end: also validate after the last step.
        hellaswag: file of JSON lines in HellaSwag's format (ctx or ctx_a and ctx_b, endings, label); null for none.
        hellaswag_every: steps between HellaSwag evaluations; 0 for only at the end.
        hellaswag_items: number of questions, from the start of the file; null for all.
    """

    every: int = 250
    late_every: int = 0
    at_end: bool = True
    hellaswag: str | None = None
    hellaswag_every: int = 1000
    hellaswag_items: int | None = None

    def due(self, step: int, steps: int) -> bool:
        """Whether the validation loss is measured after ``step`` of ``steps``."""
        every = (self.late_every if 10 * step >= 9 * steps else 0) or self.every
        return bool(every and step % every == 0) or (step == steps and self.at_end)


@dataclass
class SamplesConfig:
    """Text sampled from the model during training: in the log, the report, TensorBoard and wandb.

    Args:
        every: steps between samples; 0 for never.
        prompts: texts to continue; an empty one starts a document.
        tokens: tokens to generate for each prompt.
        temperature: 0 always takes the likeliest token.
        top_k: sample from the k likeliest tokens only; null for all.
        top_p: sample from the likeliest tokens that together have this probability; null for all.
        seed: random seed of the sampling, the same at every step.
    """

    every: int = 0
    prompts: list[str] = field(default_factory=lambda: [""])
    tokens: int = 64
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises ``ConfigError`` for an invalid value."""
        for name, good, expected in (
            ("every", self.every >= 0, "a whole number >= 0"),
            ("prompts", len(self.prompts) > 0, "at least one text"),
            ("tokens", self.tokens >= 1, "a whole number >= 1"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number >= 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a whole number >= 1, or null"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a number in (0, 1], or null"),
            ("seed", 0 <= self.seed < 2**63, "a whole number in [0, 2**63)"),
        ):
            if not good:
                raise ConfigError(f"trainer.samples.{name} is {getattr(self, name)!r}, expected {expected}")


@dataclass
class LoggingConfig:
    """Where metrics go; ``metrics.jsonl`` in the run directory is always written.

    Args:
        every: steps between rows of metrics.
        stats_every: steps between rows with nuclear norm, condition number and residual per role; 0 for never.
        progress: "auto" shows a progress bar on a terminal and lines elsewhere; "bar", "lines" or "off" force one.
        tensorboard: also write TensorBoard events into the run directory.
        wandb: also log to wandb, "online" or "offline" (into a folder that `wandb sync` uploads).
        wandb_project: project on wandb.
        wandb_name: name of the run on wandb. Defaults to the run directory's.
        profile: steps to trace with torch's profiler, after two warm-up steps; 0 for none. Also ``--profile N``.
    """

    every: int = 10
    stats_every: int = 50
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    tensorboard: bool = False
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "polargrad-dist"
    wandb_name: str | None = None
    profile: int = 0


@dataclass
class SafetyConfig:
    """When to skip a step or abort.

    Args:
        max_skipped: number of skipped steps in a row after which the run aborts; the last good checkpoint stays intact.
        spike_sigma: also skip a step whose loss is this many standard deviations above the mean of the last
            ``spike_window`` losses; null for never.
        spike_window: number of previous losses that a spike is measured against.
    """

    max_skipped: int = 10
    spike_sigma: float | None = None
    spike_window: int = 128


@dataclass
class TrainerConfig:
    """The run itself.

    Args:
        run_dir: folder for the run's configuration, metrics, log and checkpoints.
        steps: total number of optimizer steps.
        global_batch: sequences per optimizer step, over all ranks and micro-batches.
        micro_batch: largest number of sequences per forward pass on one rank; fewer where a rank's share of the global batch
            is not a multiple of it, as after a restart on more ranks. Gradients are accumulated to the global batch.
        sequence_length: tokens per sequence.
        seed: random seed of the initial weights, the order of the data and dropout.
        precision: "fp32"; "bf16-mixed": fp32 weights, bf16 matrix products; "bf16": bf16 weights, exactly accumulated.
        tf32: on a GPU, round the inputs of fp32 matrix products to TF32's 10 bits: several times faster, and relevant with
            precision "fp32" only. Exact polar factors never use it.
        clip_norm: largest global norm of the gradient, clipped before the oracle; null for no clipping.
        compile: compile each block with torch.compile.
        activation_checkpointing: recompute each block's activations in backward.
        device: "auto" uses a GPU if there is one.
        allow_changes: run even if the run directory holds another configuration.
        schedule: learning-rate and momentum schedule.
        lookahead: EMA-Nesterov around the optimizer.
        average: an average of the last weights, for validation and export.
        strategy: ddp, fsdp, hsdp or deepspeed.
        evaluation: validation.
        samples: text sampled from the model during training.
        logging: metrics.
        diagnostics: condition numbers, norms and orthogonality of selected matrices.
        checkpoint: saving and resuming.
        safety: when to skip a step or abort.
    """

    run_dir: str = "runs/default"
    steps: int = 1000
    global_batch: int = 32
    micro_batch: int = 8
    sequence_length: int = 256
    seed: int = 0
    precision: Literal["fp32", "bf16-mixed", "bf16"] = "fp32"
    tf32: bool = False
    clip_norm: float | None = 1.0
    compile: bool = False
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    allow_changes: bool = False
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    lookahead: LookaheadConfig = field(default_factory=LookaheadConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)

    def __post_init__(self) -> None:
        self.run_dir = os.path.expanduser(self.run_dir)

    @property
    def resumes(self) -> bool:
        """Whether the run resumes from a checkpoint, whose weights replace any initial ones."""
        return self.checkpoint.resume not in ("auto", "never") or bool(
            checkpoints_in(Path(self.run_dir) / "checkpoints")
        )

    def check(self, world: int) -> None:
        """Raises ``ConfigError`` for what cannot run on ``world`` ranks, naming the key and the expected value."""
        if not self.run_dir.strip():
            raise ConfigError("trainer.run_dir is empty, expected the folder that this run writes into")
        if "://" in self.run_dir:
            raise ConfigError(
                f"trainer.run_dir is {self.run_dir}, expected a folder on a file system that every rank sees, since object "
                "stores cannot rename and lock: train in a folder, and upload the run when it has ended"
            )
        for name in ("steps", "global_batch", "micro_batch", "sequence_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name} is {getattr(self, name)}, expected a whole number >= 1")
        for name, value, least in (
            ("logging.every", self.logging.every, 1),
            ("logging.stats_every", self.logging.stats_every, 0),
            ("evaluation.every", self.evaluation.every, 0),
            ("evaluation.late_every", self.evaluation.late_every, 0),
            ("evaluation.hellaswag_every", self.evaluation.hellaswag_every, 0),
            ("evaluation.hellaswag_items", self.evaluation.hellaswag_items or 1, 1),
            ("logging.profile", self.logging.profile, 0),
            ("safety.max_skipped", self.safety.max_skipped, 1),
            ("safety.spike_window", self.safety.spike_window, 2),
        ):
            if value < least:
                raise ConfigError(f"trainer.{name} is {value}, expected a whole number >= {least}")
        self.samples.check()
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"trainer.seed is {self.seed}, expected a whole number in [0, 2**32)")
        if not 0 < self.strategy.timeout_minutes < 1e6:
            raise ConfigError(
                f"trainer.strategy.timeout_minutes is {self.strategy.timeout_minutes}, expected a number in (0, 1e6)"
            )
        if self.global_batch % (world * self.micro_batch):
            near = max(1, round(self.global_batch / (world * self.micro_batch))) * world * self.micro_batch
            raise ConfigError(
                f"trainer.global_batch is {self.global_batch}, expected a multiple of world size x trainer.micro_batch = "
                f"{world} x {self.micro_batch} = {world * self.micro_batch}: set it to {near}, or change micro_batch"
            )
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ConfigError(
                f"trainer.clip_norm is {self.clip_norm}, expected a number > 0, or null for no clipping"
            )
        if self.safety.spike_sigma is not None and not 0 < self.safety.spike_sigma < math.inf:
            raise ConfigError(
                f"trainer.safety.spike_sigma is {self.safety.spike_sigma}, expected a number > 0, or null"
            )
        replicas = self.strategy.replicas
        if self.strategy.name == "hsdp" and (replicas < 2 or world % replicas or world // replicas < 2):
            raise ConfigError(
                f"trainer.strategy.replicas is {replicas} on {counted(world, 'rank')}, expected a divisor of the world size "
                "with at least 2 replicas of at least 2 shards each: set it so, have torchrun or --dry_run use more ranks, "
                "or use strategy 'fsdp' or 'ddp'"
            )
        if self.strategy.name != "hsdp" and replicas != 1:
            raise ConfigError(
                f"trainer.strategy.replicas is {replicas} with strategy {self.strategy.name!r}, expected 1: replicas are "
                "for 'hsdp'"
            )
        self._check_deepspeed()
        if self.strategy.name == "ddp" and self.strategy.cpu_offload:
            raise ConfigError(
                "trainer.strategy.cpu_offload is true with strategy 'ddp', expected 'fsdp' or 'hsdp'"
            )
        self.diagnostics.check()
        self.schedule.check(self.steps)
        check_around(self.lookahead, self.average, self.steps)
        if self.lookahead.beta and self.precision == "bf16":
            raise ConfigError(
                f"trainer.lookahead.beta is {self.lookahead.beta} with precision 'bf16', whose weights would round the "
                "look-ahead away, expected 'bf16-mixed' or 'fp32'"
            )
        check_launcher(self, world)

    def _check_deepspeed(self) -> None:
        strategy = self.strategy
        if strategy.name != "deepspeed":
            if strategy.zero_stage is not None:
                raise ConfigError(
                    f"trainer.strategy.zero_stage is {strategy.zero_stage} with strategy {strategy.name!r}, expected null: "
                    "stages are for 'deepspeed'"
                )
            return
        stage = strategy.zero_stage_or_default
        if stage not in (0, 1, 2, 3):
            raise ConfigError(f"trainer.strategy.zero_stage is {stage}, expected 0, 1, 2 or 3")
        for there, what, way in (
            (self.precision == "bf16", "precision 'bf16'", "use 'bf16-mixed' or 'fp32'"),
            (self.compile, "compile", "set it to false, or use strategy 'ddp' or 'fsdp'"),
            (
                stage == 3 and self.activation_checkpointing,
                "activation_checkpointing at ZeRO stage 3",
                "take a lower stage, or use strategy 'fsdp'",
            ),
            (
                stage == 0 and strategy.cpu_offload,
                "strategy.cpu_offload at ZeRO stage 0",
                "take a higher stage",
            ),
            (not strategy.reshard_after_forward, "strategy.reshard_after_forward false", "it is for FSDP2"),
            (
                self.lookahead.beta,
                "lookahead.beta above 0",
                "set it to 0, or use strategy 'ddp' or 'fsdp', whose weights are the model's own",
            ),
            (
                stage == 3 and self.average.start is not None,
                "average.start at ZeRO stage 3",
                "take a lower stage, or use strategy 'fsdp'",
            ),
        ):
            if there:
                raise ConfigError(
                    f"trainer has {what} with strategy 'deepspeed', which is not supported: {way}"
                )

    def for_world(self, world: int) -> TrainerConfig:
        """The same run on ``world`` ranks: the same global batch, in the largest micro-batches up to the configured ones.

        Raises ``ConfigError``, with world sizes that fit, where the ranks cannot share the global batch evenly.
        """
        if self.global_batch < 1 or self.micro_batch < 1:
            # For `check` to refuse
            return self
        if self.global_batch % world:
            fit = [n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]
            *near, most = sorted(sorted(fit, key=lambda n: (abs(n - world), n))[:4])
            raise ConfigError(
                f"trainer.global_batch is {self.global_batch}, which {world} ranks cannot share evenly: start "
                f"{' or '.join([*map(str, near), counted(most, 'rank')])}, or choose another global_batch"
            )
        share = self.global_batch // world
        micro = next(n for n in range(min(self.micro_batch, share), 0, -1) if share % n == 0)
        return replace(self, micro_batch=micro)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.global_batch * self.sequence_length

    def accumulation(self, world: int) -> int:
        """Micro-batches per step on each of ``world`` ranks."""
        return self.global_batch // (world * self.micro_batch)
