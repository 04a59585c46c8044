"""Text that is packed or lies on another file system, and prepared folders fetched from one."""

import gzip
import json
import random

import fsspec
import numpy as np
import pyarrow
import pytest

from data import open_data
from data.gauge import Gauge
from data.prepare import prepare
from data.remote import opened
from data.sources import open_source
from polargrad_dist.errors import ConfigError, DataError
from polargrad_dist.trainer import TrainerConfig
from tests.data.corpus import config, json_lines, quiet, texts

SIZES = {"sequence_length": 16, "global_batch": 4, "micro_batch": 2, "report": quiet}


@pytest.fixture
def bucket():
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def packed(path, data: bytes):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        # As parallel packers write them: several frames
        half = len(data) // 2
        path.write_bytes(
            b"".join(
                bytes(pyarrow.compress(part, "zstd", asbytes=True)) for part in (data[:half], data[half:])
            )
        )
    return path


def parts(settings):
    return [(part.text, part.validation, part.begins) for part in open_source(settings).documents()]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("form", [".jsonl", ".txt"])
def test_packed_text_is_the_text(tmp_path, form, packing):
    plain = tmp_path / f"plain{form}"
    if form == ".jsonl":
        json_lines(plain, texts(300))
    else:
        plain.write_text("".join(texts(20_000)))
    other = packed(tmp_path / f"packed{form}{packing}", plain.read_bytes())
    assert parts(config(tmp_path, other)) == parts(config(tmp_path, plain))
    folder = config(tmp_path / "c", tmp_path)
    found = open_source(folder)
    assert len(found.identity()["files"]) == 2


def test_damaged_packing_and_unknown_forms_are_one_sentence(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 9999)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz cannot be read"):
        parts(config(tmp_path, tmp_path / "cut.jsonl.gz"))
    whole = packed(tmp_path / "whole.jsonl.zst", b'{"text": "a"}\n' * 9999).read_bytes()
    (tmp_path / "cut.jsonl.zst").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.jsonl\.zst cannot be read"):
        parts(config(tmp_path, tmp_path / "cut.jsonl.zst"))
    bad = gzip.compress(random.Random(0).randbytes(100) + b"text " * 9999)
    (tmp_path / "bad.txt.gz").write_bytes(bad[:40] + b"\xff" * 3 + bad[43:])
    with pytest.raises(DataError, match=r"bad\.txt\.gz cannot be read: Error -3 while decompressing"):
        parts(config(tmp_path, tmp_path / "bad.txt.gz"))
    (tmp_path / "no.txt.zst").write_bytes(b"this is not packed")
    with pytest.raises(DataError, match=r"no\.txt\.zst cannot be"), opened(tmp_path / "no.txt.zst") as file:
        file.read()
    (tmp_path / "a.bin.gz").write_bytes(whole)
    with pytest.raises(ConfigError, match=r"ends in '\.gz'"):
        open_source(config(tmp_path, tmp_path / "a.bin.gz"))


def test_text_is_read_where_it_lies(tmp_path, bucket):
    local = json_lines(tmp_path / "a.jsonl", texts(200))
    bucket.pipe("/corpus/a.jsonl", local.read_bytes())
    bucket.pipe("/corpus/deep/b.jsonl.gz", gzip.compress(local.read_bytes()))
    bucket.pipe("/corpus/readme", b"nothing")
    one = parts(config(tmp_path, local))
    for paths in (["memory://corpus"], ["memory://corpus/a.jsonl", "memory://corpus/deep/*.gz"]):
        settings = config(tmp_path, paths=paths)
        assert parts(settings) == one + one
    before = open_source(settings).identity()
    bucket.pipe("/corpus/a.jsonl", local.read_bytes() + b"\n")
    assert open_source(settings).identity() != before
    data = open_data(settings, **SIZES)
    assert data.train.num_samples > 50
    for path, error, expected in (
        ("memory://corpus/none.jsonl", DataError, "matches no file"),
        ("nosuch://x/y.jsonl", ConfigError, "cannot be opened"),
    ):
        with pytest.raises(error, match=expected):
            open_source(config(tmp_path, paths=[path]))


def test_validation_files_elsewhere_are_left_out_of_training_by_their_url(tmp_path, bucket):
    for name, seed in (("train", 0), ("val", 1)):
        bucket.pipe(f"/corpus/{name}.jsonl", json_lines(tmp_path / name, texts(9, seed=seed)).read_bytes())
    for named in (
        {"validation_paths": ["memory://corpus/val.jsonl"]},
        {"validation_sets": {"held": ["memory://corpus/v*"], "prepared": ["memory://nothing"]}},
    ):
        settings = config(tmp_path, paths=["memory://corpus"], validation_fraction=0, **named)
        assert [text for text, validation, _ in parts(settings) if not validation] == texts(9)


def test_parquet_elsewhere_is_read_too(tmp_path, bucket):
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": texts(50)}), tmp_path / "a.parquet")
    bucket.pipe("/p/a.parquet", (tmp_path / "a.parquet").read_bytes())
    remote = parts(config(tmp_path, paths=["memory://p"]))
    assert remote == parts(config(tmp_path, tmp_path / "a.parquet"))


def test_a_prepared_folder_elsewhere_is_fetched_once_and_checked(tmp_path, bucket):
    folder = prepare(config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(300))), report=quiet)
    bucket.put(str(folder), "/shards", recursive=True)
    settings = config(tmp_path / "here", source="shards", paths=["memory://shards"])
    here = open_data(settings, **SIZES)
    there = open_data(config(tmp_path, source="shards", paths=[str(folder)]), **SIZES)
    assert here.fingerprint() == there.fingerprint()
    assert next(here.train.batches_from(0))[0].tolist() == next(there.train.batches_from(0))[0].tolist()
    (cached,) = (tmp_path / "here" / "cache" / "fetched").iterdir()
    shard = cached / "train-00000.bin"
    first = shard.stat().st_mtime_ns
    open_data(settings, **SIZES)
    assert shard.stat().st_mtime_ns == first
    data = bytearray(bucket.cat("/shards/train-00000.bin"))
    data[-1] ^= 1
    bucket.pipe("/shards/train-00000.bin", bytes(data))
    shard.unlink()
    with pytest.raises(DataError, match=r"expected .* by its manifest: upload the folder again"):
        open_data(settings, **SIZES)
    assert not shard.exists()
    with pytest.raises(DataError, match="does not exist"):
        open_data(config(tmp_path, source="shards", paths=["memory://nothing"]), **SIZES)
    with pytest.raises(ConfigError, match="fetch these shards first"):
        open_data(config(tmp_path, source="shards", paths=["memory://shards/train-00000.bin"]), **SIZES)


def test_a_manifest_that_names_files_outside_its_folder_is_refused(tmp_path, bucket):
    folder = prepare(config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(100))), report=quiet)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["train"]["shards"][0]["name"] = "../../x.bin"
    bucket.pipe("/shards/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(DataError, match="expected a plain file name"):
        open_data(config(tmp_path, source="shards", paths=["memory://shards"]), **SIZES)


@pytest.mark.parametrize(
    "manifest", [[], {}, {"train": {"shards": [1]}, "validation": {"shards": []}}], ids=str
)
def test_a_malformed_manifest_elsewhere_is_a_data_error(tmp_path, bucket, manifest):
    bucket.pipe("/shards/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(DataError, match="its manifest is damaged"):
        open_data(config(tmp_path, source="shards", paths=["memory://shards"]), **SIZES)


def test_a_tokenizer_elsewhere_that_is_not_the_shards_is_not_fetched(tmp_path, bucket):
    folder = prepare(config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(100))), report=quiet)
    bucket.put(str(folder), "/shards", recursive=True)
    bucket.pipe("/shards/tokenizer.json", bucket.cat("/shards/tokenizer.json") + b" ")
    with pytest.raises(DataError, match=r"tokenizer\.json has sha256 .* upload the folder again"):
        open_data(config(tmp_path / "here", source="shards", paths=["memory://shards"]), **SIZES)


def test_a_run_directory_elsewhere_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.run_dir is s3://bucket/run, expected a folder"):
        TrainerConfig(run_dir="s3://bucket/run").check(1)


def test_a_gauge_tells_rate_and_time_left():
    gauge = Gauge(1000, None, quiet)
    gauge.show(250, 80)
    assert gauge.line(10.0, 80) == "tokenizing: 80 tokens, 25 bytes/s, 25%, about 0:00:30 left"
    gauge.close()
    towards = Gauge(None, 1_000, quiet, begun=200)
    towards.show(0, 400)
    assert towards.line(2.0, 400) == "tokenizing: 400 tokens, 100 tokens/s, 40%, about 0:00:06 left"
    towards.close()
    unknown = Gauge(None, None, quiet)
    unknown.show(0, 400)
    assert unknown.line(2.0, 400).startswith("tokenizing: 400 tokens, ")
    unknown.close()


def test_a_source_says_how_far_it_is_read(tmp_path):
    path = packed(tmp_path / "a.jsonl.gz", json_lines(tmp_path / "x.jsonl", texts(3000)).read_bytes())
    source = open_source(config(tmp_path, path))
    seen = [source.position for _ in source.documents()]
    assert np.all(np.diff(seen) >= 0)
    assert seen[-1] <= source.size == path.stat().st_size
    assert seen[-1] > 0.9 * source.size
