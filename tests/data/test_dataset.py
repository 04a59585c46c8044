import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import open_data
from data.config import DataConfig, TokenizerConfig
from data.corpora import _corpus
from data.shards import write_shard
from polargrad_dist.errors import ConfigError, DataError
from tests.commandline import ROOT
from tests.data.corpus import config, json_lines, quiet, texts
from tests.gloo import run_ranks

SIZES = {"sequence_length": 16, "global_batch": 4, "micro_batch": 1}


def opened(settings, **changes):
    return open_data(settings, **SIZES | {"report": quiet} | changes)


def on_a_rank(rank, world, settings, damage=None):
    """What a rank sees of the data, or the error it raises."""

    def gather(value):
        out = [None] * world
        torch.distributed.all_gather_object(out, value)
        return out

    try:
        data = open_data(settings, **SIZES, rank=rank, world=world, all_gather=gather, report=quiet)
    except (DataError, ConfigError) as error:
        return str(error)
    batches = data.train.batches()
    rows = [next(batches) for _ in range(20 // world * 4)]
    batches.close()
    held = [(tokens.numpy(), targets.numpy()) for tokens, targets in data.validation.batches()]
    return (
        np.concatenate([t.numpy() for t, _ in rows]),
        held,
        data.fingerprint(),
        data.validation.bytes_per_token,
    )


def test_ranks_prepare_once_and_share_the_same_batches_at_every_world_size(tmp_path):
    settings = config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(400)))
    seen = {world: run_ranks(on_a_rank, world, settings) for world in (1, 2, 4)}
    steps = {
        world: np.stack([rows.reshape(20, 4 // world, 16) for rows, *_ in results], axis=1).reshape(80, 16)
        for world, results in seen.items()
    }
    assert (steps[1] == steps[2]).all()
    assert (steps[1] == steps[4]).all()
    targets = {
        world: sorted(
            t for _, held, *_ in results for _, wanted in held for t in wanted[wanted != -100].tolist()
        )
        for world, results in seen.items()
    }
    assert targets[1] == targets[2] == targets[4]
    assert len({str(result[2]) for results in seen.values() for result in results}) == 1
    assert len({result[3] for results in seen.values() for result in results}) == 1
    assert len(list((tmp_path / "cache").glob("files-*"))) == 1


def test_an_error_on_one_rank_is_the_same_sentence_on_all(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\n")
    bad = config(tmp_path, tmp_path / "bad.jsonl")
    assert len(set(run_ranks(on_a_rank, 3, bad))) == 1
    assert "line 1: byte 0xff" in run_ranks(on_a_rank, 2, bad)[1]

    good = config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(400)))
    folder = opened(good).folder
    victim = folder / "validation-00000.bin"
    raw = bytearray(victim.read_bytes())
    raw[-3] ^= 1
    victim.write_bytes(raw)
    # The second rank's checksum finds it
    said = run_ranks(on_a_rank, 2, good)
    assert said[0] == said[1]
    assert f"{victim} is corrupt" in said[0]


def test_a_truncated_prepared_shard_is_named_at_start(tmp_path):
    settings = config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(400)))
    shard = opened(settings).folder / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00000\.bin is truncated"):
        opened(settings)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin cannot be read \(No such file"):
        opened(settings)


def test_bytes_per_token_are_those_of_the_validation_text(tmp_path):
    documents = texts(400)
    settings = config(tmp_path, json_lines(tmp_path / "a.jsonl", documents))
    data = opened(settings)
    tokenizer = data.load_tokenizer()
    held = tokenizer.decode(data.validation.targets()).split("<|endoftext|>")[1:]
    size = sum(len(text.encode()) for text in held)
    assert set(held) <= set(documents)
    assert data.validation.bytes_per_token * data.validation.num_targets == pytest.approx(size)
    few = opened(config(tmp_path, tmp_path / "a.jsonl", validation_tokens=50))
    assert few.validation.num_targets == 50
    assert few.validation.bytes_per_token == data.validation.bytes_per_token


def test_a_prepared_folder_opens_as_shards_with_all_it_knows(tmp_path):
    data = opened(config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(400))))
    moved = tmp_path / "moved"
    data.folder.rename(moved)
    again = opened(DataConfig(source="shards", paths=[str(moved)]))
    assert again.fingerprint() == data.fingerprint()
    assert (again.vocab_size, again.end_of_text, again.tokenizer) == (300, data.end_of_text, data.tokenizer)
    assert again.load_tokenizer().decode([again.end_of_text]) == "<|endoftext|>"


def test_several_prepared_folders_are_one_corpus_if_their_tokenizer_is_one(tmp_path):
    first = opened(config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(400))))
    same = TokenizerConfig(name=str(first.folder))
    more = json_lines(tmp_path / "b.jsonl", texts(300, seed=1))
    second = opened(config(tmp_path, more, tokenizer=same))
    other = opened(config(tmp_path, more, tokenizer=TokenizerConfig(vocab_size=320)))

    def together(*folders, **fields):
        return opened(DataConfig(source="shards", paths=[str(folder) for folder in folders], **fields))

    both = together(first.folder, second.folder)
    assert both.vocab_size == 300
    assert both.fingerprint()["shards"] == [*first.fingerprint()["shards"], *second.fingerprint()["shards"]]
    targets = [data.validation.num_targets for data in (first, second, both)]
    # Between the last token of one and the first of the other
    assert targets[2] == targets[0] + targets[1] + 1
    assert both.validation.bytes_per_token
    assert both.load_tokenizer().encode("ka lo") == first.load_tokenizer().encode("ka lo")
    with pytest.raises(DataError, match="another tokenizer than"):
        together(first.folder, other.folder)
    shard = second.folder / second.shards[0].name
    with pytest.raises(ConfigError, match="without a manifest"):
        together(first.folder, shard)
    with pytest.raises(ConfigError, match="validation_paths is set"):
        together(first.folder, validation_paths=[str(more)])
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match="is corrupt"):
        together(first.folder, second.folder)


@pytest.fixture
def foreign(tmp_path):
    """Shards as FineWeb is published for modded-nanoGPT."""
    (tmp_path / "fineweb").mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train_000001", 3000), ("train_000002", 2000), ("val_000000", 500)):
        write_shard(tmp_path / "fineweb" / f"fineweb_{name}.bin", rng.integers(0, 50257, count, np.uint16))
    return tmp_path / "fineweb"


def test_foreign_shards_split_by_name_and_need_no_tokenizer(foreign):
    named = TokenizerConfig(end_of_text=50256)
    data = opened(DataConfig(source="shards", paths=[str(foreign)], tokenizer=named))
    assert len(data.train.tokens) == 5000
    assert data.validation.num_targets == 499
    assert data.validation.bytes_per_token is None
    assert (data.vocab_size, data.end_of_text, data.tokenizer) == (None, 50256, None)
    with pytest.raises(DataError, match=r"set data\.tokenizer\.name"):
        data.load_tokenizer()
    explicit = DataConfig(
        source="shards",
        paths=[str(foreign / "*train*.bin")],
        validation_paths=[str(foreign / "fineweb_train_000002.bin")],
    )
    assert opened(explicit).validation.num_targets == 1999
    with pytest.raises(DataError, match="names only shards for validation"):
        opened(DataConfig(source="shards", paths=[str(foreign / "*val*")]))


@pytest.mark.parametrize("key", ["validation_paths", "validation_sets"])
def test_foreign_shards_that_are_named_for_validation_are_not_trained_on(foreign, key):
    settings = DataConfig(source="shards", paths=[str(foreign)])
    # A folder, such as a prepared one, names the shards in it
    (foreign / "held").mkdir()
    (foreign / "fineweb_val_000000.bin").rename(foreign / "held" / "held.bin")
    named = [str(foreign / "held")]
    settings = replace(settings, **{key: named if key == "validation_paths" else {"held": named}})
    told: list[str] = []
    found = _corpus(settings, told.append, None)
    assert [Path(shard.name).name for shard in found.train] == [
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
    ]
    assert len(told) == 1
    assert told[0].startswith(f"1 file of data.paths left out of training, as named in data.{key}")
    with pytest.raises(DataError, match=rf"no file left to train on, since data\.{key}"):
        _corpus(replace(settings, paths=named), quiet, None)


MANY = """
import resource, sys
from data import DataConfig, open_data
from polargrad_dist.errors import ConfigError
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
config = DataConfig(source="shards", paths=[sys.argv[1]], verify="sizes", cache=sys.argv[1])
try:
    data = open_data(config, sequence_length=16, global_batch=4, micro_batch=2)
    print(len(data.train.tokens), resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64)
except ConfigError as error:
    print(error)
"""


def test_more_shards_than_files_may_be_open_raise_the_limit_or_the_error_says_to_what(tmp_path):
    write_shard(tmp_path / "train_000.bin", np.arange(20, dtype=np.uint16))
    for i in range(1, 100):
        (tmp_path / f"train_{i:03}.bin").write_bytes((tmp_path / "train_000.bin").read_bytes())

    def told(hard: int) -> str:
        run = [sys.executable, "-c", MANY, str(tmp_path), str(hard)]
        done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() or done.stderr

    # The second has room for the shards, but not for all that a run may open beside them
    assert told(4096) == told(200) == "2000 True"
    assert re.match(
        r"this process may open 90 files, expected \d\d\d for 100 token shards: raise the", told(90)
    )


def test_foreign_shards_take_the_tokenizer_that_is_named(tmp_path, foreign):
    prepared = opened(config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(400))))
    named = TokenizerConfig(name=str(prepared.folder))
    data = opened(DataConfig(source="shards", paths=[str(foreign)], tokenizer=named))
    assert (data.vocab_size, data.end_of_text) == (300, prepared.end_of_text)
    assert data.load_tokenizer().encode("kara") == prepared.load_tokenizer().encode("kara")


def test_the_fingerprint_names_what_changed_in_foreign_shards(foreign):
    settings = DataConfig(source="shards", paths=[str(foreign)])
    first = opened(settings).fingerprint()
    assert opened(settings).fingerprint() == first
    assert [shard["name"] for shard in first["shards"]] == [
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
    ]
    assert opened(settings, seed=1).fingerprint() != first
    path = foreign / "fineweb_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2] + struct.pack("<H", 1))
    second = opened(settings).fingerprint()
    assert second["shards"][0] == first["shards"][0]
    assert second["shards"][1] != first["shards"][1]


def test_a_token_beyond_the_models_vocabulary_is_found_in_prepared_and_foreign_shards(tmp_path, foreign):
    prepared = opened(config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(400))))
    largest = max(shard.max_token for shard in prepared.shards)
    prepared.check_vocabulary(largest + 1)
    with pytest.raises(
        DataError, match=rf"holds token {largest}, expected at most {largest - 1}, the model's last"
    ):
        prepared.check_vocabulary(largest)
    data = opened(DataConfig(source="shards", paths=[str(foreign)]))
    data.check_vocabulary(50257)
    with pytest.raises(
        DataError, match=r"fineweb_.*\.bin holds token \d+, expected at most 49999, the model's last"
    ):
        data.check_vocabulary(50_000)


def test_shards_of_two_widths_and_sequences_longer_than_the_shards_are_refused(foreign):
    with pytest.raises(DataError, match="5,000 tokens, too few for one sequence of 5000"):
        opened(DataConfig(source="shards", paths=[str(foreign)]), sequence_length=5000)
    write_shard(foreign / "wide.bin", np.arange(70_000, dtype=np.uint32))
    with pytest.raises(ConfigError, match="some shards hold uint16 tokens and some uint32"):
        opened(DataConfig(source="shards", paths=[str(foreign)]))
