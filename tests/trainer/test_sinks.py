"""Sinks of one's own, what TensorBoard and wandb are given, and the profile of a few steps."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer import RunInfo, register_sink
from polargrad_dist.trainer.config import LoggingConfig
from polargrad_dist.trainer.console import line
from polargrad_dist.trainer.metrics import Metrics
from polargrad_dist.trainer.sinks import unregister_sink
from tests.trainer.toy import settings, trainer

SAMPLES = {"step": 3, "samples": [{"prompt": "The ", "text": "end\nof <it>"}]}


class Kept:
    def __init__(self, run: RunInfo):
        self.run, self.records, self.closed = run, [], False

    def write(self, record):
        if record["step"] == 7:
            raise RuntimeError("full")
        self.records.append(record)

    def close(self):
        self.closed = True


@pytest.fixture
def sink():
    made = []
    register_sink("mine", lambda run: made.append(Kept(run)) or made[-1])
    yield made
    unregister_sink("mine")


def metrics(folder, report=None, **changes) -> Metrics:
    config = LoggingConfig(progress="off", **changes)
    options = {"steps": 10, "first": 0, "run_id": "abc123", "configuration": {"a": {"b": [1], "c": 2.5}}}
    return Metrics(config, folder, active=True, report=report, **options)


def test_a_registered_sink_gets_every_record_of_a_run_and_may_fail(tmp_path, sink):
    trainer(settings(tmp_path / "run", steps=5)).fit()
    (one,) = sink
    assert one.closed
    assert (one.run.run_dir, one.run.steps, one.run.first) == (tmp_path / "run", 5, 0)
    assert one.run.run_id == (tmp_path / "run" / "run_id").read_text().strip()
    assert [record["step"] for record in one.records if "loss" in record] == [1, 2, 3, 4, 5]
    outcome = trainer(settings(tmp_path / "run", steps=9), optimizer=None).fit()
    assert outcome.step == 9
    assert sink[1].run.first == 5
    assert [record["step"] for record in sink[1].records if "loss" in record] == [6]
    with pytest.raises(ConfigError, match="name 'wandb'"):
        register_sink("wandb", Kept)


def test_tensorboard_holds_samples_and_the_configuration(tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    sinks = metrics(tmp_path, tensorboard=True)
    sinks.write(SAMPLES)
    sinks.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (text,) = events.Tensors("samples/0/text_summary")
    assert text.step == 3
    assert text.tensor_proto.string_val[0].decode() == "**The **end  \nof <it>"
    start = metadata.parse_session_start_info_plugin_data(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    assert start.hparams["a.c"].number_value == 2.5
    assert start.hparams["a.b"].string_value == "[1]"


def test_wandb_gets_the_configuration_samples_and_the_report(tmp_path, monkeypatch):
    """The interface of wandb that is used, recorded: the service itself needs an account."""
    wandb = pytest.importorskip("wandb")
    told = SimpleNamespace(logged=[], artefacts=[], began={})
    run = SimpleNamespace(
        id="abc123",
        log=lambda values, step: told.logged.append((step, values)),
        log_artifact=told.artefacts.append,
        finish=lambda: None,
    )
    monkeypatch.setattr(wandb, "init", lambda **options: told.began.update(options) or run)

    def report(folder):
        (folder / "report.html").write_text("<p>")
        return folder / "report.html"

    sinks = metrics(tmp_path, report, wandb="offline")
    sinks.write(SAMPLES | {"loss": 2.0})
    sinks.close()
    assert (told.began["id"], told.began["resume"], told.began["config"]["a"]["c"]) == (
        "abc123",
        "allow",
        2.5,
    )
    step, values = told.logged[0]
    assert (step, values["loss"]) == (3, 2.0)
    assert not {"step", "time"} & values.keys()
    assert told.began["settings"].quiet
    assert values["samples"].data == [[3, "The ", "end\nof <it>"]]
    (artefact,) = told.artefacts
    assert set(artefact.manifest.entries) == {"report.html"}


def test_a_report_that_cannot_be_made_costs_nothing_but_a_warning(tmp_path, sink, caplog):
    def report(folder):
        raise RuntimeError("no figures today")

    Kept.attach = lambda self, path: None
    try:
        sinks = metrics(tmp_path, report)
        sinks.close()
    finally:
        del Kept.attach
    assert sink[0].closed


def test_samples_and_choices_are_in_the_line_for_people():
    text = line(SAMPLES | {"hellaswag": {"acc": 0.25, "acc_norm": 0.5, "questions": 4}}, 10)
    assert "'The ' -> 'end\\nof <it>'" in text
    assert "hellaswag 0.500 (0.250 not normalized)" in text
    assert "extra 2.5000" in line({"step": 1, "validation": {"extra": {"loss": 2.5}}}, 10)


@pytest.mark.parametrize("steps", [3, 50])
def test_a_profile_is_a_trace_and_a_table_of_a_steps_parts(tmp_path, steps):
    logging = LoggingConfig(every=1, stats_every=0, progress="off", profile=steps)
    trainer(settings(tmp_path / "run", steps=8, logging=logging)).fit()
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    rows = {words[0]: words for words in map(str.split, table.split("\n\n")[0].splitlines()[1:])}
    assert {"whole", "forward_backward", "optimizer", "data"} <= set(rows)
    assert rows["whole"][2] == "100.0%"
    shares = {name: float(words[2].rstrip("%")) for name, words in rows.items()}
    assert 0 < shares["forward_backward"] < 100
    assert shares["forward_backward"] + shares["optimizer"] > 50
    assert "Self CPU" in table
    with gzip.open(tmp_path / "run" / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    wholes = [event for event in events if event.get("name") == "step/whole"]
    assert len(wholes) == min(steps, 8 - 2)


def test_profile_on_the_command_line_is_the_key(monkeypatch):
    from train import parse_run

    monkeypatch.setattr(sys, "argv", ["train.py", "--profile", "4"])
    assert parse_run()[0].trainer.logging.profile == 4
    assert parse_run(["--profile=3"])[0].trainer.logging.profile == 3
