"""Text from a finished run: streamed, reproducible, and where neither data nor cache are."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.tokenizers import Tokenizer as WithTokenizer
from data.tokenizers import TokenizerInfo
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.measure import continuation
from tools.generate import main
from tools.runs import Run, load_run


def test_the_command_prints_the_text_of_its_seed(trained, capsys):
    run = str(trained("gpt2-medium"))
    assert main([run, "--prompt", "The ", "--tokens", "20", "--top_p", "0.9", "--top_k", "0"]) == 0
    first = capsys.readouterr().out
    expected = "".join(load_run(run).stream("The ", 20, top_p=0.9))
    assert first == f"The {expected}\n"
    for args, expected in (
        (("--top_p", "0"), "--top_p is 0.0, expected a number in (0, 1]"),
        (("--top_k", "-1"), "--top_k is -1, expected a whole number >= 0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            main([run, *args])


def test_an_export_is_named_as_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"is a model in Hugging Face's format .* load it with transformers"
    ):
        main([str(tmp_path)])


def test_streamed_text_is_the_text_of_all_tokens(trained):
    run = load_run(trained("qwen2.5"))
    pieces = list(run.stream("日", 30, temperature=2.0, seed=3))
    start = run.prompt("日")
    assert run.sample("日", 0) == "日"
    assert start.shape[0] == 1
    assert "".join(pieces)
    assert all(not piece.endswith("\ufffd") for piece in pieces[:-1])


@pytest.mark.parametrize("architecture", ["qwen2.5", "gpt2-small"])
def test_a_run_directory_alone_is_enough(tmp_path, trained, architecture):
    run = tmp_path / "moved"
    shutil.copytree(trained(architecture), run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("topics.jsonl", "gone.jsonl"))
    assert load_run(run).sample("def ", 5).startswith("def ")


def test_a_decoder_that_strips_the_first_space_keeps_the_one_between_prompt_and_continuation():
    """As those of Llama 2 and Mistral do."""
    words = ["<unk>", "</s>", "▁The", "▁cat", "▁sat", "▁on"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    info = TokenizerInfo("words", "", len(words), 1)
    tokenizer = WithTokenizer(backend, info)
    run = Run(
        SimpleNamespace(progress=1.0),
        SimpleNamespace(eval=lambda: None, stream=lambda *_, **__: (torch.tensor([[i]]) for i in (4, 5))),
        SimpleNamespace(load=lambda: tokenizer, end_of_text=1),
    )
    assert list(run.stream("The cat", 2)) == [" sat", " on"]
    assert list(run.stream("", 2)) == ["sat", " on"]
    assert run.sample("The cat", 2) == "The cat sat on"
    assert continuation(tokenizer, tokenizer.encode("The cat"), [4, 5]) == " sat on"
