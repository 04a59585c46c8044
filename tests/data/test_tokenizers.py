import json
import os
import random
import sys
import textwrap
import time
from pathlib import Path

import pytest

from data.config import DataConfig, TokenizerConfig
from data.sources import open_source
from data.tokenizers import (
    END_OF_TEXT,
    Tokenizer,
    TokenizerInfo,
    _without_long_words,
    open_ready,
    open_tokenizer,
)
from polargrad_dist.errors import ConfigError, DataError
from tests.data.corpus import config, json_lines, texts


@pytest.fixture
def trained(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", texts(300))
    settings = config(tmp_path, path)
    return open_tokenizer(settings.tokenizer, open_source(settings), tmp_path / "cache")


def test_the_trained_bpe_gives_every_text_back_and_knows_no_special_text(trained):
    assert trained.info.vocab_size == 300
    for text in ("kara losta 日本ting 🙂", "\x00\t\r\n", "ǅ unseen ∂", "<|endoftext|> is text", ""):
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.info.end_of_text not in ids
    assert trained.decode([trained.info.end_of_text]) == "<|endoftext|>"


def test_the_bpe_is_trained_once_and_the_same_from_the_same_text(tmp_path, trained):
    path = json_lines(tmp_path / "b.jsonl", texts(300))
    other = config(tmp_path, path)
    cached = sorted((tmp_path / "cache").iterdir())
    again = open_tokenizer(other.tokenizer, open_source(other), tmp_path / "elsewhere")
    assert again.info.hash == trained.info.hash
    first = config(tmp_path, tmp_path / "a.jsonl")
    before = [file.stat().st_mtime_ns for file in cached]
    open_tokenizer(first.tokenizer, open_source(first), tmp_path / "cache")
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "cache").iterdir())] == before
    changed = TokenizerConfig(vocab_size=301)
    assert open_tokenizer(changed, open_source(first), tmp_path / "cache").info.vocab_size == 301


def test_the_bpe_learns_from_training_text_only(tmp_path):
    train = json_lines(tmp_path / "train.jsonl", ["aaaa bbbb\n" * 20] * 20)
    held = json_lines(tmp_path / "held.jsonl", ["zzzz\n" * 1000] * 20)
    settings = config(
        tmp_path, train, validation_paths=[str(held)], tokenizer=TokenizerConfig(vocab_size=262)
    )
    tokenizer = open_tokenizer(settings.tokenizer, open_source(settings), tmp_path / "cache")
    assert len(tokenizer.encode(" bbbb")) == 1
    assert len(tokenizer.encode("zzzz")) == 4


def test_a_text_without_spaces_is_learnt_from_in_bearable_time(tmp_path):
    text = tmp_path / "genome.txt"
    text.write_text("".join(random.Random(0).choices("ACGT", k=2_000_000)))
    settings = config(tmp_path, text, tokenizer=TokenizerConfig(vocab_size=300))
    began = time.monotonic()
    tokenizer = open_tokenizer(settings.tokenizer, open_source(settings), tmp_path / "cache")
    # In one word it would be a matter of hours
    assert time.monotonic() - began < 60
    assert len(tokenizer.encode("ACGT" * 100)) < 300
    with pytest.raises(ConfigError, match="train_bytes is -5"):
        open_tokenizer(TokenizerConfig(train_bytes=-5), open_source(settings), tmp_path / "cache")


def test_the_cuts_of_long_words_lose_nothing():
    text = " a" * 700 + "b" * 3500 + " c\n" + "d" * 999 + " " + "e" * 1000
    assert "".join(_without_long_words(text)) == text
    assert list(_without_long_words("plain text")) == ["plain text"]


def test_a_folder_loads_without_transformers_and_its_hash_is_its_content(tmp_path, trained):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(trained.json())
    loaded = open_ready(str(folder), None)
    assert loaded.info.hash == trained.info.hash
    assert loaded.info.end_of_text == trained.info.end_of_text
    assert loaded.encode("karasta\n") == trained.encode("karasta\n")
    raw = json.loads(trained.json())
    raw["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert open_ready(str(folder), None).info.hash != trained.info.hash


def test_end_of_text_is_what_the_folder_or_the_configuration_says(tmp_path, trained):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(trained.json().replace("<|endoftext|>", "</s>"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.end_of_text is None"):
        open_ready(str(folder), None)
    assert open_ready(str(folder), "</s>").info.end_of_text == trained.info.end_of_text
    assert open_ready(str(folder), 7).info.end_of_text == 7
    for wrong in ("<eos>", 300, -1):
        with pytest.raises(ConfigError, match="does not have"):
            open_ready(str(folder), wrong)
    for token in ("</s>", {"content": "</s>"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert open_ready(str(folder), None).info.end_of_text == trained.info.end_of_text


def test_a_tokenizer_that_cannot_be_had_is_said_at_once_with_the_way_out(tmp_path):
    start = time.monotonic()
    for name in ("nobody/no-tokenizer-of-this-name", str(tmp_path)):
        with pytest.raises(
            DataError, match=r"cannot be loaded .*: set data\.tokenizer\.name to a local folder"
        ):
            open_ready(name, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        open_ready(str(tmp_path), None)
    with pytest.raises(ConfigError, match="at least 257"):
        open_tokenizer(TokenizerConfig(vocab_size=256), open_source(DataConfig()), tmp_path)
    assert time.monotonic() - start < 30


def test_a_path_that_is_no_tokenizers_folder_is_told_from_a_hub_name(tmp_path, trained):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(trained.json())
    with pytest.raises(ConfigError, match=rf"which is a file, expected the folder .* set it to '{folder}'"):
        open_ready(str(folder / "tokenizer.json"), None)
    with pytest.raises(DataError, match="there is no such folder"):
        open_ready(str(tmp_path / "nowhere"), None)
    for wrong in ("{", "[1]", '{"eos_token": {"lstrip": false}}'):
        (folder / "tokenizer_config.json").write_text(wrong)
        with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read .* restore it, or"):
            open_ready(str(folder), "x")


def test_a_vocabulary_that_is_empty_or_lacks_a_word_is_said_in_a_sentence(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for vocabulary in ({}, {"known": 0, "end": 1}):
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.save(str(tmp_path / "tokenizer.json"))
        if not vocabulary:
            with pytest.raises(DataError, match="empty vocabulary"):
                open_ready(str(tmp_path), None)
    opened = open_ready(str(tmp_path), "end")
    assert opened.encode("known") == [0]
    with pytest.raises(
        DataError, match=r"cannot encode some of this text \(WordLevel error: Missing \[UNK\]"
    ):
        opened.encode("unknown")


def test_a_tiktoken_encoding_is_used_by_name(tmp_path, monkeypatch):
    """An encoding of single bytes, registered the way tiktoken's plugins are."""
    tiktoken = pytest.importorskip("tiktoken")
    plugin = tmp_path / "tiktoken_ext"
    plugin.mkdir()
    (plugin / "bytes_for_tests.py").write_text(
        textwrap.dedent("""
        def single_bytes():
            return {"name": "single_bytes", "pat_str": r"\\S+|\\s+", "special_tokens": {"<|endoftext|>": 256},
                    "mergeable_ranks": {bytes([i]): i for i in range(256)}}
        ENCODING_CONSTRUCTORS = {"single_bytes": single_bytes}
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", None)
    tiktoken.registry._available_plugin_modules.cache_clear()
    try:
        tokenizer = open_ready("tiktoken:single_bytes", None)
        assert (tokenizer.info.vocab_size, tokenizer.info.end_of_text) == (257, 256)
        text = "é <|endoftext|>"
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.info.load(tmp_path).info == tokenizer.info
        with pytest.raises(ConfigError, match="'<eos>', which the tokenizer"):
            open_ready("tiktoken:single_bytes", "<eos>")
        with pytest.raises(ConfigError, match="which tiktoken does not know"):
            open_ready("tiktoken:no-such-encoding", None)
    finally:
        tiktoken.registry._available_plugin_modules.cache_clear()
        sys.modules.pop("tiktoken_ext", None)


def test_ids_that_a_tokenizer_lacks_are_ignored_in_text(trained):
    """A model may have more rows than its tokenizer has tokens, and samples may take one."""
    tiktoken = pytest.importorskip("tiktoken")
    letters = {bytes([97 + i]): i for i in range(26)}
    # With a gap, as published encodings have
    encoding = tiktoken.Encoding("x", pat_str=".", mergeable_ranks=letters, special_tokens={END_OF_TEXT: 30})
    ours = Tokenizer(encoding, TokenizerInfo("tiktoken:x", "", 31, 30))
    for tokenizer, unknown in ((ours, (27, 31, 127)), (trained, (300, 383))):
        known = tokenizer.encode("abc")
        for token in unknown:
            assert tokenizer.decode([token, *known, token, tokenizer.info.end_of_text]) == "abc<|endoftext|>"


REAL = os.environ.get("POLARGRAD_TEST_DATA")


@pytest.mark.skipif(REAL is None, reason="POLARGRAD_TEST_DATA names no folder with real text and tokenizers")
@pytest.mark.parametrize(
    ("name", "words", "end_of_text", "vocab_size", "tokens"),
    [
        ("gpt2", [15496, 995], 50256, 50257, 1_053_999),
        ("qwen2.5", [9707, 1879], 151643, 151646, 1_009_844),
    ],
)
def test_real_tokenizers_give_the_published_ids_on_real_text(name, words, end_of_text, vocab_size, tokens):
    folder = Path(REAL or "") / "tokenizers" / name
    tokenizer = open_ready(str(folder), None)
    assert tokenizer.encode("Hello world") == words
    assert (tokenizer.info.end_of_text, tokenizer.info.vocab_size) == (end_of_text, vocab_size)
    path = Path(REAL or "") / "openwebtext-1000" / "openwebtext_1000.jsonl"
    documents = [part.text for part in open_source(config(Path(), path)).documents()]
    ids = tokenizer.encode_batch(documents)
    assert sum(map(len, ids)) == tokens
    assert [tokenizer.decode(some) for some in ids[:20]] == documents[:20]
