"""Section 2: whole training steps of the paper's models at full size: loss, forward, backward, optimizer, memory, MFU."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.measure import Line, Setting, launches_and_idle, seconds
from benchmarks.gpu.predicted import predictions
from models import LanguageModel, ModelConfig, build_model
from models.loss import loss_sum
from polargrad_dist import OptimizerConfig, PolarGrad
from polargrad_dist.trainer import TrainerConfig
from polargrad_dist.trainer.phases import peak_flops

SECTION = "steps"


class Run(NamedTuple):
    """One model and micro-batch. ``record`` is the published time of its step on one of 8 H100, in seconds."""

    architecture: Any
    sequences: int
    length: int
    steps: int
    mfu: float | None
    record: float | None = None


# modded-nanoGPT's record of 2025-01-04: 148 ms for 65,536 tokens on each GPU.
FULL = (
    Run("gpt2-small", 64, 1024, 5, 0.36, 0.148),
    Run("gpt2-small", 128, 1024, 5, 0.36),
    Run("qwen2.5", 16, 512, 5, None),
    Run("qwen2.5", 8, 2048, 5, 0.40),
    Run("gpt2-medium", 32, 1024, 20, None),
)
REDUCED = (
    Run("gpt2-small", 2, 128, 2, 0.36, 0.148),
    Run("qwen2.5", 2, 64, 2, 0.40),
    Run("gpt2-medium", 2, 128, 2, None),
)
TINY = {"vocab_size": 256, "width": 64, "layers": 4, "heads": 2, "max_sequence_length": 128, "end_of_text": 0}


def run(setting: Setting) -> list[Line]:
    """Measures each model; memory is freed in between."""
    lines: list[Line] = []
    for case in REDUCED if setting.reduced else FULL:
        lines += measure(case, setting)
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return lines


def configured(case: Run, setting: Setting) -> ModelConfig:
    sizes: dict[str, Any] = dict(TINY) if setting.reduced else {}
    if case.architecture == "qwen2.5" and not setting.reduced:
        sizes["max_sequence_length"] = case.length
    return ModelConfig(case.architecture, **sizes)


def built(case: Run, setting: Setting) -> LanguageModel:
    torch.manual_seed(0)
    model = build_model(configured(case, setting), device=setting.device)
    if setting.device.type == "cuda":
        model.compile_blocks()
    return model


def measure(case: Run, setting: Setting) -> list[Line]:
    gpu = setting.device.type == "cuda"
    name = f"{case.architecture}, {case.sequences} x {case.length}"
    model = built(case, setting)
    tokens = torch.randint(0, model.vocab_size, (case.sequences, case.length), device=setting.device)
    lines = losses(name, case, model, tokens, setting)

    def forward_backward() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=gpu):
            loss = model(tokens, tokens.roll(-1, 1), progress=0.5)
        loss.backward()

    work = seconds(forward_backward, setting)
    optimizer = PolarGrad.from_config(model, OptimizerConfig())
    ours = seconds(optimizer.step, setting)

    def step() -> None:
        optimizer.zero_grad()
        forward_backward()
        optimizer.step()

    if gpu:
        torch.cuda.reset_peak_memory_stats()
    whole = seconds(step, setting, case.steps)
    memory = float(torch.cuda.max_memory_allocated()) if gpu else 0.0
    lines += [
        Line(SECTION, name, "whole step", 1e3 * whole, "ms"),
        Line(SECTION, name, "forward and backward", 1e3 * work, "ms"),
        Line(SECTION, name, "optimizer step, default recipe, one GPU for all matrices", 1e3 * ours, "ms"),
        Line(SECTION, name, "optimizer step, fused AdamW", 1e3 * adamw(model, setting), "ms"),
    ]
    started, idle = launches_and_idle(optimizer.step, setting)
    lines.append(Line(SECTION, name, "optimizer step: kernels started", started, ""))
    if gpu:
        lines += on_a_gpu(name, case, model, work, whole, memory, idle, setting)
    config = TrainerConfig(
        global_batch=case.sequences, micro_batch=case.sequences, sequence_length=case.length, precision="bf16-mixed",
        clip_norm=None, compile=gpu,
    )  # fmt: skip
    compared = predictions(
        SECTION, name, configured(case, setting), OptimizerConfig(), config, setting, memory, whole
    )
    return lines + compared


def on_a_gpu(
    name: str,
    case: Run,
    model: LanguageModel,
    work: float,
    whole: float,
    memory: float,
    idle: float,
    setting: Setting,
) -> list[Line]:
    """Memory, idle share, utilization, and time against the record."""
    lines = [
        Line(SECTION, name, "peak memory", memory / 2**30, "GiB"),
        Line(SECTION, name, "GPU idle during the optimizer step", idle, ""),
    ]
    best = peak_flops(setting.device)
    if best is not None:
        count = case.sequences * case.length
        mfu = model.flops_per_token(case.length) * count / whole / best
        goal = {} if case.mfu is None else setting.goal(f">= {case.mfu:g}", mfu >= case.mfu)
        lines.append(Line(SECTION, name, "MFU of the whole step", mfu, "", **goal))
    if case.record is not None:
        limit = 1.05 * case.record
        lines.append(
            Line(
                SECTION,
                name,
                "forward and backward",
                work,
                "s",
                **setting.goal(f"<= {limit:.3f} s", work <= limit),
            )
        )
    return lines


def losses(name: str, case: Run, model: LanguageModel, tokens: torch.Tensor, setting: Setting) -> list[Line]:
    """Only the head and the loss with gradients, on random hidden states, compiled and eager."""
    weight = model.get_output_embeddings().weight
    dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32
    hidden = torch.randn(
        tokens.numel(), weight.shape[1], device=setting.device, dtype=dtype, requires_grad=True
    )
    head = weight.detach().to(dtype).requires_grad_()

    def loss(compiled: bool) -> None:
        backend = "inductor" if compiled else None
        loss_sum(hidden, head, tokens.flatten(), model.soft_cap, backend=backend).backward()
        hidden.grad = head.grad = None

    kinds = [False] if setting.device.type == "cpu" else [False, True]
    return [
        Line(
            SECTION,
            name,
            f"loss, {'compiled' if kind else 'eager'}",
            1e3 * seconds(partial(loss, kind), setting, 3),
            "ms",
        )
        for kind in kinds
    ]


def adamw(model: LanguageModel, setting: Setting) -> float:
    """Seconds of a step of torch's AdamW on the same parameters; fused on a GPU."""
    baseline = torch.optim.AdamW(
        (p for p in model.parameters() if p.grad is not None), lr=0.0, fused=setting.device.type == "cuda"
    )
    return seconds(baseline.step, setting)
