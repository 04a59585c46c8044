"""Data that grow, change or lie: memory stays bounded, and a change is found."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from data.checksums import Background
from data.config import DataConfig, TokenizerConfig
from data.dataset import open_data
from data.documents import PART_CHARACTERS, split_document
from data.prepare import prepare
from data.shards import write_shard
from polargrad_dist.errors import DataError
from tests.commandline import ROOT

GIB = 2**30


def peak_of(program: str, *arguments: object) -> int:
    """The largest resident memory, in bytes, of a process that runs ``program``."""
    # ru_maxrss would begin at the peak of this process, which started it.
    told = textwrap.dedent(program) + (
        "\nprint(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", told, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.split()[-1])


def whole_words(folder):
    """A tokenizer of whole words: quick, and with as many tokens as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_a_line_of_50_mb_is_prepared_in_less_than_a_gibibyte(tmp_path):
    words = 10_000_000
    with open(tmp_path / "long.jsonl", "w") as file:
        file.write('{"text": "' + "word " * words + '"}\n')
    peak = peak_of(
        """
        import sys
        from data.prepare import parse, prepare
        prepare(*parse(sys.argv[1:]))
        """,
        *("--source", "files", "--paths", json.dumps([str(tmp_path / "long.jsonl")])),
        *("--tokenizer.name", whole_words(tmp_path / "words"), "--out", tmp_path / "out"),
        *("--validation_fraction", 0),
    )
    assert peak < GIB
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["train"]["tokens"] == words + 1
    assert manifest["train"]["documents"] == 1


def test_a_small_parquet_that_unpacks_to_gigabytes_is_read_in_bounded_batches(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = 1500
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["a " * 2**19]))
    parquet.write_table(
        pa.table({"text": text}), tmp_path / "bomb.parquet", compression="zstd", use_dictionary=True
    )
    assert (tmp_path / "bomb.parquet").stat().st_size < 5000
    peak = peak_of(
        f"""
        import sys
        from pathlib import Path
        from data.sources import read_parquet
        assert sum(len(text) for _, text in read_parquet(Path(sys.argv[1]), "text")) == {rows} * 2**20
        """,
        tmp_path / "bomb.parquet",
    )
    assert peak < GIB


def test_a_document_is_cut_before_spaces_and_put_together_again():
    text = "ab cd ü " * 100_000
    parts = list(split_document(text, 0.0, "here"))
    assert "".join(part.text for part in parts) == text
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(part.text.startswith(" ") for part in parts[1:])
    assert max(len(part.text) for part in parts) <= PART_CHARACTERS


def opened(config):
    return open_data(config, sequence_length=4, global_batch=1, micro_batch=1, report=lambda _: None)


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    config = DataConfig(
        source="files",
        paths=[str(tmp_path / "text.txt")],
        cache=str(tmp_path / "cache"),
        tokenizer=TokenizerConfig(vocab_size=260),
        validation_fraction=0.1,
    )
    return config, prepare(config, report=lambda _: None)


def test_a_tokenizer_that_was_changed_beside_its_shards_is_found(prepared):
    config, folder = prepared
    opened(config)
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"added_tokens": []}))
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer that made the shards"):
        opened(config)


def test_validation_shards_belong_to_the_fingerprint(tmp_path):
    def fingerprint(last: int):
        tokens = np.arange(100, dtype=np.uint16)
        write_shard(tmp_path / "a_train_0.bin", tokens)
        tokens[-1] = last
        write_shard(tmp_path / "a_val_0.bin", tokens)
        return opened(DataConfig(source="shards", paths=[str(tmp_path)])).fingerprint()

    assert fingerprint(1) != fingerprint(2)


def test_a_foreign_shard_that_changes_between_the_sampled_blocks_is_found_in_the_first_epoch(tmp_path):
    path = tmp_path / "train_0.bin"
    write_shard(path, np.arange(2_000_000, dtype=np.uint32) % 1000)
    config = DataConfig(source="shards", paths=[str(path)], cache=str(tmp_path / "cache"))

    def first_epoch():
        data = opened(config)
        batches = data.train.batches_from(0)
        data.train.background.wait()
        for _ in range(2 * config.prefetch + 2):
            next(batches)
        return data.fingerprint()

    assert first_epoch() == first_epoch()
    # The sixteen sampled blocks of 64 KiB are half a megabyte apart
    with open(path, "r+b") as file:
        file.seek(300_000)
        file.write(b"\x01\x00\x00\x00")
    opened(config)
    with pytest.raises(DataError, match=r"train_0\.bin has changed since it was first trained on"):
        first_epoch()
    opened(DataConfig(**vars(config) | {"verify": "sizes"})).train.background.wait()


def test_checksums_that_cannot_be_stored_or_read_are_reported_once_and_end_no_run(tmp_path):
    paths = [tmp_path / f"train_{i}.bin" for i in range(3)]
    for i, path in enumerate(paths):
        write_shard(path, np.arange(100 * (i + 1), dtype=np.uint16))

    def told(folder):
        lines: list[str] = []
        background = Background(paths, folder, lines.append)
        background.start()
        background.wait()
        background.raise_if_found()
        return lines

    (tmp_path / "file").write_text("where no folder can be")
    (line,) = told(tmp_path / "file" / "checksums")
    assert line.startswith("checksums of shards cannot be stored, so a later change may go unnoticed: ")
    folder = tmp_path / "checksums"
    assert told(folder) == []
    notes = {path: path.read_bytes() for path in folder.iterdir()}
    for path in list(notes)[:2]:
        # As a full disk leaves them
        path.write_bytes(notes[path][:20])
    (line,) = told(folder)
    assert line.startswith("a stored checksum cannot be read, so its shard is taken as new: ")
    assert {path: path.read_bytes() for path in folder.iterdir()} == notes
    assert told(folder) == []
    (note,) = (path for path in notes if "train_1.bin" in notes[path].decode())
    note.write_text(json.dumps(json.loads(notes[note]) | {"sha256": "0" * 64}))
    with pytest.raises(DataError, match=r"train_1\.bin has changed since it was first trained on"):
        told(folder)
