"""Runs that begin with the weights of another: of Hugging Face's format, or of a run of this trainer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from polargrad_dist.trainer.checkpoint.single import find_checkpoint
from tests.commandline import train
from tools.export import export
from tools.runs import load_run

FROZEN = ("--optimizer.hidden.lr", "0", "--optimizer.embed.lr", "0", "--optimizer.scalar.lr", "0")
UNSIZED = ("--model.layers", "null", "--model.width", "null", "--model.heads", "null")


def first_loss(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def began(run: Path, *args: str) -> Path:
    done = train(*args, "--trainer.run_dir", str(run))
    assert done.returncode == 0, done.stderr
    return run


def test_an_exported_run_comes_back_as_qwen_and_as_a_transformers_model_and_resumes_without_the_export(
    tmp_path, trained, arguments
):
    export(find_checkpoint(trained("qwen2.5")), tmp_path)
    one = ("--trainer.steps", "1", *FROZEN, *UNSIZED, "--model.max_sequence_length", "null")
    given = arguments(tmp_path / "x", *one, "--model.init_from", str(tmp_path))
    qwen = began(tmp_path / "qwen", *given)
    other = began(tmp_path / "auto", *given, "--model.architecture", "transformers")
    source = load_run(trained("qwen2.5"))
    for run in (qwen, other):
        opened = load_run(run)
        tokens = torch.arange(60)[None]
        torch.testing.assert_close(opened.model(tokens), source.model(tokens), rtol=1e-5, atol=1e-5)
        assert first_loss(run) == pytest.approx(first_loss(qwen), rel=1e-5)
    tmp_path.joinpath("model.safetensors").unlink()
    tmp_path.joinpath("config.json").unlink()
    for run in (qwen, other):
        kind = ("--model.architecture", "transformers") if run == other else ()
        again = train(*given, *kind, "--trainer.run_dir", str(run), "--trainer.steps", "2")
        assert again.returncode == 0, again.stderr


def test_a_run_begins_with_the_weights_of_another_and_nothing_else_of_it(tmp_path, trained, arguments):
    source = trained("gpt2-small")
    given = arguments(
        tmp_path / "x", "--model.architecture", "gpt2-small", *UNSIZED, "--trainer.steps", "1", *FROZEN
    )
    run = began(tmp_path / "run", *given, "--model.init_from", str(source))
    mine, theirs = (find_checkpoint(folder) for folder in (run, source))
    assert mine.step == 1
    for name in theirs.names():
        assert torch.equal(mine.read("model/" + name), theirs.read("model/" + name))


def test_untied_from_tied_weights_starts_with_two_copies_of_the_table(tmp_path, arguments, trained):
    (tmp_path / "hf").mkdir()
    export(find_checkpoint(trained("qwen2.5")), tmp_path / "hf")
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    given = arguments(tmp_path / "x", *UNSIZED, "--trainer.steps", "1", *FROZEN)
    run = began(tmp_path / "run", *given, "--model.init_from", str(tmp_path / "hf"))
    model = load_run(run).model
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_another_architecture_trains_resumes_exports_and_starts_the_next_run(tmp_path, arguments, kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": kind, "intermediate_size": 48, "max_position_embeddings": 64} | sizes
    if kind == "mixtral":
        config |= {"num_local_experts": 4, "output_router_logits": True}
    bare = ("--model.max_sequence_length", "null", *UNSIZED, "--model.architecture", "transformers")
    given = arguments(tmp_path / "x", *bare, "--model.config", json.dumps(config))
    run = began(tmp_path / "run", *given)
    began(run, *given, "--trainer.steps", "6")
    (tmp_path / "out").mkdir()
    export(find_checkpoint(run), tmp_path / "out")
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    tokens = torch.arange(1, 60)[None]
    ours = load_run(run)
    torch.testing.assert_close(model(tokens).logits, ours.model(tokens), rtol=1e-5, atol=1e-5)
    one = arguments(
        tmp_path / "x", *bare, "--trainer.steps", "1", *FROZEN, "--model.init_from", str(tmp_path / "out")
    )
    next_run = load_run(began(tmp_path / "next", *one))
    torch.testing.assert_close(next_run.model(tokens), ours.model(tokens), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path, trained, arguments):
    (tmp_path / "hf").mkdir()
    export(find_checkpoint(trained("qwen2.5")), tmp_path / "hf")
    folder = str(tmp_path / "hf")
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (tmp_path / "hf").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer))
    for args, expected in (
        (("--model.init_from", folder), "model.width is 64, but model.init_from has 32"),
        ((*UNSIZED, "--model.init_from", str(moved)), "whose tokenizer gives"),
        ((*UNSIZED, "--model.init_from", str(tmp_path / "none")), "model.init_from is"),
        (
            ("--model.init_from", folder, "--model.architecture", "gpt2-small"),
            "expected qwen2.5 or transformers",
        ),
        (("--model.init_from", str(trained("gpt2-small"))), "is a run of 'gpt2-small': set it to that"),
    ):
        given = arguments(
            tmp_path / "run", "--model.width", "64", "--model.max_sequence_length", "null", *args
        )
        done = train(*given)
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr
        assert not (tmp_path / "run").exists()
