import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data.prepare as preparing
from data.prepare import Progress, parse, prepare
from data.shards import Manifest, open_shard
from polargrad_dist.errors import ConfigError, DataError
from polargrad_dist.words import counted
from tests.data.corpus import config, json_lines, quiet, texts

DOCUMENTS = texts(1500, words=120)
# Chunks of 16 KiB in place of 1 MiB make many shards of a small corpus.
COMMAND = "import sys, data.prepare as p; p.CHUNK_BYTES = 2**14; sys.exit(p.main())"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK_BYTES", 2**14)


@pytest.fixture
def corpus(tmp_path):
    return json_lines(tmp_path / "corpus.jsonl", DOCUMENTS)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tokens_of(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([open_shard(folder / s.name) for s in getattr(Manifest.load(folder), split)])


def arguments(folder: Path, corpus: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-c", COMMAND, "--source", "files", "--paths", json.dumps([str(corpus)])),
        *("--tokenizer.vocab_size", "300", "--validation_fraction", "0.1", "--shard_tokens", "10000"),
        *("--cache", str(folder / "cache"), "--out", str(out), "--workers", "2", *more),
    ]


def test_the_shards_hold_every_document_once_behind_an_end_of_text(tmp_path, corpus):
    folder = prepare(config(tmp_path, corpus, shard_tokens=10_000), report=quiet)
    manifest = Manifest.load(folder)
    assert len(manifest.train) > 3
    from data.tokenizers import TokenizerInfo

    info = TokenizerInfo(**manifest.tokenizer)
    tokenizer = info.load(folder)
    found = []
    for split in ("train", "validation"):
        tokens = tokens_of(folder, split)
        assert tokens[0] == info.end_of_text
        starts = np.flatnonzero(tokens == info.end_of_text)
        documents = [tokenizer.decode(part[1:]) for part in np.split(tokens, starts[1:])]
        shards = getattr(manifest, split)
        assert sum(shard.documents for shard in shards) == len(documents)
        assert sum(shard.text_bytes for shard in shards) == sum(len(text.encode()) for text in documents)
        assert all(open_shard(folder / s.name).max() == s.max_token for s in shards)
        found.append(documents)
    train, held = found
    assert [text for text in DOCUMENTS if text in set(train)] == train
    assert [text for text in DOCUMENTS if text in set(held)] == held
    assert not set(train) & set(held)
    assert len(train) + len(held) == len(DOCUMENTS)
    assert 0.05 < len(held) / len(DOCUMENTS) < 0.2


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(tmp_path, corpus, workers):
    both = [config(tmp_path, corpus, shard_tokens=10_000, workers=n) for n in (2, workers)]
    first, second = (prepare(c, tmp_path / str(i), quiet) for i, c in enumerate(both))
    assert content(first) == content(second)


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}


def finished(folder: Path) -> list[str]:
    """The training shards that a run's progress vouches for."""
    path = folder / "progress.json"
    return [shard["name"] for shard in json.loads(path.read_text())["train"]] if path.exists() else []


def test_a_kill_at_any_moment_costs_no_shard_and_changes_no_byte(tmp_path):
    """Real SIGKILLs around the writing of a shard; in the end the folder is that of an undisturbed run."""
    # A hundred shards: four kills come before the end on a machine so busy that each is two dozen shards late.
    corpus = json_lines(tmp_path / "corpus.jsonl", DOCUMENTS * 10)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert subprocess.run(arguments(tmp_path, corpus, straight, "--workers", "1")).returncode == 0
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for kill in range(4):
        done, before = finished(killed), written(killed)
        run = subprocess.Popen(arguments(tmp_path, corpus, killed), stderr=subprocess.PIPE, text=True)
        # In turn: once the next shard is vouched for, and as soon as its file is there, which is just before.
        look = finished if kill % 2 == 0 else written
        while run.poll() is None and look(killed) in (done, before):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
        run.kill()
        assert run.wait() == -signal.SIGKILL
        assert {name: written(killed)[name] for name in done} == {name: before[name] for name in done}
        if done:
            assert f"and {counted(len(done), 'shard')} in" in run.stderr.read()
    assert len(finished(killed)) >= 2
    assert not (killed / "manifest.json").exists()
    assert subprocess.run(arguments(tmp_path, corpus, killed)).returncode == 0
    assert content(killed) == content(straight)


def test_an_unfinished_preparation_of_an_earlier_version_goes_on(tmp_path):
    inputs = {"tokenizer": "abc"}
    Progress(parts=7, cursor=[1, 2]).save(tmp_path, inputs)
    saved = json.loads((tmp_path / "progress.json").read_text())
    assert saved == {"pieces": 7, "cursor": [1, 2], "train": [], "validation": [], "inputs": inputs}
    assert Progress.load(tmp_path, inputs) == Progress(parts=7, cursor=[1, 2])


def test_ctrl_c_leaves_with_a_word_on_how_to_go_on(tmp_path):
    corpus = json_lines(tmp_path / "corpus.jsonl", DOCUMENTS * 10)
    out = tmp_path / "out"
    run = subprocess.Popen(
        arguments(tmp_path, corpus, out),
        stderr=subprocess.PIPE,
        text=True,
        # what a shell starts in the background ignores SIGINT, and would hand that down to its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(out.glob("*.bin")) and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(signal.SIGINT)
    _, messages = run.communicate(timeout=30)
    assert run.returncode == 130, messages
    assert messages.splitlines()[-1] == "data.prepare: interrupted; run the same command again to continue"
    assert not (out / "manifest.json").exists()
    assert not list(out.glob(".*.tmp"))


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path, corpus):
    straight, limited = tmp_path / "straight", tmp_path / "limited"
    # And the tokenizer is cached
    prepare(config(tmp_path, corpus, shard_tokens=10_000), straight, quiet)
    # Bytes; a shard takes more
    limit = 20 * 1024
    run = subprocess.run(
        ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "_", *arguments(tmp_path, corpus, limited)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"data.prepare: error: cannot write {limited}/train-00000.bin (")
    assert "free some space and run the same command again to continue" in last
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in limited.iterdir()) == [".lock"]
    assert subprocess.run(arguments(tmp_path, corpus, limited)).returncode == 0
    assert content(limited) == content(straight)


def test_bad_text_ends_the_command_in_one_sentence(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    run = subprocess.run(
        arguments(tmp_path, tmp_path / "bad.jsonl", tmp_path / "out"), capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "bad.jsonl, line 2: byte 0xe9 is not UTF-8" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_a_prepared_corpus_is_not_prepared_again_and_a_changed_one_never_taken_from_the_cache(
    tmp_path, corpus
):
    first = config(tmp_path, corpus)
    folder = prepare(first, report=quiet)
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
    said: list[str] = []
    assert prepare(replace(first, workers=1), report=said.append) == folder
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert said[-1] == f"prepared already: {folder}"
    changed = [
        replace(first, validation_fraction=0.2),
        replace(first, shard_tokens=20_000),
        replace(first, max_tokens=5000),
        replace(first, tokenizer=replace(first.tokenizer, vocab_size=310)),
        replace(first, tokenizer=replace(first.tokenizer, train_bytes=1000)),
    ]
    folders = {folder, *(prepare(other, report=quiet) for other in changed)}
    json_lines(corpus, DOCUMENTS[:-1])
    folders.add(prepare(first, report=quiet))
    assert len(folders) == 7


def test_a_folder_made_from_other_inputs_is_refused_with_the_difference(tmp_path, corpus):
    prepare(config(tmp_path, corpus, shard_tokens=10_000), tmp_path / "out", quiet)
    with pytest.raises(ConfigError, match=r"other inputs \(shard_tokens: 10000 there, 20000 here\)"):
        prepare(config(tmp_path, corpus, shard_tokens=20_000), tmp_path / "out", quiet)
    # As if interrupted at the end
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"progress\.json was made from other inputs \(validation_fraction"):
        prepare(config(tmp_path, corpus, validation_fraction=0.3), tmp_path / "out", quiet)


def test_a_limit_on_tokens_stops_at_the_first_chunk_that_reaches_it(tmp_path, corpus):
    whole = tokens_of(prepare(config(tmp_path, corpus), report=quiet), "train")
    part = tokens_of(prepare(config(tmp_path, corpus, max_tokens=20_000), report=quiet), "train")
    assert 20_000 <= len(part) < 20_000 + 2**14
    assert (part == whole[: len(part)]).all()


def test_a_corpus_without_training_text_is_refused(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", ["only one"])
    with pytest.raises(DataError, match="holds no training text"):
        prepare(config(tmp_path, path, validation_fraction=0.999999), report=quiet)
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no training text"):
        prepare(config(tmp_path, tmp_path / "b.jsonl"), report=quiet)


def test_vocabularies_over_65536_are_written_in_four_bytes(tmp_path, corpus):
    from data.sources import open_source
    from data.tokenizers import open_tokenizer

    settings = config(tmp_path, corpus)
    raw = json.loads(open_tokenizer(settings.tokenizer, open_source(settings), tmp_path / "t").json())
    raw["model"]["vocab"]["far"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    named = replace(settings.tokenizer, name=str(tmp_path))
    folder = prepare(replace(settings, tokenizer=named), report=quiet)
    assert open_shard(folder / "train-00000.bin").dtype == np.uint32
    narrow = tokens_of(prepare(settings, report=quiet), "train")
    assert (tokens_of(folder, "train") == narrow).all()


def test_the_command_line_takes_yaml_a_runs_data_and_overrides(tmp_path):
    (tmp_path / "data.yaml").write_text("source: files\npaths: [a.jsonl]\ntokenizer: {vocab_size: 999}\n")
    settings, out = parse(["--config", str(tmp_path / "data.yaml"), "--workers", "3", "--out", "x"])
    assert (settings.source, settings.paths, settings.tokenizer.vocab_size) == ("files", ["a.jsonl"], 999)
    assert (settings.workers, out) == (3, Path("x"))
    (tmp_path / "run.yaml").write_text(
        "model: {layers: 3}\ndata:\n  source: hub\n  hub: {subset: sample-10BT}\n"
    )
    settings, out = parse(["--run", str(tmp_path / "run.yaml"), "--hub.name", "a/b"])
    assert (settings.source, settings.hub.subset, settings.hub.name, out) == (
        "hub",
        "sample-10BT",
        "a/b",
        None,
    )
    (tmp_path / "wrong.yaml").write_text("sauce: files\n")
    for wrong, message in (
        (["--sauce", "files"], "no key 'sauce': did you mean 'source'"),
        (["--config", str(tmp_path / "wrong.yaml")], "no key 'sauce': did you mean 'source'"),
        (["--tokenizer.vocabsize", "5"], "did you mean 'tokenizer.vocab_size'"),
        (["--workers", "many"], "Expected a <class 'int'>"),
        (["--run", str(tmp_path / "data.yaml")], r"data\.yaml has no data section"),
        (["--run", str(tmp_path / "none.yaml")], r"none\.yaml cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(wrong)
    for field in ({"shard_tokens": 0}, {"max_tokens": 0}, {"workers": -1}):
        with pytest.raises(ConfigError, match=next(iter(field))):
            prepare(config(tmp_path, **field), report=quiet)


def test_preparing_loads_neither_torch_nor_transformers(tmp_path, corpus):
    code = COMMAND.replace(
        "sys.exit(p.main())", "p.main(); print({'torch', 'transformers'} & set(sys.modules))"
    )
    command = [code if part == COMMAND else part for part in arguments(tmp_path, corpus, tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"


REAL = os.environ.get("POLARGRAD_TEST_DATA")


@pytest.mark.skipif(REAL is None, reason="POLARGRAD_TEST_DATA names no folder with real text and tokenizers")
def test_a_thousand_documents_of_openwebtext_give_the_known_number_of_tokens(tmp_path):
    path = Path(REAL or "") / "openwebtext-1000" / "openwebtext_1000.jsonl"
    settings = config(tmp_path, path)
    named = replace(settings.tokenizer, name=str(Path(REAL or "") / "tokenizers" / "gpt2"))
    folder = prepare(replace(settings, tokenizer=named, validation_fraction=0.02), report=quiet)
    manifest = Manifest.load(folder)
    shards = manifest.train + manifest.validation
    # An end-of-text per document
    assert sum(shard.tokens for shard in shards) == 1_053_999 + 1000
    assert sum(shard.documents for shard in shards) == 1000
