"""The command line: one sentence for a user's mistake, the merged configuration on request, dry runs with exact counts."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.cli import run
from polargrad_dist.trainer.guesses import GUESSES
from tests.commandline import train
from train import parse_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--optimizer.hiden.lr", "0.1"], "optimizer.hidden.lr"),
        (["--trainer.steps", "many"], "trainer.steps"),
        (["--trainer.precision", "fp8"], "trainer.precision"),
        (["--config", "configs/nothing.yaml"], "configs/nothing.yaml"),
        (["--optimizer.hidden.beta", "1.5"], "optimizer.hidden.beta is 1.5"),
        (
            ["--optimizer.comm_dtype", "half"],
            "optimizer.comm_dtype is half, expected float32, bfloat16 or null",
        ),
        (["--trainer.clip_norm", "big"], "trainer.clip_norm is big, expected a number or null"),
        (["--optimizer.head.lrr", "3"], "no configuration key optimizer.head.lrr"),
        (["--trainer.foo", "3"], "no configuration key trainer.foo"),
        (
            ["--optimizer.hidden.betas", "[0.9]"],
            "optimizer.hidden.betas is [0.9], expected a list of 2 values",
        ),
        (["--trainer.step", "3"], "did you mean trainer.steps?"),
        (["--optimizer.hidden.weight", "1"], "did you mean optimizer.hidden.weight_decay?"),
        (["--trainer.clip_norm", "false"], "trainer.clip_norm is false, expected a number or null"),
        (["--trainer.checkpoint.keep", "3"], "did you mean one of trainer.checkpoint.keep_best"),
        (["--trainer.clip_norm", ".nan"], "trainer.clip_norm is nan"),
        (["--optimizer.bucket_mb", ".inf"], "optimizer.bucket_mb is inf"),
        (["--trainer.diagnostics.parameters", "[nope]"], "names 'nope'"),
        (["--optimizer.value_embed.lr", "1"], "optimizer.value_embed is set"),
        (["stray", "words"], "unexpected argument 'stray': use --key value"),
        (["--data.paths", "x"], "data.paths is x, expected a list: write [x]"),
        (["--optimizer.lr", "1"], "each role has its own, one of optimizer.hidden.lr, optimizer.embed.lr"),
        (["--trainer.seed", "-1"], "trainer.seed is -1"),
        (["--data.prefetch", "-1"], "data.prefetch is -1"),
        (["--data.validation_tokens", "-5"], "data.validation_tokens is -5"),
        (["--dry_run", "0"], "--dry_run is 0"),
        (["--model.width", "30", "--model.heads", "4"], "model.width is 30"),
        (["--data.source", "files"], "data.paths is empty"),
        (["--trainer.device", "cuda"], "sees no GPU"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_non_zero_exit(tmp_path, args, expected):
    extra = (
        []
        if "--dry_run" in args
        else ["--trainer.run_dir", str(tmp_path / "run"), "--data.cache", str(tmp_path / "cache")]
    )
    found = train(*args, *extra)
    assert found.returncode == 2
    assert expected in found.stderr
    assert "Traceback" not in found.stderr
    assert len([line for line in found.stderr.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optimizer.head.lrr", 3, "there is no configuration key optimizer.head.lrr: did you mean optimizer.head.lr?"),
        (
            "trainer.schedule.embed.kind",
            "cosin",
            "trainer.schedule.embed.kind is cosin, expected constant, cosine, linear, wsd or null",
        ),
        (
            "trainer.schedule.hidden.warmup_steps",
            "ten",
            "trainer.schedule.hidden.warmup_steps is ten, expected a whole number or null",
        ),
        ("optimizer.head.beta", "much", "optimizer.head.beta is much, expected a number"),
        ("trainer.schedule.head", "cosine", "trainer.schedule.head is cosine, expected a mapping with its fields"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_optional_section_names_its_key(tmp_path, key, value, expected):
    with pytest.raises(ConfigError) as error:
        parse_run([f"--{key}", str(value)])
    assert str(error.value).endswith(expected)
    content: object = value
    for part in reversed(key.split(".")):
        content = {part: content}
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        parse_run(["--config", str(file)])
    assert str(error.value).endswith(expected)


def test_the_name_of_an_optional_section_is_guessed_with_its_key():
    with pytest.raises(ConfigError, match=r"did you mean trainer\.schedule\.hidden\.kind\?"):
        parse_run(["--trainer.schedule.hiden.kind", "wsd"])


def test_an_optional_section_may_be_null(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("trainer: {schedule: {hidden: null}}\noptimizer: {head: null}\n")
    config = parse_run(["--config", str(file), "--trainer.schedule.embed=null"])[0]
    assert config.trainer.schedule.hidden is None is config.trainer.schedule.embed
    assert config.optimizer.head is None


BATCH = "did you mean trainer.global_batch (sequences per step, over all ranks) or trainer.micro_batch ("
RATES = "each role has its own, one of optimizer.hidden.lr, optimizer.embed.lr"
TEXT = "did you mean data.paths (files and folders, with data.source files) or data.hub.name ("


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("batch_size", BATCH),
        ("trainer.batch_size", BATCH),
        ("steps", "did you mean trainer.steps?"),
        ("max_steps", "did you mean trainer.steps?"),
        ("epochs", "did you mean trainer.steps (the length of a run is set in steps)?"),
        ("lr", RATES),
        ("learning_rate", RATES),
        ("trainer.lr", RATES),
        ("trainer.learning_rate", RATES),
        ("optimizer.learning_rate", RATES),
        ("optimizer.hidden.learning_rate", "did you mean optimizer.hidden.lr?"),
        ("optimizer.steps", "each role has its own, one of optimizer.hidden.steps"),
        ("model", "model is some, expected a mapping with its fields: did you mean model.architecture ("),
        ("model.n_layer", "did you mean model.layers?"),
        (
            "optimizer",
            "optimizer is some, expected a mapping with its fields: did you mean optimizer.hidden.algo",
        ),
        ("trainer.schedule", "expected a mapping with its fields: did you mean trainer.schedule.kind?"),
        ("data", "data is some, expected a mapping with its fields: did you mean data.source ("),
        ("data.path", TEXT),
        ("dataset", TEXT),
        ("seq_len", "did you mean trainer.sequence_length?"),
        ("output_dir", "did you mean trainer.run_dir?"),
        ("gpus", "did you mean torchrun --nproc_per_node ("),
    ],
)
def test_what_other_trainers_call_a_key_is_answered_with_the_one_that_is_meant(tmp_path, key, expected):
    content: object = "some"
    for part in reversed(key.split(".")):
        content = {part: content}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    for words in ([f"--{key}", "some"], ["--config", str(tmp_path / "c.yaml")]):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            parse_run(words)


def test_a_key_with_hyphens_is_answered_too():
    assert BATCH in train("--batch-size", "8").stderr
    assert "did you mean dry_run?" in train("--dry-run", "1").stderr


def test_every_answer_to_a_first_guess_is_a_key_of_the_configuration_and_no_guess_hides_one():
    known = {
        line.split()[0].removeprefix("--")
        for line in train("--help").stdout.split("\n  ")
        if "--" in line[:4]
    }
    assert {"trainer.steps", "optimizer.hidden.algorithm"} <= known
    for guess, meant in GUESSES.items():
        assert all(key in known or key.startswith("torchrun ") for key in meant)
        # Only the names of sections are both: they are answered where a value stands in place of their keys.
        assert guess not in known or any(key.startswith(f"{guess}.") for key in known)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "is empty"),
        ("# nothing yet\n", "is empty"),
        ("- 1\n- 2\n", "holds a list"),
        ("3\n", "holds a single value"),
    ],
)
def test_a_file_without_sections_is_refused_by_name(tmp_path, text, found):
    (tmp_path / "c.yaml").write_text(text)
    refused = train("--config", str(tmp_path / "c.yaml"))
    assert refused.returncode == 2
    assert refused.stderr == (
        f"train.py: error: {tmp_path / 'c.yaml'} {found}, expected YAML with the sections model, data, optimizer and "
        "trainer\n"
    )


@pytest.mark.parametrize(("folder", "expected"), [("", "is empty"), ("train.py", "which is a file")])
def test_a_run_directory_that_cannot_be_one_is_refused(tmp_path, folder, expected):
    config, cache = str(ROOT / "configs" / "quickstart.yaml"), str(tmp_path / "cache")
    found = train("--config", config, "--data.cache", cache, f"--trainer.run_dir={folder}")
    assert found.returncode == 2
    assert expected in found.stderr


def test_an_unknown_key_in_a_file_names_the_nearest_valid_one(tmp_path):
    (tmp_path / "c.yaml").write_text("trainer:\n  global_bach: 3\n")
    found = train("--config", str(tmp_path / "c.yaml"))
    assert found.returncode == 2
    assert "did you mean trainer.global_batch" in found.stderr


def test_a_rate_without_a_role_names_the_roles(tmp_path):
    (tmp_path / "c.yaml").write_text("optimizer: {lr: 0.1}\n")
    found = train("--config", str(tmp_path / "c.yaml"))
    assert found.returncode == 2
    assert "each role has its own, one of optimizer.hidden.lr" in found.stderr


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("model: {width: 64\noptimizer: 1\n", "line 2, column 10"),
        ("trainer:\n\tsteps: 1\n", "line 2, column 1"),
    ],
)
def test_yaml_that_cannot_be_read_names_file_and_line(tmp_path, text, where):
    (tmp_path / "c.yaml").write_text(text)
    for words in (["--config", str(tmp_path / "c.yaml")], [f"--config={tmp_path / 'c.yaml'}"]):
        found = train(*words)
        assert found.returncode == 2
        assert f"{tmp_path / 'c.yaml'}, {where}: " in found.stderr
        assert len(found.stderr.splitlines()) == 1


def test_without_arguments_it_says_how_to_begin_and_starts_nothing():
    found = train()
    assert found.returncode == 2
    assert found.stderr.count("  python train.py --") == 3
    assert "error" not in found.stderr


def test_help_names_every_key_once_after_a_usage_of_one_line():
    found = train("--help")
    assert found.returncode == 0
    usage, _, rest = found.stdout.partition("\n\n")
    assert usage == "usage: train.py --config FILE [--any.key VALUE ...] [--dry_run [N]]"
    assert rest.count("  --optimizer.hidden.lr ") == 1


def test_a_number_in_place_of_a_section_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("optimizer: 3\n")
    found = train("--config", str(tmp_path / "c.yaml"))
    assert found.returncode == 2
    assert "optimizer is 3, expected a mapping" in found.stderr


@pytest.mark.parametrize(
    "given",
    [
        ["--optimizer.head.lr=0.5"],
        ["--optimizer.head", "{lr: 0.5}"],
        ["--optimizer", "{head: {lr: 0.5}}"],
        ["--config", "FILE"],
        ["--config=FILE", "--optimizer.embed.beta=0.5"],
    ],
)
def test_what_a_heads_rule_leaves_out_is_that_of_the_embedding(tmp_path, given):
    file = tmp_path / "head.yaml"
    file.write_text("optimizer: {head: {lr: 0.5}}")
    words = [word.replace("FILE", str(file)) for word in given]
    config, plain, _ = parse_run(words)
    assert config.optimizer.head == replace(OptimizerConfig().embed, lr=0.5)
    assert plain["optimizer"]["head"] == plain["optimizer"]["embed"] | {"lr": 0.5}
    assert config.optimizer.value_embed is None


def test_a_head_keeps_what_it_names_even_where_that_is_the_default_of_a_rule():
    words = [
        "--optimizer.embed.lr=0.3",
        "--optimizer.head",
        "{lr: 0.5, scale: nuclear}",
        "--optimizer.head.beta=0.95",
    ]
    head = parse_run(words)[0].optimizer.head
    assert head == replace(OptimizerConfig().embed, lr=0.5, scale="nuclear", beta=0.95)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--optimizer.hidden.algorithm=adamw"],
            "optimizer.hidden has algorithm 'adamw' but no lr of its own, expected one, since 0.02 is a rate for "
            "algorithm 'polar': start at lr 0.003",
        ),
        (
            ["--optimizer.hidden", "{algorithm: adamw}"],
            "optimizer.hidden has algorithm 'adamw' but no lr of its own",
        ),
        (
            ["--optimizer", "{embed: {scale: nuclear}}"],
            "optimizer.embed has scale 'nuclear' but no lr of its own",
        ),
        (["--optimizer.head.scale", "muon"], "optimizer.head has scale 'muon' but no lr of its own"),
        (
            ["--optimizer.value_embed.scale=muon"],
            "optimizer.value_embed has scale 'muon' but no lr of its own",
        ),
        # A file's rate is for the file's rule.
        (
            ["--config=FILE", "--optimizer.hidden.algorithm=adamw"],
            "since 0.04 is a rate for algorithm 'polar'",
        ),
        (
            ["--config=FILE", "--optimizer.embed", "{scale: nuclear, lr: 0.2}"],
            "optimizer.head, which follows optimizer.embed, has scale 'nuclear' but no lr of its own",
        ),
        (["--config=FILE", "--config=OTHER"], "since 0.04 is a rate for algorithm 'polar'"),
    ],
)
def test_a_rule_never_keeps_the_rate_of_another_one(tmp_path, words, said):
    (tmp_path / "FILE").write_text("optimizer: {hidden: {lr: 0.04}, head: {lr: 0.5}}")
    (tmp_path / "OTHER").write_text("optimizer: {hidden: {algorithm: adamw}}")
    places = [
        word.replace("FILE", f"{tmp_path}/FILE").replace("OTHER", f"{tmp_path}/OTHER") for word in words
    ]
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_run(places)


def test_a_changed_rule_has_the_rate_that_is_given_with_it(tmp_path):
    file = tmp_path / "muon.yaml"
    file.write_text("optimizer: {hidden: {lr: 0.04}, head: {lr: 0.5}}")
    adamw = ["--optimizer.hidden.algorithm=adamw", "--optimizer.hidden.lr", "1e-3"]
    assert parse_run(["--config", str(file), *adamw])[0].optimizer.hidden.lr == 1e-3
    tables = ["--optimizer.embed", "{scale: nuclear, lr: 0.2}"]
    following = parse_run(tables)[0].optimizer
    assert following.rule("head") == replace(OptimizerConfig().embed, scale="nuclear", lr=0.2)
    both = parse_run(["--config", str(file), *tables, "--optimizer.head.lr=0.01"])[0].optimizer
    assert (both.rule("head").scale, both.rule("head").lr) == ("nuclear", 0.01)
    # Without a head of its own, whatever a file gave it, it follows the embedding.
    none = parse_run(["--config", str(file), *tables, "--optimizer.head=null"])[0].optimizer
    assert none.rule("head") == following.rule("head")
    assert parse_run(["--config", str(file), "--optimizer.hidden.scale=muon"])[0].optimizer.hidden.lr == 0.04


def test_a_printed_configuration_has_the_heads_whole_rule():
    printed = yaml.safe_load(train("--optimizer.head.lr=0.5", "--print_config").stdout)["optimizer"]
    assert printed["head"] == printed["embed"] | {"lr": 0.5}


def test_the_merged_configuration_can_be_printed():
    found = train("--config", "configs/quickstart.yaml", "--optimizer.hidden.lr", "0.123", "--print_config")
    assert found.returncode == 0
    assert "lr: 0.123" in found.stdout
    assert "run_dir: runs/quickstart" in found.stdout


def test_help_explains_every_key():
    found = train("--help")
    assert found.returncode == 0
    for words in (
        "--optimizer.hidden.lr",
        "sequences per optimizer step",
        "--trainer.strategy.name",
        "--data.tokenizer.vocab_size",
        "steps between saves",
    ):
        assert words in found.stdout


def planned(folder: Path, config: str = "quickstart") -> tuple[str, ...]:
    """A shipped configuration in a new run directory: its own may hold a run of this checkout's user."""
    return ("--config", f"configs/{config}.yaml", "--trainer.run_dir", str(folder / "run"))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ("gpt2-small-fineweb", "275,742,772"),
        ("gpt2-small-fineweb-adam", "275,742,772"),
        ("gpt2-medium-fineweb", "454,496,336"),
        ("gpt2-medium-fineweb-adam", "454,496,336"),
        ("qwen2.5-adamw", "540,865,536"),
        ("qwen2.5-muon-adamw", "540,865,536"),
        ("qwen2.5-muon-polarsgdm", "540,865,536"),
    ],
)
def test_a_dry_run_of_each_paper_run_shows_its_exact_parameter_count(tmp_path, config, count):
    found = train(*planned(tmp_path, config), "--dry_run", "8")
    assert found.returncode == 0, found.stderr
    assert f"parameters: {count}" in found.stdout
    assert "max/mean over 8 ranks" in found.stdout


def test_a_dry_run_says_which_data_are_not_there(tmp_path):
    command = (*planned(tmp_path), "--dry_run", "1", "--data.source", "files")
    refused = train(*command)
    assert refused.returncode == 2
    assert "data.paths is empty with data.source 'files'" in refused.stderr
    found = train(*command, "--data.paths", f"['{tmp_path}/none.txt']")
    assert found.returncode == 0
    assert f"data.paths: {tmp_path}/none.txt does not exist on this machine" in found.stdout


def test_a_dry_run_says_which_vocabulary_it_assumes_where_none_is_known(tmp_path):
    command = (*planned(tmp_path), "--dry_run", "1")
    hub = train(*command, "--data.tokenizer.name", "gpt2")
    assert "model.vocab_size: 151,936 assumed, qwen2.5's own" in hub.stdout
    for known in ((), ("--data.tokenizer.name", "gpt2", "--model.vocab_size", "50257")):
        assert "assumed" not in train(*command, *known).stdout


def test_a_dry_run_has_a_line_per_role_and_the_full_one_a_line_per_matrix(tmp_path):
    command = planned(tmp_path)
    short = train(*command, "--dry_run", "2").stdout
    rows = {line.split()[0]: line.split()[1:3] for line in short.splitlines() if line.strip()}
    assert rows["embed"] == rows["head"] == ["131,072", "1"]
    # Seven matrices a layer, three layers.
    assert rows["hidden"][1] == "21"
    assert "up_proj" not in short
    full = train(*command, "--dry_run_full", "2").stdout
    assert sum("up_proj" in line for line in full.splitlines()) == 3
    assert train(*command, "--dry_run_full", "0").returncode == 2
    both = train(*command, "--dry_run", "3", "--dry_run_full", "2")
    assert both.returncode == 2
    assert "both --dry_run 3 and --dry_run_full 2 are given, expected one of them" in both.stderr


def test_a_dry_run_without_a_number_is_one_of_one_rank(tmp_path):
    found = train(*planned(tmp_path), "--dry_run")
    assert found.returncode == 0, found.stderr
    assert "\n1 rank, strategy" in found.stdout
    assert "max/mean over 1 rank:" in found.stdout
    assert "traffic" not in found.stdout


@pytest.mark.parametrize("config", sorted(p.stem for p in (ROOT / "configs").glob("*.yaml")))
def test_every_configuration_in_the_project_is_valid(config):
    run, plain, show = parse_run(["--config", str(ROOT / "configs" / f"{config}.yaml")])
    assert show is None
    run.optimizer.check()
    run.trainer.check(1)
    assert plain["trainer"]["run_dir"] == f"runs/{config}"


def test_an_interrupt_before_training_is_one_word(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as left:
        run(interrupted)
    assert left.value.code == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"


def test_a_configuration_in_a_run_directory_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\x00\xff")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read as a configuration .* remove it"):
        rundir.read(tmp_path / "config.yaml")
