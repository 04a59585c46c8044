"""Configurations, tokenizers and run directories from strangers: read, and never run."""

import json
import sys

import pytest
import torch
import yaml

from data.config import DataConfig
from data.dataset import open_data
from data.kept import INFO, keep, kept
from data.prepare import parse as parse_prepare
from data.tokenizers import open_ready
from polargrad_dist.errors import CheckpointError, ConfigError, DataError
from polargrad_dist.trainer.checkpoint import CheckpointStore
from tests.commandline import train
from tools.report import write_report
from tools.runs import load_run
from train import parse_run


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """A file that exists once somebody has imported the module ``stranger``."""
    mark = tmp_path / "ran"
    (tmp_path / "stranger.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Model: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    sys.modules.pop("stranger", None)
    assert not mark.exists(), "a configuration ran code"


NAMED = [
    {"model": {"class_path": "stranger.Model", "init_args": {}}},
    {"trainer": {"schedule": {"class_path": "stranger.Model"}}},
    {"data": {"tokenizer": {"class_path": "stranger.Model"}}},
    {"optimizer": {"hidden": {"class_path": "stranger.Model", "init_args": {"lr": 1}}}},
]


@pytest.mark.parametrize("content", NAMED, ids=str)
def test_a_configuration_that_names_code_is_refused_before_it_is_imported(ran, tmp_path, content):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    found = train("--config", str(tmp_path / "run.yaml"))
    assert found.returncode == 2
    assert "the configuration names code to run (stranger.Model), expected values only" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"model": "stranger.Model"}, "model"),
        ({"trainer": {"checkpoint": "stranger.Model"}}, "trainer.checkpoint"),
    ],
)
def test_a_section_that_is_the_name_of_code_is_refused_unread(ran, tmp_path, content, key):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    found = train("--config", str(tmp_path / "run.yaml"))
    assert found.returncode == 2
    assert f"{key} is stranger.Model, expected a mapping with its fields" in found.stderr


@pytest.mark.parametrize(
    "argument",
    ["--model=stranger.Model", "--model={class_path: stranger.Model}", "--model.class_path=stranger.Model"],
)
def test_so_is_a_command_line_that_names_code(ran, argument):
    with pytest.raises(ConfigError):
        parse_run([argument])


def test_so_is_a_file_that_a_configuration_names(ran, tmp_path):
    (tmp_path / "model.yaml").write_text("class_path: stranger.Model\n")
    (tmp_path / "run.yaml").write_text(f"model: {tmp_path / 'model.yaml'}\n")
    with pytest.raises(ConfigError, match="names code to run"):
        parse_run(["--config", str(tmp_path / "run.yaml")])


def test_yaml_tags_build_no_objects(ran, tmp_path):
    (tmp_path / "run.yaml").write_text("model: !!python/name:stranger.Model ''\n")
    with pytest.raises(ConfigError):
        parse_run(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    "content", [{"class_path": "stranger.Model"}, {"tokenizer": {"class_path": "stranger.Model"}}]
)
def test_preparing_data_refuses_code_too(ran, tmp_path, content):
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError):
        parse_prepare(["--config", str(tmp_path / "data.yaml")])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": content}))
    with pytest.raises(ConfigError):
        parse_prepare(["--run", str(tmp_path / "run.yaml")])


def test_tools_run_nothing_that_a_run_directory_names(ran, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(yaml.safe_dump(NAMED[0]))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    store = CheckpointStore(run_dir / "checkpoints", configuration=NAMED[0])
    store.save(1, {"model/w": torch.zeros(1)})
    assert store.close()
    with pytest.raises(CheckpointError, match="keeps no tokenizer"):
        load_run(run_dir)
    keep(run_dir, None, None)
    with pytest.raises(CheckpointError, match="says nothing of its model that this version understands"):
        load_run(run_dir)
    assert write_report([run_dir], tmp_path / "report.html").exists()


def test_a_report_survives_figures_that_no_axis_can_hold(tmp_path):
    rows = [
        {"step": step, "loss": loss, "grad_norm": 1e308, "lr": {"hidden": -1e308}, "share": {"data": loss}}
        for step, loss in enumerate((2.0, 1e308, -1e308, float("inf"), 10**400, 1.5))
    ]
    (tmp_path / "config.yaml").write_text("trainer: {steps: 6}\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_report([tmp_path], tmp_path / "report.html").stat().st_size > 1000


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(ran, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked whether to run the code"))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "stranger.py").write_text((tmp_path / "stranger.py").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "stranger"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Model", "auto_map": {"AutoTokenizer": [None, "stranger.Model"]}})
    )
    with pytest.raises(DataError, match="cannot be loaded"):
        open_ready(str(folder), None)


def test_malformed_manifests_are_data_errors(tmp_path):
    good = {
        "version": 1,
        "inputs": {},
        "tokenizer": {
            "name": "bpe",
            "hash": "0",
            "vocab_size": 300,
            "end_of_text": 0,
            "file": "tokenizer.json",
        },
        "train": {"shards": [{"name": "train-00000.bin", "tokens": 10, "size": 1044, "sha256": "0"}]},
        "validation": {"shards": []},
    }
    bad = [
        [],
        None,
        "text",
        {**good, "version": "1"},
        {**good, "tokenizer": None},
        {**good, "tokenizer": {"name": "bpe"}},
        {**good, "tokenizer": {**good["tokenizer"], "file": "../../secret"}},
        {**good, "tokenizer": {**good["tokenizer"], "vocab_size": "many"}},
        {**good, "train": None},
        {**good, "train": {"shards": "all"}},
        {**good, "train": {"shards": [{"name": "../../etc/passwd", "tokens": 10, "size": 1044}]}},
        {**good, "train": {"shards": [{"name": "train-00000.bin", "tokens": "ten", "size": 1044}]}},
        {**good, "train": {"shards": [{"name": 3, "tokens": 10, "size": 1044}]}},
        {**good, "train": {"shards": [[]]}},
        {**good, "train": {"shards": []}},
        {**good, "inputs": []},
    ]
    config = DataConfig(source="shards", paths=[str(tmp_path)])
    for raw in bad:
        (tmp_path / "manifest.json").write_text(json.dumps(raw))
        with pytest.raises(DataError):
            open_data(config, sequence_length=4, global_batch=1, micro_batch=1)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError):
        open_data(config, sequence_length=4, global_batch=1, micro_batch=1)


def test_a_malformed_tokenizer_of_a_run_is_a_data_error(tmp_path):
    good = {"name": "bpe", "hash": "0", "vocab_size": 300, "end_of_text": 0, "file": "tokenizer.json"}
    keep(tmp_path, None, 0)
    assert kept(tmp_path).info is None
    for raw in (
        [],
        {"tokenizer": good},
        {"tokenizer": good | {"file": "../../secret"}, "end_of_text": 0},
        {"tokenizer": good | {"vocab_size": "many"}, "end_of_text": 0},
        {"tokenizer": {}, "end_of_text": 0},
    ):
        (tmp_path / "tokenizer" / INFO).write_text(json.dumps(raw))
        with pytest.raises(DataError, match="not a tokenizer's description"):
            kept(tmp_path)
    (tmp_path / "tokenizer" / INFO).write_bytes(b"")
    with pytest.raises(DataError, match="start the run once more, which writes it anew"):
        kept(tmp_path)
    keep(tmp_path, None, 7)
    assert kept(tmp_path).end_of_text == 7
