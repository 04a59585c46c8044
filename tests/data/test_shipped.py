"""The shipped configurations through the real hub loader, on local data sets that have the form of the ones they name."""

from pathlib import Path

import pytest

from data import open_data
from data.config import TokenizerConfig
from data.prepare import parse, prepare
from data.sources import open_source
from data.tokenizers import open_tokenizer
from tests.data.corpus import config, json_lines, quiet, texts

ROOT = Path(__file__).resolve().parents[2]
FINEWEB = {
    "id": "<urn:uuid:0>",
    "dump": "CC-MAIN-2013-20",
    "url": "http://example.com",
    "date": "2013-05-18T05:48:54Z",
    "file_path": "s3://commoncrawl/x",
    "language": "en",
    "language_score": 0.97,
    "token_count": 7,
}
SETS = {
    "HuggingFaceFW/fineweb": ("sample-10BT", "sample/10BT", FINEWEB),
    "Elriggs/openwebtext-100k": ("default", "data", {}),
    "Skylion007/openwebtext": ("plain_text", "plain_text", {}),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working directory in which the names of hub data sets and tokenizers are folders, which the loaders take first."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    trained = config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(300)))
    tokenizer = open_tokenizer(trained.tokenizer, open_source(trained), tmp_path / "t")
    for name in ("openai-community/gpt2", "Qwen/Qwen2.5-0.5B"):
        Path(name).mkdir(parents=True)
        (Path(name) / "tokenizer.json").write_text(tokenizer.json())
    for name, (subset, folder, columns) in SETS.items():
        place = Path(name) / folder
        place.mkdir(parents=True)
        for part in range(2):
            documents = texts(60, seed=part)
            table = {"text": documents} | {key: [value] * len(documents) for key, value in columns.items()}
            parquet.write_table(pa.table(table), place / f"train-{part:05}-of-00002.parquet")
        card = f"configs:\n- config_name: {subset}\n  data_files:\n  - split: train\n    path: {folder}/*.parquet\n"
        default = "  default: true\n" if subset != "sample-10BT" else ""
        (Path(name) / "README.md").write_text(f"---\n{card}{default}---\n")
    return tmp_path


NAMES = sorted(p.name for p in (ROOT / "configs").glob("*.yaml") if "source: hub" in p.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_configuration_prepares_the_data_set_it_names(hub, name):
    data, _ = parse(["--run", str(ROOT / "configs" / name), "--validation_fraction", "0.1"])
    assert data.hub.name in SETS
    found = open_data(data, sequence_length=16, global_batch=4, micro_batch=2, report=quiet)
    tokenizer = found.load_tokenizer()
    ids = found.train.tokens.read(0, len(found.train.tokens)).tolist()
    whole = tokenizer.decode(ids)
    held = tokenizer.decode(found.validation.targets().tolist())
    documents = texts(60, seed=0) + texts(60, seed=1)
    for text in documents:
        assert text in whole or text in held
    assert whole.count("<|endoftext|>") + held.count("<|endoftext|>") == len(documents)


def test_openwebtext_by_its_first_name_streams_as_well(hub):
    text = "configs/qwen2.5-adamw.yaml"
    data, _ = parse(
        ["--run", str(ROOT / text), "--hub.name", "Skylion007/openwebtext", "--hub.streaming", "true"]
    )
    data.tokenizer = TokenizerConfig("Qwen/Qwen2.5-0.5B")
    folder = prepare(data, report=quiet)
    assert (folder / "manifest.json").exists()


def test_all_shipped_hub_configurations_are_covered():
    assert len(NAMES) >= 7
