"""The loop: the same losses on any number of ranks, nothing non-finite in the weights, exact resumes."""

import json
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from polargrad_dist.diagnostics import DiagnosticsConfig
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer import TrainingError, World
from polargrad_dist.trainer.checkpoint import CheckpointConfig
from polargrad_dist.trainer.checkpoint.single import find_checkpoint
from polargrad_dist.trainer.config import EvaluationConfig, SafetyConfig, StrategyConfig
from polargrad_dist.trainer.loop import Trainer
from tests.gloo import run_ranks
from tests.trainer.toy import interrupt, rules, settings, trainer


def losses(folder) -> dict[int, float]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


def weights(t: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in t.bare.named_parameters()}


def _run(rank: int, world: int, folder: str, changes: dict, gradients: str = "all_reduced") -> float:
    here = World(rank, world, rank, torch.device("cpu"), dist.group.WORLD)
    t = trainer(settings(folder, **changes), here, optimizer=replace(rules(), gradients=gradients))
    return t.fit().validation["validation_loss"]


@pytest.mark.parametrize(
    ("world", "strategy", "gradients"),
    [
        (2, "ddp", "all_reduced"),
        (4, "ddp", "all_reduced"),
        (2, "ddp", "reduce_scatter"),
        (2, "fsdp", "all_reduced"),
        (4, "hsdp", "all_reduced"),
    ],
)
def test_losses_are_those_of_one_process_on_any_ranks_and_strategy(tmp_path, world, strategy, gradients):
    one = trainer(settings(tmp_path / "one", steps=20)).fit()
    changes = {"steps": 20, "strategy": StrategyConfig(strategy, replicas=2 if strategy == "hsdp" else 1)}
    many = run_ranks(_run, world, str(tmp_path / "many"), changes, gradients)
    a, b = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert a.keys() == b.keys()
    assert max(abs(a[k] - b[k]) for k in a) < 1e-4
    assert many == pytest.approx([one.validation["validation_loss"]] * world, abs=1e-4)
    assert b[20] < b[1] - 0.3


@pytest.mark.parametrize(("world", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_conditioning_is_logged_at_its_interval_and_the_same_wherever_the_parameters_are(
    tmp_path, world, strategy
):
    changes = {"steps": 5, "diagnostics": DiagnosticsConfig(every=2, hidden=1)}
    trainer(settings(tmp_path / "one", **changes)).fit()
    run_ranks(_run, world, str(tmp_path / "many"), changes | {"strategy": StrategyConfig(strategy)})

    def looks(folder) -> dict[int, dict]:
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {r["step"]: r["diagnostics"] for r in records if "diagnostics" in r}

    one, many = looks(tmp_path / "one"), looks(tmp_path / "many")
    assert list(one) == [1, 2, 4] == list(many)
    for step, found in one.items():
        assert found.keys() == {"embed.weight", "head.weight", "layers.0.1.weight"}
        for parameter, parts in found.items():
            assert parts.keys() == {"gradient", "momentum", "update"}
            assert parts["gradient"]["condition"] > 1
            # Smallest singular values feel the order of fp32 sums most
            for part in ("gradient", "momentum"):
                assert many[step][parameter][part] == pytest.approx(parts[part], rel=0.05)
        assert found["embed.weight"]["update"]["cosine"] == pytest.approx(1.0, abs=1e-6)


def test_accumulating_changes_nothing(tmp_path):
    trainer(settings(tmp_path / "a", micro_batch=12)).fit()
    trainer(settings(tmp_path / "b", micro_batch=2)).fit()
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert max(abs(a[k] - b[k]) for k in a) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(tmp_path, dropout):
    straight = trainer(settings(tmp_path / "a"), dropout=dropout)
    straight.fit()
    first = trainer(settings(tmp_path / "b"), dropout=dropout)
    interrupt(first, 7)
    second = trainer(settings(tmp_path / "b"), dropout=dropout)
    assert second.fit().exit_code == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(second)[name])
    for name, value in straight.optimizer.named_state().items():
        assert torch.equal(value, second.optimizer.named_state()[name])


def test_a_non_finite_step_is_skipped_named_and_leaves_the_weights_alone(tmp_path):
    t = trainer(settings(tmp_path, steps=3), poison={13, 14})
    seen = []
    step = t._step

    def watched(*args):
        before = weights(t)
        out = step(*args)
        seen.append(all(torch.equal(a, b) for a, b in zip(before.values(), weights(t).values(), strict=True)))
        return out

    t._step = watched
    t.fit()
    assert seen == [False, True, False]
    assert t.progress.skipped == 1
    log = (tmp_path / "log.txt").read_text()
    assert "step 2 is skipped: the loss is nan; loss of rank 0" in log


def test_too_many_non_finite_steps_end_the_run_with_the_last_checkpoint_intact(tmp_path):
    folder = tmp_path / "a run"
    t = trainer(settings(folder, safety=SafetyConfig(max_skipped=2)), poison=set(range(60, 200)))
    said = r"2 steps in a row were skipped.*checkpoint of step 4 is intact.*resume '[^']*/a run/checkpoints/step-00000004' "
    with pytest.raises(TrainingError, match=said):
        t.fit()
    assert t.store.newest_valid().name.endswith("4")


def test_checkpoints_of_a_run_that_broke_do_not_push_out_the_good_ones(tmp_path):
    config = settings(
        tmp_path,
        steps=12,
        checkpoint=CheckpointConfig(every=1, keep_last=2),
        safety=SafetyConfig(max_skipped=50),
    )
    # Every step from the sixth on
    t = trainer(config, poison=set(range(60, 200)))
    t.data.validation = None
    assert t.fit().exit_code == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-00000004",
        "step-00000005",
    ]


def test_a_save_that_fell_on_a_skipped_step_is_made_up_for_at_the_next_good_one(tmp_path):
    # The fourth step, where a save was due
    t = trainer(settings(tmp_path, steps=6), poison=set(range(36, 48)))
    assert t.fit().exit_code == 0
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000005", "step-00000006"]


def test_a_non_finite_gradient_is_named(tmp_path):
    t = trainer(settings(tmp_path, steps=2))
    t.bare.head.weight.register_hook(lambda g: g * float("inf"))
    before = weights(t)
    t.fit()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(t).values(), strict=True))
    assert "on rank 0 the gradient of head.weight" in (tmp_path / "log.txt").read_text()


def _overflow_in_the_head(rank: int, world: int, folder: str, gradients: str) -> None:
    here = World(rank, world, rank, torch.device("cpu"), dist.group.WORLD)
    t = trainer(settings(folder, steps=2), here, optimizer=replace(rules(), gradients=gradients))
    t.bare.head.weight.register_hook(lambda g: g * float("inf") if rank == 1 else g)
    t.fit()


@pytest.mark.parametrize("gradients", ["all_reduced", "reduce_scatter"])
def test_only_the_parameter_whose_gradient_is_not_finite_is_named(tmp_path, gradients):
    run_ranks(_overflow_in_the_head, 2, str(tmp_path), gradients)
    skipped = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "is skipped" in line]
    # Two steps on two ranks
    assert len(skipped) == 4
    for line in skipped:
        assert set(re.findall(r"on rank \d the gradient of ([^;]*)", line)) == {"head.weight"}, line


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(tmp_path):
    trainer(settings(tmp_path, steps=2)).fit()
    with pytest.raises(ConfigError, match=r"trainer\.seed: 0 there, 1 here"):
        trainer(settings(tmp_path, steps=2, seed=1))
    trainer(settings(tmp_path, steps=4, micro_batch=6)).fit()


def test_a_run_that_was_not_to_be_resumed_does_not_overwrite_one(tmp_path):
    trainer(settings(tmp_path, steps=2)).fit()
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        trainer(settings(tmp_path, steps=2, checkpoint=CheckpointConfig(every=4, resume="never")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 10, "micro_batch": 4}, "global_batch is 10, expected a multiple of .* = 1 x 4"),
        ({"steps": 0}, "trainer.steps is 0"),
        ({"evaluation": EvaluationConfig(every=-3)}, "evaluation.every is -3"),
        ({"strategy": StrategyConfig("ddp", replicas=3)}, "replicas are for .hsdp."),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"strategy": StrategyConfig("hsdp", replicas=2)}, "replicas is 2 on 1 rank,"),
        ({"strategy": StrategyConfig("ddp", cpu_offload=True)}, "cpu_offload"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        trainer(settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_metrics_hold_rates_shares_and_the_spectrum_per_role(tmp_path):
    trainer(settings(tmp_path)).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    record = next(r for r in lines if r["step"] == 4)
    assert record["tokens_per_second"] > 0
    assert set(record["lr"]) == {"hidden", "embed", "head", "scalar"}
    assert sum(record["share"].values()) == pytest.approx(1.0, abs=0.05)
    assert record["polar"]["embed"]["condition"] >= 1
    assert lines[-1]["bits_per_byte"] > 0


def test_a_checkpoint_beyond_the_last_step_leaves_nothing_to_do(tmp_path):
    trainer(settings(tmp_path / "first", steps=8)).fit()
    found = str(tmp_path / "first" / "checkpoints" / "step-00000008")
    config = settings(tmp_path / "second", steps=4, checkpoint=CheckpointConfig(resume=found))
    outcome = trainer(config).fit()
    assert (outcome.exit_code, outcome.step) == (0, 8)
    logged = (tmp_path / "second" / "log.txt").read_text()
    assert "nothing is left to do: trainer.steps is 4" in logged
    assert "could not be written" not in logged


HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    input()
"""


def test_a_second_process_is_kept_out_of_a_run_directory_until_the_first_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("polargrad_dist.trainer.loop.PATIENCE", 0.2)
    trainer(settings(tmp_path, steps=2)).fit()
    unfinished = tmp_path / "checkpoints" / ".saving-of-the-first"
    unfinished.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        first.stdout.readline()
        with pytest.raises(ConfigError, match="another process trains in"):
            trainer(settings(tmp_path, steps=4)).fit()
        assert unfinished.exists()
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert trainer(settings(tmp_path, steps=4)).fit().step == 4
    assert not unfinished.exists()
    # And lets go itself
    assert trainer(settings(tmp_path, steps=4)).fit().step == 4


def test_a_home_folder_is_found_and_a_thread_may_train_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    # Only the main thread may set handlers of signals.
    with ThreadPoolExecutor(1) as threads:
        outcome = threads.submit(lambda: trainer(settings("~/of a user/run", steps=2)).fit()).result()
    assert outcome.exit_code == 0
    assert find_checkpoint(tmp_path / "of a user" / "run").step == 2
    assert CheckpointConfig(resume="~/x").resume == str(tmp_path / "x")


def test_offloading_from_cpus_is_refused(tmp_path):
    changes = {"strategy": StrategyConfig("fsdp", cpu_offload=True)}
    with pytest.raises(ConfigError, match="cpu_offload is true on CPUs"):
        trainer(settings(tmp_path, **changes))
