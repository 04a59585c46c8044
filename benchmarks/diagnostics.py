"""Cost of the diagnostics of condition numbers: `python -m benchmarks.diagnostics [--json FILE]`.

Whole training steps (forward, backward, clipping, optimizer) of a Qwen2.5-style and a GPT-2-style model on one process, with
and without diagnostics of the default matrices, which run once every `DiagnosticsConfig.every` steps.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import Row, arguments, interleaved, report
from models import ModelConfig, build_model
from polargrad_dist.diagnostics import Diagnostics, DiagnosticsConfig
from polargrad_dist.optim import OptimizerConfig, PolarGrad

# Sequences x length. The step is short for the model, so the measured share is an upper bound.
TOKENS = (
    8,
    256,
)
CASES = {
    "Qwen2.5-style, 16384 x 256": ModelConfig(
        vocab_size=16384, width=256, layers=4, heads=4, max_sequence_length=256
    ),
    "GPT-2-style, 12288 x 384": ModelConfig(
        architecture="gpt2-small", vocab_size=12288, width=384, layers=6, heads=6, end_of_text=0
    ),
}


def measure(name: str, config: ModelConfig, rounds: int) -> Row:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config).to(device)
    optimizer = PolarGrad.from_config(model, OptimizerConfig())
    settings = DiagnosticsConfig()
    diagnostics = Diagnostics(optimizer, settings)
    tokens = torch.randint(0, config.vocab_size or 1, TOKENS, device=device)

    def step(look: bool) -> None:
        optimizer.zero_grad()
        model(tokens, tokens, progress=0.0).backward()
        optimizer.clip_grad_norm_(1.0)
        if look:
            diagnostics.before_step()
        optimizer.step()
        if look:
            diagnostics.after_step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    found = interleaved({"plain": partial(step, False), "looked at": partial(step, True)}, rounds)
    extra = max(0.0, found["looked at"] / found["plain"] - 1)
    note = f"one diagnosis: {extra:.0%} of a step; {len(diagnostics.works)} matrices, every {settings.every} steps"
    return Row(name, "step time with diagnostics", "without", 1 + extra / settings.every, "<= 1.02", note)


def main() -> None:
    options = arguments("Cost of diagnostics.").parse_args()
    report(
        "diagnostics", [measure(name, config, options.rounds) for name, config in CASES.items()], options.json
    )


if __name__ == "__main__":
    main()
