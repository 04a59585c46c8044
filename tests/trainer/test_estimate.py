"""What `--dry_run` says of memory and time, against what autograd really keeps and against a sum by hand."""

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.ranks import WORLD, fake_group
from models import ModelConfig, build_model
from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.trainer import World
from polargrad_dist.trainer.config import StrategyConfig
from polargrad_dist.trainer.devices import DEVICES, device_of
from polargrad_dist.trainer.dry_run import dry_run
from polargrad_dist.trainer.estimate import (
    TRACER,
    Memory,
    Work,
    activations,
    estimate,
    expected,
    facts_on,
    gathered,
)
from polargrad_dist.trainer.strategies import place
from tests.models.tiny import tiny
from tests.trainer.toy import ToyModel, settings


def really_kept(model, config) -> int:
    """Bytes of distinct storages that a real forward pass saves, parameters left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            # Held, so that no address comes twice
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    tokens = torch.zeros(config.micro_batch, config.sequence_length, dtype=torch.int64)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), mixed:
        model(tokens, tokens, progress=1.0)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("architecture", ["gpt2-small", "qwen2.5"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_activations_are_those_that_autograd_keeps(tmp_path, architecture, precision):
    config = settings(tmp_path, precision=precision, sequence_length=64)

    def build(device):
        return tiny(architecture)

    model = build("cpu")
    real = really_kept(model.bfloat16() if precision == "bf16" else model, config)
    assert real > 1e5
    assert abs(activations(build, config) / real - 1) < 0.01
    assert activations(build, replace(config, micro_batch=12)) > 3 * activations(build, config)


@pytest.mark.parametrize("architecture", ["gpt2-small", pytest.param("qwen2.5", marks=pytest.mark.slow)])
def test_activations_of_compiled_blocks_are_those_that_compiled_blocks_keep(tmp_path, architecture):
    config = settings(tmp_path, precision="bf16-mixed", sequence_length=64, compile=True)
    model = tiny(architecture)
    model.compile_blocks(backend=TRACER)
    real = really_kept(model, config)
    traced = activations(placed(architecture), config)
    assert abs(traced / real - 1) < 0.01
    assert traced < 0.95 * activations(placed(architecture), replace(config, compile=False))


def test_blocks_that_cannot_be_traced_are_counted_uncompiled_and_said_to_be(tmp_path, capsys):
    config = settings(tmp_path, device="auto", micro_batch=12, sequence_length=64, compile=True)

    def build(device):
        model = placed()(device)
        model.compile_blocks = None
        return model

    found = estimate(build, OptimizerConfig(bucket_mb=0.01), config, 1).memory
    assert found.activations == activations(placed(), replace(config, compile=False))
    assert not found.compiled
    assert dry_run(build, OptimizerConfig(bucket_mb=0.01), config, 1) == 0
    assert "  uncompiled\n" in capsys.readouterr().out


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
    model = tiny("gpt")
    parameters = 4 * sum(p.numel() for p in model.parameters()) - 2 * model.embed.weight.numel()
    assert found.lasting["parameters"] == found.lasting["gradients"] == parameters
    assert "parameters (bfloat16+float32)" in printed


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
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40S", "L40S"),
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
        # As a model does that draws something before its weights
        torch.rand(3)
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


def really_gathered(config, build) -> int:
    """The peak of what FSDP2 holds beside shards, by PyTorch's tracker, as one of 8 ranks; small activations' gradients are
    counted with it."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    with fake_group(0):
        world = World(0, WORLD, 0, torch.device("cpu"), torch.distributed.group.WORLD)
        placed = place(build("cpu"), config, world, False)
        tracker = FSDPMemTracker(placed.model, torch.optim.SGD(placed.model.parameters()))
        tokens = torch.zeros(1, 32, dtype=torch.int64)
        tracker.track_inputs((tokens,))
        with tracker:
            for last in [False] * (config.accumulation(WORLD) - 1) + [True]:
                with placed.micro_step(last):
                    placed.model(tokens, tokens, progress=0.5).backward()
                tracker.reset_mod_stats()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    kinds = ("UNSHARDED_PARAM", "UNSHARDED_GRAD", "ALL_GATHER", "REDUCE_SCATTER", "TEMP")
    return sum(size for kind, size in peak.items() if getattr(kind, "name", "") in kinds)


@pytest.mark.parametrize(
    ("precision", "reshard", "micro_batches"),
    [("fp32", True, 1), ("bf16-mixed", True, 1), ("fp32", True, 2), ("fp32", False, 1)],
)
def test_what_fsdp2_gathers_is_counted(tmp_path, precision, reshard, micro_batches):
    config = settings(
        tmp_path, precision=precision, global_batch=WORLD * micro_batches, micro_batch=1, sequence_length=32,
        strategy=StrategyConfig("fsdp", reshard_after_forward=reshard),
    )  # fmt: skip

    def build(device):
        sizes = {"vocab_size": 2048, "width": 256, "layers": 6, "heads": 4, "max_sequence_length": 64}
        return build_model(ModelConfig("gpt2-small", end_of_text=0, **sizes), device=device)

    said = gathered(build("meta"), config, WORLD)
    assert 0.8 < really_gathered(config, build) / said < 1.05
    found = estimate(build, OptimizerConfig(), config, WORLD).memory
    assert found.gathered == said
    assert found.passing == found.activations + found.loss + said


def test_a_dry_run_of_fsdp2_shows_what_is_gathered_and_of_ddp_does_not(tmp_path, capsys):
    config = settings(tmp_path, device="auto", sequence_length=64, global_batch=12, micro_batch=6)
    sharded = replace(config, strategy=StrategyConfig("fsdp"))
    size = gathered(placed()("meta"), sharded, 2)
    parameters = 4 * sum(p.numel() for p in tiny("gpt").parameters())
    assert 0.5 * parameters < size < 3 * parameters
    (line,) = [
        line for line in shown(capsys, placed(), sharded, 2).splitlines() if "gathered by FSDP2" in line
    ]
    assert f"{size:,}" in line
    assert "gathered by FSDP2" not in shown(capsys, placed(), config, 2)


def test_tables_are_counted_in_the_type_that_they_have_on_a_gpu(tmp_path):
    def parameters(device):
        config = settings(tmp_path, device=device, sequence_length=64)
        return estimate(placed("gpt2-small"), OptimizerConfig(), config, 1).memory.lasting["parameters"]

    tables = sum(table.weight.numel() for table in tiny("gpt2-small").tables)
    assert tables > 0
    assert parameters("cpu") - parameters("auto") == 2 * tables
