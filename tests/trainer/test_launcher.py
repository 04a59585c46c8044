"""`accelerate launch train.py`: what the launcher was told and the run is not is refused in one sentence."""

import os
import subprocess
import sys

import pytest

from polargrad_dist import ConfigError
from polargrad_dist.trainer import TrainerConfig
from polargrad_dist.trainer.config import StrategyConfig
from tests.commandline import ROOT, train

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# What `accelerate launch` writes where nobody has set anything.
NOTHING = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}


def said(monkeypatch, environment: dict[str, str], **config) -> str:
    for name, value in (NOTHING | environment).items():
        monkeypatch.setenv(name, value)
    try:
        TrainerConfig(**config).check(2)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("environment", "config", "expected"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            {},
            "trainer.precision is 'fp32', expected 'bf16-mixed' or 'bf16'",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"precision": "bf16"}, "expected 'no' or 'bf16'"),
        (FSDP, {}, "trainer.strategy.name is 'ddp', expected 'fsdp' or 'hsdp'"),
        (
            FSDP | {"FSDP_VERSION": "1"},
            {"strategy": StrategyConfig("fsdp")},
            "which is FSDP2, expected fsdp_version 2",
        ),
        (
            FSDP | {"FSDP_OFFLOAD_PARAMS": "true"},
            {"strategy": StrategyConfig("fsdp")},
            "trainer.strategy.cpu_offload is false, expected the same in both",
        ),
        (
            FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"},
            {"strategy": StrategyConfig("fsdp")},
            "trainer.strategy.reshard_after_forward is true",
        ),
        (
            FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"strategy": StrategyConfig("fsdp")},
            "trainer.activation_checkpointing is false",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "expected a launch without DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "expected a launch without Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "expected a launch without a parallelism_config"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "trainer.compile is False"),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, {"compile": True}, "trainer.compile is True"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            {},
            "global_batch and micro_batch make it 2, expected 2",
        ),
    ],
)
def test_a_setting_that_the_run_contradicts_is_refused(monkeypatch, environment, config, expected):
    problem = said(monkeypatch, environment, **config)
    assert expected in problem
    name = problem.split()[3].split("=")[0]
    assert name in environment
    assert problem.endswith(
        "change the launcher's setting (accelerate config, or its option), or the trainer's"
    )


@pytest.mark.parametrize(
    ("environment", "config"),
    [
        ({}, {}),
        ({}, {"precision": "bf16-mixed", "strategy": StrategyConfig("fsdp"), "compile": True}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "bf16-mixed"}),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": True}),
        ({"ACCELERATE_USE_CPU": "True"}, {"device": "cpu"}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, {}),
        (
            FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false"},
            {"strategy": StrategyConfig("fsdp")},
        ),
    ],
)
def test_settings_that_agree_are_none_to_refuse(monkeypatch, environment, config):
    assert said(monkeypatch, environment, **config) == ""


def test_a_gpu_that_the_launcher_forbids_is_not_taken(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    problem = said(monkeypatch, {"ACCELERATE_USE_CPU": "True"})
    assert "trainer.device is 'auto', which takes the GPU, expected 'cpu'" in problem


def test_the_refusal_is_train_pys(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    done = train(f"--trainer.run_dir={tmp_path / 'run'}", "--trainer.device=cpu")
    assert done.returncode == 2
    assert "accelerate launch says ACCELERATE_MIXED_PRECISION=bf16" in done.stderr
    assert not (tmp_path / "run").exists()


def test_several_processes_on_cpus_that_accelerate_does_not_start_are_missed(tmp_path):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    settings = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    done = subprocess.run(
        [*command, *settings, "train.py", f"--trainer.run_dir={tmp_path / 'run'}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert (
        "accelerate launch started one process (RANK is not set), expected the several processes on CPUs"
        in done.stderr
    )
