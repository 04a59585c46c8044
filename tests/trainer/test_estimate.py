"""What `--dry_run` says of memory and time, against what autograd really keeps and against a sum by hand."""

from dataclasses import replace

import pytest
import torch

from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.trainer.config import StrategyConfig
from polargrad_dist.trainer.devices import DEVICES, device_of
from polargrad_dist.trainer.dry_run import dry_run
from polargrad_dist.trainer.estimate import Memory, Work, activations, estimate, expected, facts_on
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


def placed(architecture="gpt"):
    def build(device):
        with torch.device(device):
            return tiny(architecture)

    return build


def shown(capsys, build, config, ranks) -> str:
    """What a dry run prints."""
    assert dry_run(build, OptimizerConfig(), config, ranks) == 0
    return capsys.readouterr().out


def test_the_total_of_the_memory_table_is_the_sum_of_its_lines(tmp_path, capsys):
    config = settings(tmp_path, device="auto", micro_batch=12, sequence_length=64)
    found = estimate(placed(), OptimizerConfig(bucket_mb=0.01), config, 1).memory
    assert dry_run(placed(), OptimizerConfig(bucket_mb=0.01), config, 1) == 0
    printed = capsys.readouterr().out
    sizes = [
        int(line.split()[-2 if line.endswith("uncompiled") else -1].replace(",", ""))
        for line in printed.splitlines()
        if line.startswith(("parameters (", "gradients (", "optimizer state", "activations", "largest piece"))
    ]
    assert len(sizes) == 5
    assert sum(sizes) == found.total
    (total,) = [line for line in printed.splitlines() if line.startswith("total")]
    assert f"{found.total:,}" in total
    parameters = sum(p.numel() for p in tiny("gpt").parameters())
    assert found.lasting["parameters"] == found.lasting["gradients"] == 4 * parameters
    assert "parameters (float32)" in printed


def test_parameters_in_bf16_are_counted_in_bf16(tmp_path, capsys):
    config = settings(tmp_path, device="auto", precision="bf16", sequence_length=64)
    printed = shown(capsys, placed(), config, 1)
    parameters = sum(p.numel() for p in tiny("gpt").parameters())
    (line,) = [line for line in printed.splitlines() if line.startswith("parameters (bfloat16)")]
    assert line.split()[-1] == f"{2 * parameters:,}"


def test_buffers_are_not_added_to_activations_that_are_gone_by_then():
    lasting = {"parameters": 40, "gradients": 40, "optimizer": 10}
    assert Memory(lasting, activations=7, loss=3, buffers=9).total == 100
    assert Memory(lasting, activations=7, loss=3, buffers=30).total == 120
    assert Memory(lasting, activations=7, loss=3, buffers=30, offloaded=True).total == 30
    assert not Memory(lasting, activations=None, loss=3, buffers=30).whole


def test_each_known_gpu_has_a_verdict_with_what_is_left_and_a_time(tmp_path, capsys):
    config = settings(tmp_path, device="auto", sequence_length=64, global_batch=12, micro_batch=6, steps=3600)
    printed = shown(capsys, placed(), config, 2)
    found = estimate(placed(), OptimizerConfig(), config.for_world(2), 2)
    for device in DEVICES:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"2 x {device.name} ")]
        seconds = found.seconds(device, config.precision)
        assert "  fits  " in line
        assert f"{(device.memory - found.memory.total) / 2**30:,.1f}" in line.split()
        assert f"{12 * 64 / seconds:,.0f}" in line.split()
    assert "not measured" in printed


def test_a_run_that_is_too_large_for_a_gpu_is_said_not_to_fit(tmp_path, capsys, monkeypatch):
    small = replace(DEVICES[0], name="small", memory=1e6)
    monkeypatch.setattr("polargrad_dist.trainer.dry_run.DEVICES", (small, DEVICES[-1]))
    printed = shown(capsys, placed(), settings(tmp_path, device="auto", sequence_length=64), 1)
    assert [line.split()[2:4] for line in printed.splitlines() if line.startswith("small ")] == [
        ["does", "not"]
    ]
    assert [line.split()[2] for line in printed.splitlines() if line.startswith("B200 ")] == ["fits"]


def test_offloaded_parameters_take_nothing_of_the_gpu(tmp_path, capsys):
    config = settings(tmp_path, device="auto", sequence_length=64)
    there = estimate(placed(), OptimizerConfig(), config, 2).memory
    offloading = replace(config, strategy=StrategyConfig(name="fsdp", cpu_offload=True))
    away = estimate(placed(), OptimizerConfig(), offloading, 2).memory
    assert away.total == max(away.passing, away.buffers) < there.total
    assert dry_run(placed(), OptimizerConfig(), offloading, 2) == 0
    assert capsys.readouterr().out.count("in the host's memory") == 3


def test_a_model_that_cannot_run_without_memory_gets_no_verdict(tmp_path, capsys):
    class Reads(ToyModel):
        def forward(self, tokens, targets, *, progress=0.0):
            return super().forward(tokens, targets, progress=progress) * float(tokens.float().mean().item())

    def build(device):
        with torch.device(device):
            return Reads()

    assert dry_run(build, OptimizerConfig(), settings(tmp_path, device="auto"), 2) == 0
    printed = capsys.readouterr().out
    assert "not known: the model does not run without memory" in printed
    assert "at least: without what is not known" in printed
    assert printed.count("not known") >= 1 + len(DEVICES)
    assert "  fits  " not in printed


def test_a_run_on_the_cpu_gets_no_verdict_for_gpus(tmp_path, capsys):
    printed = shown(capsys, placed(), settings(tmp_path, device="cpu", sequence_length=64), 1)
    assert "no verdict, since trainer.device is cpu" in printed
    assert "H100" not in printed


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", None),
    ],
)
def test_torchs_names_mean_their_devices(name, device):
    found = device_of(name)
    assert (found and found.name) == device


def test_what_a_run_is_expected_to_need_is_what_its_dry_run_says(tmp_path):
    config = settings(tmp_path, device="auto", sequence_length=64, steps=50)
    h100 = device_of("NVIDIA H100 80GB HBM3")
    found = estimate(placed(), OptimizerConfig(), config, 1)
    facts = facts_on(h100, 85e9, found, config)
    assert facts["memory"]["total"] == found.memory.total
    assert facts["available"] == 85_000_000_000
    assert facts["seconds"] == pytest.approx(50 * found.seconds(h100, config.precision))
    assert expected(placed(), OptimizerConfig(), config, 1, torch.device("cpu")) == {}


def test_an_estimate_leaves_the_generator_of_the_run_where_it_is(tmp_path):
    def build(device):
        torch.rand(3)  # as a model does that draws something before its weights
        return placed()(device)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    activations(build, settings(tmp_path, sequence_length=64))
    assert torch.equal(before, torch.get_rng_state())


def test_the_time_of_a_step_is_the_sum_of_its_parts():
    h100 = next(device for device in DEVICES if device.name == "H100 SXM")
    work = Work(model=0.4 * 989e12, oracle=67e12, moved=3.35e12, travelling=0.7 * 450e9)
    assert work.seconds(h100, "bf16-mixed") == pytest.approx(4.0)
    assert work.seconds(h100, "fp32") == pytest.approx(3.0 + 989 / 67)
