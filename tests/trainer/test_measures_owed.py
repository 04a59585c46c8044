"""Measures of a run that is asked to leave meanwhile: it saves first, and the next start makes up for them."""

import json
import os
import signal

import pytest

from polargrad_dist.trainer import PREEMPTED, measure
from polargrad_dist.trainer.checkpoint import CheckpointConfig, checkpoints_in
from polargrad_dist.trainer.config import EvaluationConfig
from tests.trainer.toy import ToyValidation, settings, trainer


class Interrupted(ToyValidation):
    """A validation set; whoever measures it is asked to leave meanwhile."""

    def batches(self):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from super().batches()


def steps_with(folder, key: str) -> list[int]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if key in row]


def run(folder, steps: int, named=ToyValidation):
    evaluation = EvaluationConfig(every=6, hellaswag_every=6)
    t = trainer(settings(folder, steps=steps, evaluation=evaluation, checkpoint=CheckpointConfig(every=0)))
    t.data.validations = {"named": named(t.world)}
    t.evaluator.questions = [None] * 20
    return t


@pytest.fixture
def asked(monkeypatch) -> list:
    """The questions that were asked so far."""
    asked: list = []

    def score(*_):
        asked.append(1)
        return True, False

    monkeypatch.setattr(measure, "score", score)
    return asked


@pytest.mark.parametrize("steps", [6, 8], ids=["at the end", "on the way"])
def test_a_named_validation_set_is_left_for_a_signal_and_made_up_for(tmp_path, asked, steps):
    assert run(tmp_path, steps, Interrupted).fit().exit_code == PREEMPTED
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step-00000006"]
    assert steps_with(tmp_path, "validation_loss") == steps_with(tmp_path, "hellaswag") == []
    assert asked == []
    assert run(tmp_path, steps).fit().exit_code == 0
    every = sorted({6, steps})
    assert steps_with(tmp_path, "validation") == steps_with(tmp_path, "hellaswag") == every


@pytest.mark.parametrize("steps", [6, 8], ids=["at the end", "on the way"])
def test_so_are_questions_and_the_validation_before_them_stays(tmp_path, asked, monkeypatch, steps):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return True, False

    with monkeypatch.context() as patch:
        patch.setattr(measure, "score", interrupted)
        assert run(tmp_path, steps).fit().exit_code == PREEMPTED
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step-00000006"]
    assert steps_with(tmp_path, "validation_loss") == [6]
    assert steps_with(tmp_path, "hellaswag") == []
    assert run(tmp_path, steps).fit().exit_code == 0
    every = sorted({6, steps})
    assert steps_with(tmp_path, "validation") == steps_with(tmp_path, "hellaswag") == every
