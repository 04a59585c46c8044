"""What `--dry_run` says of memory and time, against what autograd really keeps and against a sum by hand."""

from dataclasses import replace

import pytest
import torch

from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.trainer.dry_run import dry_run
from polargrad_dist.trainer.estimate import DEVICES, Work, activations
from tests.models.tiny import tiny
from tests.trainer.toy import ToyModel, settings


def really_kept(model, config) -> int:
    """Bytes of distinct storages that a real forward pass saves, parameters left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address comes twice
        return x

    tokens = torch.zeros(config.micro_batch, config.sequence_length, dtype=torch.int64)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), mixed:
        model(tokens, tokens, progress=1.0)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("architecture", ["gpt2-small", "qwen2.5"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_activations_are_those_that_autograd_keeps(tmp_path, architecture, precision):
    config = settings(tmp_path, precision=precision, sequence_length=64)

    def build(device):
        return tiny(architecture)

    real = really_kept(build("cpu"), config)
    assert real > 1e5
    assert abs(activations(build, config) / real - 1) < 0.01
    assert activations(build, replace(config, micro_batch=12)) > 3 * activations(build, config)


def test_checkpointed_blocks_keep_less(tmp_path):
    config = settings(tmp_path, sequence_length=64)
    whole = activations(lambda device: tiny("gpt"), config)
    assert (
        activations(lambda device: tiny("gpt"), replace(config, activation_checkpointing=True)) < 0.6 * whole
    )


def test_a_dry_run_adds_up_memory_and_says_what_fits(tmp_path, capsys):
    config = settings(tmp_path, device="auto", micro_batch=12, sequence_length=64)

    def build(device):
        with torch.device(device):
            return tiny("gpt")

    assert dry_run(build, OptimizerConfig(), config, 1) == 0
    printed = capsys.readouterr().out
    for what in (
        "activations of a micro-batch",
        "a piece of the logits",
        "the optimizer's buffers",
        "at the peak",
    ):
        assert f"bytes per rank, {what}: " in printed
    assert "time per step, 1 x H100 SXM: about" in printed
    assert "does not fit" not in printed
    assert "not measured" in printed


def test_a_model_that_cannot_run_without_memory_is_said_to_be_one(tmp_path, capsys):
    class Reads(ToyModel):
        def forward(self, tokens, targets, *, progress=0.0):
            return super().forward(tokens, targets, progress=progress) * float(tokens.float().mean().item())

    def build(device):
        with torch.device(device):
            return Reads()

    assert dry_run(build, OptimizerConfig(), settings(tmp_path, device="cpu"), 2) == 0
    printed = capsys.readouterr().out
    assert "activations: not known, since the model does not run on meta tensors" in printed
    assert "time per step" not in printed


def test_the_time_of_a_step_is_the_sum_of_its_parts():
    h100 = next(device for device in DEVICES if device.name == "H100 SXM")
    work = Work(model=0.4 * 989e12, oracle=67e12, moved=3.35e12, travelling=0.7 * 450e9)
    assert work.seconds(h100, "bf16-mixed") == pytest.approx(4.0)
    assert work.seconds(h100, "fp32") == pytest.approx(3.0 + 989 / 67)
