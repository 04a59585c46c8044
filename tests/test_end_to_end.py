"""The whole path through the real entry point: every model on every form of text, and one process against two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commandline import torchrun, train

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    *("--model.layers", "4", "--model.width", "32", "--model.heads", "2"),
    *("--data.tokenizer.vocab_size", "400", "--data.validation_fraction", "0.1", "--trainer.device", "cpu"),
    *("--trainer.global_batch", "8", "--trainer.micro_batch", "4", "--trainer.sequence_length", "64"),
    *("--trainer.logging.every", "1", "--trainer.logging.progress", "off", "--optimizer.head", "null"),
    *("--optimizer.embed.lr", "0.05", "--optimizer.hidden.oracle_dtype", "float32"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The documentation topics of Python, one JSON line each."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    return path


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if "loss" in r]


def arguments(run: Path, corpus: Path, steps: int, *more: str) -> list[str]:
    cache = corpus.parent / "cache"
    data = ["--data.source", "files", "--data.paths", json.dumps([str(corpus)]), "--data.cache", str(cache)]
    return [*SMALL, *data, "--trainer.run_dir", str(run), "--trainer.steps", str(steps), *more]


@pytest.mark.parametrize("architecture", ["qwen2.5", "gpt2-small", "gpt2-medium"])
def test_each_model_learns_from_json_lines_and_from_the_shards_made_of_them(tmp_path, corpus, architecture):
    model = ("--model.architecture", architecture)
    done = train(*arguments(tmp_path / "lines", corpus, 16, *model))
    assert done.returncode == 0, done.stderr
    assert f"finished; next: python -m tools.report {tmp_path / 'lines'} (" in done.stderr
    first = losses(tmp_path / "lines")
    assert first[-1] < first[0] - 0.2

    (folder,) = (corpus.parent / "cache").glob("files-*")
    shards = ("--data.source", "shards", "--data.paths", json.dumps([str(folder)]))
    done = train(*arguments(tmp_path / "shards", corpus, 16, *model, *shards))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "shards") == first


@pytest.mark.parametrize("gradients", [pytest.param("all_reduced", marks=pytest.mark.slow), "reduce_scatter"])
def test_two_processes_have_the_losses_of_one_over_fifty_steps(tmp_path, corpus, gradients):
    assert train(*arguments(tmp_path / "one", corpus, 50)).returncode == 0
    done = torchrun(2, *arguments(tmp_path / "two", corpus, 50, "--optimizer.gradients", gradients))
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 50
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4


def test_what_comes_after_a_run_works_on_it(tmp_path, corpus):
    run = tmp_path / "run"
    assert train(*arguments(run, corpus, 2)).returncode == 0

    def tool(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert len(tool("tools.generate", str(run), "--prompt", "The ", "--tokens", "5")) > 5
    assert "step 2" in tool("tools.export", str(run), str(tmp_path / "out"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model(**tokenizer("The ", return_tensors="pt")).logits.isfinite().all()
    assert "step-00000002" in tool("polargrad_dist.trainer.checkpoint", "list", str(run / "checkpoints"))
