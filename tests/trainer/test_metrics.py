"""Figures reach every sink that was asked for, and no sink can stop a run."""

import json
import math

import pytest

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.schedules import Rates, RoleSchedule, ScheduleConfig, lr_factor, momentum_at
from polargrad_dist.trainer.config import LoggingConfig
from polargrad_dist.trainer.metrics import JsonLines, Metrics, require
from polargrad_dist.trainer.signals import LeaveRequest


def metrics(folder, **changes) -> Metrics:
    config = LoggingConfig(progress="off", **changes)
    return Metrics(config, folder, steps=10, first=0, run_id="abc123", configuration={"a": 1}, active=True)


RECORD = {"step": 1, "loss": 2.5, "lr": {"hidden": 0.1}, "polar": {"embed": {"condition": math.nan}}}


def test_json_lines_hold_null_for_what_is_not_a_number(tmp_path):
    sinks = metrics(tmp_path)
    sinks.write(RECORD)
    sinks.close()
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert record["polar"]["embed"]["condition"] is None
    assert record["loss"] == 2.5


def test_a_resume_drops_what_was_logged_after_its_checkpoint_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    JsonLines(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("damage", [b"123", b'{"loss": 3}', b"\xff\xfe", b"\0\0\0", b'{"step": null}'])
def test_a_damaged_line_is_dropped_and_costs_no_other(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n{"step": 3}\n')
    JsonLines(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_tensorboard_gets_nested_figures_under_their_path(tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = metrics(tmp_path, tensorboard=True)
    sinks.write(RECORD)
    sinks.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("lr/hidden")[0].value == pytest.approx(0.1)


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from polargrad_dist.trainer.metrics import TensorBoard

    # A kill after step 7, a checkpoint of step 4
    for first, last in ((0, 7), (4, 9)):
        sink = TensorBoard(tmp_path, first)
        for step in range(first + 1, last + 1):
            sink.write({"step": step, "loss": float(step)})
        sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))


def test_a_sink_that_fails_is_named_once_and_dropped(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        "polargrad_dist.trainer.metrics.log.warning", lambda text, *args: said.append(text % args)
    )
    sinks = metrics(tmp_path)

    class Broken:
        def write(self, record):
            raise OSError("no route to host")

        def close(self):
            raise AssertionError("a dropped sink is not closed")

    sinks.sinks.append(Broken())
    for step in (1, 2, 3):
        sinks.write(RECORD | {"step": step})
    sinks.close()
    assert [text.split(" (")[0] for text in said] == ["Broken failed"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_missing_package_names_the_extra_to_install():
    with pytest.raises(ConfigError, match=r"pip install '\.\[wandb\]'"):
        require("no_such_package", "trainer.logging.wandb is 'online'", "wandb")


def test_a_row_says_when_it_was_written_and_how_far_the_run_was(tmp_path):
    import time

    before = time.time()
    sinks = Metrics(
        LoggingConfig(progress="off"),
        tmp_path,
        steps=10,
        first=0,
        run_id="a",
        configuration={},
        active=True,
        tokens_per_step=512,
    )
    sinks.write({"step": 3, "loss": 1.0})
    sinks.close()
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert before - 0.01 <= row["time"] <= time.time() + 0.01
    assert 0 <= row["elapsed"] < 5
    assert row["tokens"] == 3 * 512


def test_elapsed_time_goes_on_where_the_kept_rows_end_and_leaves_out_what_lies_between(tmp_path):
    rows = [{"step": 1, "elapsed": 10.0}, {"step": 2, "elapsed": 20.5}, {"step": 3, "elapsed": 99.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LoggingConfig(progress="off")
    sinks = Metrics(config, tmp_path, steps=10, first=2, run_id="a", configuration={}, active=True)
    sinks.write({"step": 3})
    sinks.close()
    elapsed = [json.loads(row)["elapsed"] for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert elapsed[:2] == [10.0, 20.5]
    assert 20.5 <= elapsed[2] < 25


def test_schedules_are_what_they_are_called():
    def at(kind, step, **more):
        return lr_factor(ScheduleConfig(kind, **more), step, 100)

    assert [at("cosine", s, warmup_steps=10) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert at("cosine", 55, warmup_steps=10) == pytest.approx(0.5)
    assert at("cosine", 100, warmup_steps=10) == pytest.approx(0.0)
    assert [at("linear", s, decay_fraction=0.4) for s in (0, 60, 80, 100)] == pytest.approx([1, 1, 0.5, 0])
    assert [at("wsd", s, decay_fraction=0.4) for s in (60, 90, 100)] == pytest.approx(
        [1, 1 - math.sqrt(0.75), 0]
    )
    assert at("constant", 1000) == 1.0
    warm = ScheduleConfig(momentum_warmup_steps=300, momentum_warmup_start=0.85)
    assert [momentum_at(warm, s, 1000, 0.95) for s in (0, 150, 300, 999)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )


def test_roles_have_schedules_of_their_own_and_momenta_fall_again_at_the_end():
    config = ScheduleConfig(
        decay_fraction=0.7,
        power=1.2,
        momentum_cooldown_steps=20,
        hidden=RoleSchedule(decay_fraction=1.0, power=1.0),
        scalar=RoleSchedule(floor=0.1, momentum_warmup_steps=10, momentum_warmup_start=0.5),
    )
    config.check(100)
    groups = [
        {"role": role, "algorithm": rule, "lr": 2.0, "beta": 0.95, "betas": (0.9, 0.99)}
        for role, rule in (("hidden", "polar"), ("embed", "polar"), ("scalar", "adamw"))
    ]
    rates = Rates(groups, config, 100)
    assert rates.set(50) == pytest.approx((50 / 70) ** 1.2)
    assert [g["lr"] for g in groups] == pytest.approx([2 * 0.5, 2 * (5 / 7) ** 1.2, 2 * (5 / 7) ** 1.2])
    rates.set(99)
    assert groups[2]["lr"] == pytest.approx(0.2)
    assert [g["beta"] for g in groups[:2]] == pytest.approx([0.95 * 0.05 + 0.85 * 0.95, 0.95])
    rates.set(5)
    assert groups[2]["betas"] == pytest.approx((0.7, 0.99))
    assert groups[2]["beta"] == 0.95
    with pytest.raises(ConfigError, match=r"trainer\.schedule\.scalar\.floor is 2"):
        ScheduleConfig(scalar=RoleSchedule(floor=2.0)).check(10)
    with pytest.raises(ConfigError, match="only 'linear' uses it"):
        ScheduleConfig("cosine", power=2.0).check(10)


def test_signals_within_a_second_are_one_request_to_leave():
    import os
    import signal

    leave = LeaveRequest()
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert leave.asked
        assert leave.signal is signal.SIGINT
    finally:
        leave.close()
