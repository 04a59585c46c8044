"""Several validation sets in one run, through the real entry point."""

import json
from pathlib import Path

import pytest

from tests.commandline import train


def test_each_source_and_each_named_set_has_a_loss_of_its_own(tmp_path: Path):
    for name, word in (("a", "alpha beta gamma\n"), ("b", "one two three four\n"), ("c", "zzz yyy xxx\n")):
        lines = (json.dumps({"text": word * (3 + i % 5)}) for i in range(300))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    sources = [
        {"paths": [str(tmp_path / "a.jsonl")], "weight": 3},
        {"paths": [str(tmp_path / "b.jsonl")], "weight": 1},
    ]
    done = train(
        *("--model.layers", "2", "--model.width", "32", "--model.heads", "2", "--trainer.device", "cpu"),
        *("--data.sources", json.dumps(sources), "--data.validation_fraction", "0.1"),
        *("--data.validation_sets", json.dumps({"other": [str(tmp_path / "c.jsonl")]})),
        *("--data.tokenizer.vocab_size", "300", "--data.cache", str(tmp_path / "cache")),
        *("--trainer.global_batch", "4", "--trainer.micro_batch", "4", "--trainer.sequence_length", "32"),
        *(
            "--trainer.steps",
            "30",
            "--trainer.evaluation.every",
            "15",
            "--trainer.run_dir",
            str(tmp_path / "run"),
        ),
        *("--optimizer.head", "null", "--optimizer.embed.lr", "0.05", "--trainer.logging.progress", "lines"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    measured = [record for record in records if "validation" in record]
    assert [record["step"] for record in measured] == [15, 30]
    found = measured[-1]["validation"]
    assert set(found) == {"a", "b", "other"}
    assert found["a"]["loss"] < found["other"]["loss"]
    assert found["b"]["loss"] < found["other"]["loss"]
    mean = measured[-1]["validation_loss"]
    assert (
        min(found["a"]["loss"], found["b"]["loss"]) - 0.1
        < mean
        < max(found["a"]["loss"], found["b"]["loss"]) + 0.1
    )
    assert all(value["bits_per_byte"] == pytest.approx(value["bits_per_byte"]) for value in found.values())
    assert "other " in done.stderr
