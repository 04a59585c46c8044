"""What needs no data is refused before data are prepared, by a run and by its dry run, in the same words."""

import os
import sys
from types import SimpleNamespace

import pytest
import yaml

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.preflight import check_writable, same_on_all_ranks
from tests.commandline import train

SMALL = (
    *(
        "--model.width",
        "32",
        "--model.layers",
        "1",
        "--model.heads",
        "2",
        "--model.max_sequence_length",
        "64",
    ),
    *("--data.tokenizer.vocab_size", "300", "--trainer.sequence_length", "32", "--trainer.device", "cpu"),
)


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--trainer.sequence_length", "128"], "model.max_sequence_length is 64"),
        (
            ["--model.vocab_size", "100"],
            "model.vocab_size is 100, but data.tokenizer has 300 tokens: set it to 300",
        ),
        (["--trainer.global_batch", "0"], "trainer.global_batch is 0"),
        (["--trainer.logging.wandb", "offline"], "pip install '.[wandb]'"),
        (["--trainer.evaluation.hellaswag", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--trainer.run_dir", "train.py/run"], "train.py is a file"),
        (["--model.heads", "5"], "which model.heads = 5 does not divide"),
        (["--optimizer.value_embed.lr", "1"], "optimizer.value_embed is set"),
        (["--trainer.checkpoint.resume", "nowhere"], "trainer.checkpoint.resume is 'nowhere'"),
        (["--trainer.diagnostics.parameters", "[nothing]"], "trainer.diagnostics.parameters names 'nothing'"),
        (["--data.validation_fraction", "2"], "data.validation_fraction is 2.0, expected a number in [0, 1)"),
        (
            ["--data.sources", "[{source: builtin, weight: 0}]"],
            "data.sources has the weight 0.0, expected a finite number > 0",
        ),
        (["--trainer.checkpoint.keep_last", "1"], "keep_last is 1, expected a whole number >= 2"),
        (
            ["--optimizer.gradients=reduce_scatter", "--trainer.strategy.name=fsdp"],
            "optimizer.gradients is 'reduce_scatter' with strategy 'fsdp', which reduces gradients itself",
        ),
        (
            ["--trainer.strategy.name", "deepspeed"],
            "optimizer.embed has scale 'nuclear_relative', which keeps state with whole matrices",
        ),
        (
            [
                "--trainer.strategy.name=deepspeed",
                "--optimizer.embed.scale=nuclear",
                "--optimizer.embed.lr=0.02",
                "--optimizer.hidden.normalize=rows",
            ],
            "optimizer.hidden has normalize 'rows', which keeps state with whole matrices",
        ),
    ],
)
def test_a_run_that_would_end_later_is_refused_at_once(tmp_path, monkeypatch, args, expected, dry):
    monkeypatch.setitem(sys.modules, "wandb", None)
    places = ["--trainer.run_dir", str(tmp_path / "run"), "--data.cache", str(tmp_path / "cache")]
    found = train(*SMALL, *places, *args, *(["--dry_run", "1"] if dry else []))
    assert found.returncode == 2
    assert expected in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry", [False, True])
def test_a_run_directory_of_another_configuration_is_refused_before_its_data_are_prepared(tmp_path, dry):
    run = tmp_path / "run"
    run.mkdir()
    printed = train(*SMALL, "--trainer.run_dir", str(run), "--print_config").stdout
    config = yaml.safe_load(printed)
    config["trainer"]["seed"] = 7
    (run / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if k != "config"}))
    places = ["--trainer.run_dir", str(run), "--data.cache", str(tmp_path / "cache")]
    found = train(*SMALL, *places, *(["--dry_run", "2"] if dry else []))
    assert found.returncode == 2
    assert "trainer.seed: 7 there, 0 here" in found.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_run_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            check_writable(tmp_path / "locked" / "run")
            os._exit(0)
        except ConfigError as error:
            os._exit(3 if "no permission for" in str(error) else 4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    check_writable(tmp_path / "new" / "run")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("trainer.seed", r"trainer\.seed is 0 on rank 0 and 5 on rank 1, expected the same on all"),
        # Where data lie may differ, since only rank 0 reads text
        ("data.cache", None),
    ],
)
def test_ranks_with_other_configurations_are_refused_on_every_one(key, expected):
    section, name = key.split(".")
    ours, theirs = {section: {name: 0}}, {section: {name: 5}}
    for own in (ours, theirs):
        world = SimpleNamespace(gather=lambda value: [ours, theirs])
        if expected is None:
            same_on_all_ranks(world, own)
        else:
            with pytest.raises(ConfigError, match=expected):
                same_on_all_ranks(world, own)
