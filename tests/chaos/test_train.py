"""The command that people run, with a real tokenizer, loader and model: killed, started again, and none the wiser."""

from __future__ import annotations

import random
import time

import pytest
import yaml

from tests.chaos.harness import assert_same_end, final_state, kill, last_logged, start, workers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of words that follow each other by chance, and a configuration with dropout, accumulation, prefetching."""
    folder = tmp_path_factory.mktemp("train")
    words = random.Random(0)
    lines = (
        " ".join(words.choices(["ship", "sea", "wind", "sails", "over", "the"], k=9)) for _ in range(6000)
    )
    (folder / "corpus.txt").write_text("\n".join(lines))
    configuration = {
        "model": {"architecture": "qwen2.5", "width": 24, "layers": 2, "heads": 2, "attention_dropout": 0.1},
        "data": {
            "source": "files",
            "paths": [str(folder / "corpus.txt")],
            "cache": str(folder / "cache"),
            "tokenizer": {"vocab_size": 300},
            "validation_fraction": 0.02,
            "prefetch": 4,
        },
        "trainer": {
            "steps": 60,
            "global_batch": 8,
            "micro_batch": 2,
            "sequence_length": 32,
            "device": "cpu",
            "evaluation": {"every": 0, "at_end": False},
            "logging": {"every": 1, "stats_every": 0},
            "checkpoint": {"every": 10, "keep_last": 2},
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration))
    return folder


def train(folder, name, *options):
    run_dir = folder / name
    program = ["train.py", "--config", str(folder / "run.yaml"), "--trainer.run_dir", str(run_dir), *options]
    return start(run_dir, *program)


def finish(folder, name, *options):
    run = train(folder, name, *options)
    assert run.wait(timeout=240) == 0, (folder / f"{name}.out").read_text()[-3000:]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_train_killed_twice_ends_bit_identical(folder, strategy):
    options = [f"--trainer.strategy.name={strategy}"]
    straight, killed = f"straight-{strategy}", f"killed-{strategy}"
    finish(folder, straight, *options)
    for steps, background in ((14, "true"), (33, "false")):
        run = train(folder, killed, *options, f"--trainer.checkpoint.asynchronous={background}")
        deadline = time.monotonic() + 120
        while last_logged(folder / killed) < steps:
            assert run.poll() is None, (folder / f"{killed}.out").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ranks = workers(run)
        kill(ranks)
        run.wait(timeout=60)
        assert 0 < final_state(folder / killed)[0] < 60
    finish(folder, killed, *options)
    assert_same_end(folder / killed, folder / straight)
