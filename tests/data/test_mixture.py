"""Mixtures: exact shares, one order at every world size, and a validation set of each source."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import open_data
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.mixture import Dealing, shares
from data.prepare import prepare
from data.shards import write_shard
from data.sources import open_source
from data.tokenizers import open_tokenizer
from polargrad_dist.errors import ConfigError, DataError
from tests.data.corpus import config, json_lines, quiet, texts

SIZES = {"sequence_length": 16, "global_batch": 12, "micro_batch": 3, "report": quiet}


def mixture(folder, weights=(0.7, 0.2, 0.1), **changes) -> DataConfig:
    """Three corpora of different sizes; the documents of each hold a word of its own."""
    sources = []
    for name, count, weight in zip("abc", (400, 150, 90), weights, strict=True):
        path = json_lines(folder / f"{name}.jsonl", [f"<{name}> {text}" for text in texts(count, seed=count)])
        sources.append(SourceConfig(weight=weight, paths=[str(path)]))
    tokenizer = TokenizerConfig(vocab_size=300)
    made = DataConfig(
        sources=sources, tokenizer=tokenizer, validation_fraction=0.1, cache=str(folder / "cache")
    )
    return DataConfig(**(vars(made) | changes))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_every_beginning_has_each_source_to_within_one_of_its_share(counts):
    deal = Dealing(counts)
    period = sum(counts)
    source, index = deal(np.arange(3 * period))
    for k, count in enumerate(counts):
        here = source == k
        assert here.sum() == 3 * count
        assert index[here].tolist() == list(range(3 * count))
        share = (np.arange(3 * period) + 1) * count / period
        assert np.abs(here.cumsum() - share).max() < 1


def test_weights_are_taken_as_they_are_written_or_refused():
    assert shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert shares([3, 1]) == [3, 1]
    assert shares([2.0, 2.0, 4.0]) == [1, 1, 2]
    for weights, expected in (
        ([1.0, 0.0], "weight 0"),
        ([float("nan")], "weight nan"),
        ([1 / 3, 0.5001], "round them"),
    ):
        with pytest.raises(ConfigError, match=expected):
            shares(weights)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_order_is_the_same_at_every_world_size_and_from_every_start(tmp_path, world):
    config = mixture(tmp_path)
    alone = open_data(config, **SIZES)
    expected = alone.train.places(np.arange(10 * 12))
    rows = []
    batches = [replace(alone.train, rank=rank, world=world).batches_from(24) for rank in range(world)]
    for _ in range(3):
        for ranks in batches:
            rows += [next(ranks)[0].numpy() for _ in range(12 // world // 3)]
    for row, (tokens, window) in zip(np.concatenate(rows), expected[24:60], strict=True):
        assert row.tolist() == tokens.read(window * 16, 16).tolist()
    for ranks in batches:
        ranks.close()


def test_shares_epochs_validation_sets_and_the_fingerprint(tmp_path):
    data = open_data(mixture(tmp_path), **SIZES)
    assert set(data.validations) == {"a", "b", "c"}
    tokenizer = data.load_tokenizer()
    for name, found in data.validations.items():
        text = tokenizer.decode(found.targets().tolist())
        assert f"<{name}>" in text
        assert not any(f"<{other}>" in text for other in set("abc") - {name})
    whole = sum(found.num_targets + 1 for found in data.validations.values())
    assert data.validation.num_targets == whole - 1
    sources = [
        [part is one for one in data.train.parts].index(True)
        for part, _ in data.train.places(np.arange(1000))
    ]
    assert np.bincount(sources).tolist() == [700, 200, 100]
    first_round = [
        w for part, w in data.train.places(np.arange(data.train.num_samples)) if part is data.train.parts[0]
    ]
    assert len(set(first_round)) == min(len(first_round), (len(data.train.parts[0]) - 1) // 16)
    assert data.train.epochs(1000)["a"] == pytest.approx(700 / ((len(data.train.parts[0]) - 1) // 16))
    other = open_data(mixture(tmp_path, weights=(0.6, 0.3, 0.1)), **SIZES)
    assert other.fingerprint() != data.fingerprint()
    limited = open_data(mixture(tmp_path, validation_tokens=200), **SIZES)
    assert limited.validation.num_targets == 200
    assert "<c>" in tokenizer.decode(limited.validation.targets().tolist())
    assert limited.validation.bytes_per_token == pytest.approx(data.validation.bytes_per_token, rel=0.1)


def test_prepared_folders_and_text_mix_with_one_tokenizer(tmp_path):
    config = mixture(tmp_path)
    path = json_lines(tmp_path / "d.jsonl", texts(200, seed=9))
    one = DataConfig(
        source="files", paths=[str(path)], tokenizer=config.tokenizer, cache=str(tmp_path / "cache")
    )
    folder = prepare(one, report=quiet)
    both = [SourceConfig(weight=1, source="shards", paths=[str(folder)], name="d"), config.sources[0]]
    data = open_data(mixture(tmp_path, sources=both), **SIZES)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert data.tokenizer.hash == manifest["tokenizer"]["hash"]
    assert data.train.names == ("d", "a")
    other = DataConfig(**(vars(one) | {"tokenizer": TokenizerConfig(vocab_size=290)}))
    second = SourceConfig(source="shards", paths=[str(prepare(other, report=quiet))], name="e")
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        open_data(mixture(tmp_path, sources=[both[0], second]), **SIZES)


def test_further_validation_sets_are_measured_with_the_runs_tokenizer(tmp_path):
    (tmp_path / "poem.txt").write_text("karasta losta 🙂\n" * 30)
    paths = {"poem": [str(tmp_path / "poem.txt")]}
    data = open_data(mixture(tmp_path, validation_sets=paths), **SIZES)
    poem = data.validations["poem"]
    text = (tmp_path / "poem.txt").read_text()
    assert data.load_tokenizer().decode(poem.targets().tolist()[1:]) == text
    assert poem.bytes_per_token == pytest.approx(len(text.encode()) / poem.num_targets)
    folder = data.validations and prepare(
        DataConfig(source="files", paths=paths["poem"], validation_fraction=0, cache=str(tmp_path / "x")),
        report=quiet,
        tokenizer=data.load_tokenizer(),
    )
    again = open_data(mixture(tmp_path, validation_sets={"poem": [str(folder)]}), **SIZES)
    assert again.validations["poem"].targets().tolist() == poem.targets().tolist()
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"data\.validation_sets\.nothing holds fewer than two tokens"):
        open_data(mixture(tmp_path, validation_sets={"nothing": [str(tmp_path / "empty.jsonl")]}), **SIZES)


def test_no_source_of_a_mixture_trains_on_a_validation_set(tmp_path):
    (tmp_path / "a").mkdir()
    config = mixture(tmp_path / "a")
    told: list[str] = []
    json_lines(tmp_path / "a" / "held.jsonl", [f"<held> {text}" for text in texts(20)])
    (folder := tmp_path / "b").mkdir()
    for name in ("a.jsonl", "held.jsonl"):
        (tmp_path / "a" / name).rename(folder / name)
    settled = replace(
        config,
        sources=[replace(config.sources[0], name="a", paths=[str(folder)]), *config.sources[1:]],
        validation_sets={"held": [str(folder / "held.jsonl")]},
    )
    data = open_data(settled, **SIZES | {"report": told.append})
    tokenizer, tokens = data.load_tokenizer(), data.train.tokens
    assert "<held>" not in tokenizer.decode(tokens.read(0, len(tokens)).tolist())
    assert "<held>" in tokenizer.decode(data.validations["held"].targets().tolist())
    assert told.count("1 file of data.paths left out of training, as named in data.validation_sets.held") == 1


def test_held_out_shards_of_every_source_belong_to_the_fingerprint_and_sets_that_are_only_measured_do_not(
    tmp_path,
):
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        write_shard(folder / "x_train_0.bin", np.arange(500, dtype=np.uint16) % 200)
        write_shard(folder / "x_val_0.bin", np.arange(100, dtype=np.uint16))
    (tmp_path / "poem.txt").write_text("karasta losta\n" * 30)
    words = tmp_path / "words"
    trained = config(tmp_path, json_lines(tmp_path / "t.jsonl", texts(300)))
    words.mkdir()
    made = open_tokenizer(trained.tokenizer, open_source(trained), tmp_path / "t").json()
    (words / "tokenizer.json").write_text(made)
    sources = [SourceConfig(source="shards", paths=[str(tmp_path / name)], name=name) for name in "ab"]
    one = DataConfig(
        sources=sources, tokenizer=TokenizerConfig(name=str(words)), cache=str(tmp_path / "cache")
    )
    before = open_data(one, **SIZES)
    measured = replace(one, validation_sets={"poem": [str(tmp_path / "poem.txt")]})
    assert "poem" in (data := open_data(measured, **SIZES)).validations
    assert data.fingerprint() == before.fingerprint()
    write_shard(tmp_path / "b" / "x_val_0.bin", np.arange(100, dtype=np.uint16)[::-1].copy())
    assert open_data(one, **SIZES).fingerprint() != before.fingerprint()


def test_foreign_shards_of_every_source_are_read_whole_in_the_first_epoch(tmp_path):
    for name in "ab":
        write_shard(tmp_path / f"{name}_train_0.bin", np.arange(500, dtype=np.uint16) % 200)
    sources = [
        SourceConfig(source="shards", paths=[str(tmp_path / f"{name}_train_0.bin")], name=name)
        for name in "ab"
    ]
    one = DataConfig(sources=sources, cache=str(tmp_path / "cache"))
    train = open_data(one, **SIZES).train
    batches = train.batches_from(0)
    next(batches)
    train.background.wait()
    batches.close()
    known = [json.loads(path.read_text())["path"] for path in (tmp_path / "cache" / "checksums").iterdir()]
    assert sorted(Path(path).name for path in known) == ["a_train_0.bin", "b_train_0.bin"]


def test_who_waits_for_a_mixture_says_for_what(tmp_path):
    said = []

    def meanwhile(doing, fn):
        said.append(doing)
        return fn()

    open_data(mixture(tmp_path), **SIZES, meanwhile=meanwhile)
    assert said == ["prepare the data", "open the tokenizer"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"paths": ["x.jsonl"]}, r"data\.paths is set with data\.sources"),
        ({"validation_paths": ["x.jsonl"]}, r"expected data\.validation_sets"),
        ({"validation_sets": {"a": ["x.txt"]}}, "names 'a', expected a name of its own"),
    ],
)
def test_contradictions_are_refused(tmp_path, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        open_data(mixture(tmp_path, **changes), **SIZES)
    config = mixture(tmp_path)
    with pytest.raises(ConfigError, match="two sources called 'a'"):
        open_data(mixture(tmp_path, sources=[config.sources[0], config.sources[0]]), **SIZES)
    with pytest.raises(ConfigError, match="prepared one by one"):
        prepare(config, report=quiet)
