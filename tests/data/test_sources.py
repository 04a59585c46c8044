import itertools
import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.sources as sources
from data.config import DataConfig, HubConfig
from data.paths import find_files
from data.sources import open_source, read_text
from polargrad_dist.errors import ConfigError, DataError
from tests.data.corpus import json_lines, texts


def files(*paths, **fields):
    return open_source(DataConfig(source="files", paths=[str(p) for p in paths], **fields))


def all_text(parts, validation):
    return "".join(part.text for part in parts if part.validation == validation)


def test_the_built_in_corpus_is_the_standard_library_without_tests_and_its_topics():
    source = open_source(DataConfig(validation_fraction=0.05))
    parts = list(source.documents())
    assert source.size == sum(part.size for part in parts) > 5_000_000
    whole = [part.text for part in parts]
    import argparse
    from pathlib import Path
    from pydoc_data.topics import topics

    assert Path(argparse.__file__).read_text() in whole
    assert topics["for"] in whole
    assert not any("class TestSuccessfulTestMarker" in text for text in whole)
    assert source.identity()["sha256"] in source.describe()
    assert f"{source.size:,} bytes" in source.describe()
    assert open_source(DataConfig(validation_fraction=0.05)).identity() == source.identity()
    held = sum(part.size for part in parts if part.validation)
    assert 0.05 <= held / source.size < 0.08
    assert list(source.documents(700)) == parts[700:]


def test_a_document_falls_to_one_split_by_its_text_alone(tmp_path):
    documents = texts(2000)
    first = list(files(json_lines(tmp_path / "a.jsonl", documents), validation_fraction=0.1).documents())
    again = list(
        files(json_lines(tmp_path / "b.jsonl", documents[::-1]), validation_fraction=0.1).documents()
    )
    assert [part.text for part in first] == documents
    assert first == again[::-1]
    assert 0.07 < sum(part.validation for part in first) / 2000 < 0.13


def test_json_lines_may_have_blank_lines_a_bom_windows_ends_and_no_last_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "é\\n"}\r\n\r\n \n{"text": "", "id": 3}\n{"text": "z"}'.encode())
    parts = list(files(path, validation_fraction=0).documents())
    assert [(p.text, p.size, p.begins) for p in parts] == [("é\n", 3, True), ("", 0, True), ("z", 1, True)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": "caf\xe9"}\n', r"a\.jsonl, line 2: byte 0xe9 is not UTF-8"),
        ("a.txt", b"one\ntwo\nthr\xffee\nfour\n", r"a\.txt, line 3: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "good"}\n\n{"text": \n', r"a\.jsonl, line 3 is not JSON"),
        (
            "a.jsonl",
            b'{"content": "x", "id": 1}\n',
            r"line 1 has the fields content, id, expected 'text': set data\.text_field",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n["x"]\n',
            r"line 2 holds a list, expected an object with 'text' per line",
        ),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: 'text' holds a int, expected text"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"line 1 holds half a surrogate pair \(\\ud83d\)"),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000 + b"\n", r"line 1 is not JSON"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.parquet", b"PAR1 but not really", r"a\.parquet cannot be read as parquet"),
    ],
)
def test_text_that_cannot_be_used_is_named_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(files(tmp_path / name).documents())


def test_the_line_of_bad_text_is_right_in_any_piece_of_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 64)
    lines = [f"line number {i} of many".encode() for i in range(1, 101)]
    lines[76] = b"line \xe2\x28 of many"
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"a\.txt, line 77: byte 0xe2"):
        list(files(tmp_path / "a.txt").documents())


@given(
    st.text(alphabet="ab \né日🙂", max_size=400).filter(bool),
    st.integers(4, 90),
    st.integers(0, 500),
)
@settings(max_examples=200, deadline=None)
def test_a_text_file_comes_whole_in_parts_and_splits_once(tmp_path_factory, text, size, split):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", size)
        parts = list(read_text(path, split))
    assert "".join(part.text for part in parts) == text
    assert sum(part.size for part in parts) == len(text.encode())
    assert all(part.text for part in parts)
    sides = [part.validation for part in parts]
    assert sides == sorted(sides)
    assert [part.begins for part in parts] == [i == 0 or sides[i] != sides[i - 1] for i in range(len(parts))]
    training = len(all_text(parts, False).encode())
    assert training >= min(split, len(text.encode())) or not any(sides)


def test_the_last_share_of_text_files_is_for_validation(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i:05}\n" for i in range(1000)))
    parts = list(files(tmp_path, validation_fraction=0.25).documents())
    assert all_text(parts, True) == "".join(f"b {i:05}\n" for i in range(500, 1000))
    assert [part.begins for part in parts] == [True, True, True]


def test_separate_validation_files_come_first_and_replace_the_fraction(tmp_path):
    train = json_lines(tmp_path / "train.jsonl", texts(50))
    held = json_lines(tmp_path / "held.jsonl", texts(5, seed=1))
    parts = list(files(train, validation_paths=[str(held)], validation_fraction=0.5).documents())
    assert [part.validation for part in parts] == [True] * 5 + [False] * 50


def test_files_that_are_named_for_validation_are_left_out_of_training_and_it_is_said(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    train, held = texts(20), texts(5, seed=1)
    json_lines(folder / "train.jsonl", train)
    json_lines(folder / "val.jsonl", held)
    # Another path to the same file
    (tmp_path / "link.jsonl").symlink_to(folder / "val.jsonl")

    def trained_on(**fields):
        told: list[str] = []
        config = DataConfig(source="files", paths=[str(folder)], validation_fraction=0, **fields)
        parts = open_source(config, told.append).documents()
        return [part.text for part in parts if not part.validation], told

    assert trained_on() == (train + held, [])
    for key, fields in (
        ("validation_paths", {"validation_paths": [str(tmp_path / "link.jsonl")]}),
        ("validation_sets.held", {"validation_sets": {"held": [str(folder / "v*.jsonl")]}}),
    ):
        said = f"1 file of data.paths left out of training, as named in data.{key}"
        assert trained_on(**fields) == (train, [said])
        with pytest.raises(DataError, match=rf"no file left to train on, since data\.{key} names all 1 file"):
            files(folder / "val.jsonl", **fields)
    # Sets that share no file with the training text, or are prepared folders, leave its key in the cache
    elsewhere = {"held": [str(folder / "val.jsonl")], "prepared": [str(tmp_path / "without-text")]}
    only = folder / "train.jsonl"
    assert files(only, validation_sets=elsewhere).identity() == files(only).identity()


def test_parquet_rows_come_in_order_and_a_missing_column_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    documents = texts(2500)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": documents, "id": list(range(2500))}), path, row_group_size=700)
    parts = list(files(path, text_field="body", validation_fraction=0).documents())
    assert [part.text for part in parts] == documents
    with pytest.raises(DataError, match=r"has the columns body, id, expected 'text': set data\.text_field"):
        list(files(path).documents())
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'text' holds a NoneType"):
        list(files(path).documents())
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"a\.parquet has 2 columns named 'text', expected one"):
        list(files(path).documents())


def test_paths_are_folders_and_globs_in_sorted_order_and_must_match(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [
        part.text for part in files(tmp_path / "c.md", tmp_path / "*", validation_fraction=0).documents()
    ]
    assert found == ["c.md", "c.md"]
    found = [part.text for part in files(tmp_path, validation_fraction=0).documents()]
    assert found == ["a/1.txt", "b/2.txt", "c.md"]
    with pytest.raises(DataError, match=r"\*\.jsonl matches no file"):
        files(tmp_path / "*.jsonl")
    with pytest.raises(ConfigError, match=r"data\.paths is empty"):
        files()
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"ends in '\.csv', expected one of \.txt"):
        files(tmp_path / "a.csv")
    (tmp_path / "d.md").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"d\.md cannot be read \(No such file"):
        files(tmp_path / "*.md")
    (tmp_path / "d.md").unlink()
    (tmp_path / "folder.md").mkdir()
    assert len(list(files(tmp_path / "*.md", validation_fraction=0).documents())) == 1
    with pytest.raises(ConfigError, match="validation_paths is set with"):
        open_source(DataConfig(validation_paths=["a"]))
    with pytest.raises(ConfigError, match=r"validation_fraction is 1\.5"):
        files(tmp_path, validation_fraction=1.5)


def test_linked_folders_are_read_like_their_own_and_a_cycle_of_links_ends(tmp_path):
    inside, outside = tmp_path / "corpus", tmp_path / "elsewhere"
    for name in ("corpus/b/1.txt", "elsewhere/deep/2.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    alone = [str(path) for path in find_files([str(inside)], "key", (".txt",))]
    assert alone == [str(inside / "b" / "1.txt")]
    (inside / "a").symlink_to(outside)
    (inside / "again").symlink_to(inside / "b")
    (outside / "deep" / "up").symlink_to(inside)
    found = [str(path) for path in find_files([str(inside)], "key", (".txt",))]
    assert found == [str(inside / "a" / "deep" / "2.txt"), *alone]


@pytest.mark.parametrize("left", [64 * 100, 64 * 100 + 7, 1])
def test_a_text_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path, left):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a line of text of thirty-two by\n" * 50_000)
    parts = read_text(path, sys.maxsize)
    next(parts)
    os.truncate(path, sources.PART_BYTES * 2 + left)
    with pytest.raises(
        DataError, match=r"a\.txt ends after 5\d\d,\d\d\d bytes, expected 1,600,000, its size when"
    ):
        list(itertools.islice(parts, 1000))


def test_identity_changes_with_the_files_and_what_is_read_from_them(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", texts(5))
    before = files(path).identity()
    assert files(path).identity() == before
    assert files(path, text_field="body").identity() != before
    assert files(path, validation_fraction=0.3).identity() != before
    json_lines(path, texts(5, seed=1))
    assert files(path).identity() != before


@pytest.fixture
def local_hub(tmp_path):
    """A folder that `datasets` streams as it streams the hub: three parquet files."""
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = texts(300)
    (tmp_path / "hub").mkdir()
    for index in range(3):
        part = documents[index * 100 : (index + 1) * 100]
        pq.write_table(
            pa.table({"text": part}), tmp_path / "hub" / f"train-{index}.parquet", row_group_size=30
        )
    return str(tmp_path / "hub"), documents


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_goes_on_at_any_row(local_hub, streaming, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    name, documents = local_hub
    config = DataConfig(source="hub", hub=HubConfig(name, streaming=streaming), validation_fraction=0.1)
    source = open_source(config)
    cursors, seen = {}, []
    for number, part in enumerate(source.documents(), 1):
        seen.append(part)
        if number in (1, 30, 99, 100, 155, 299):
            cursors[number] = json.loads(json.dumps(source.cursor()))
    assert [part.text for part in seen] == documents
    for number, cursor in cursors.items():
        assert list(open_source(config).documents(number, cursor)) == seen[number:]
    assert list(open_source(config).documents(250)) == seen[250:]


def test_a_missing_hub_is_said_within_seconds_with_the_way_out(tmp_path):
    """A hub whose address no route leads to, as on a compute node: no minutes of retries."""
    code = (
        "from data.config import *; from data.sources import open_source\n"
        "list(open_source(DataConfig(source='hub', hub=HubConfig('HuggingFaceFW/fineweb', 'sample-10BT'))).documents())"
    )
    start = time.monotonic()
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert time.monotonic() - start < 20
    last = done.stderr.strip().splitlines()[-1]
    assert "HuggingFaceFW/fineweb cannot be fetched" in last
    assert "http://127.0.0.1:9 cannot be reached" in last
    assert "set data.source to files" in last


def test_an_offline_hub_is_no_different():
    source = open_source(DataConfig(source="hub", hub=HubConfig("nobody/nothing-of-this-name")))
    with pytest.raises(
        DataError, match=r"cannot be fetched from the Hugging Face hub .* set data\.source to files"
    ):
        list(source.documents())
