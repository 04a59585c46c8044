"""A row holds means over its interval, and rates of training alone."""

import json
import time

import pytest

from polargrad_dist.trainer.config import EvaluationConfig, LoggingConfig
from polargrad_dist.trainer.phases import Phases, shares
from tests.trainer.toy import settings, trainer


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_of_a_row_is_the_mean_of_its_interval_beside_the_last_steps(tmp_path):
    every = settings(tmp_path / "each", steps=10, logging=LoggingConfig(1, 0, "off"))
    trainer(every).fit()
    each = {row["step"]: row["loss"] for row in rows(tmp_path / "each") if "loss" in row}
    trainer(settings(tmp_path / "some", steps=10, logging=LoggingConfig(4, 0, "off"))).fit()
    found = [row for row in rows(tmp_path / "some") if "loss" in row]
    # The first step has a row of its own, with the first look at the matrices.
    spans = {1: [1], 4: [2, 3, 4], 8: [5, 6, 7, 8], 10: [9, 10]}
    assert [row["step"] for row in found] == list(spans)
    for row, steps in zip(found, spans.values(), strict=True):
        assert row["loss"] == pytest.approx(sum(each[step] for step in steps) / len(steps), rel=1e-6)
        assert row["loss_last"] == pytest.approx(each[row["step"]], rel=1e-6)
        assert row["tokens"] == row["step"] * 192


def test_skipped_steps_are_no_part_of_the_mean(tmp_path):
    # Samples 36 to 47, those of step 4, have no targets.
    config = settings(tmp_path, steps=6, logging=LoggingConfig(6, 0, "off"))
    trainer(config, poison=range(36, 48)).fit()
    (row,) = [row for row in rows(tmp_path) if row["step"] == 6 and "loss" in row]
    assert row["skipped"] == 1
    assert row["loss"] is not None
    assert 0 < row["loss"] < 8


def test_tokens_per_second_leave_out_what_is_no_training(tmp_path):
    config = settings(
        tmp_path, steps=6, evaluation=EvaluationConfig(every=2), logging=LoggingConfig(3, 0, "off")
    )
    made = trainer(config)
    evaluate = made.evaluate

    def slow(*args):
        time.sleep(0.5)
        return evaluate(*args)

    made.evaluate = slow
    made.fit()
    trained = [row for row in rows(tmp_path) if "loss" in row]
    (row,) = [row for row in trained if row["step"] == 6]
    before = trained[trained.index(row) - 1]
    wall = row["elapsed"] - before["elapsed"]
    # Steps 4 to 6 hold the evaluation after step 4.
    assert row["share"]["evaluation"] > 0.5 * 0.5 / wall
    assert sum(row["share"].values()) == pytest.approx(1, abs=0.02)
    seconds = 3 * 192 / row["tokens_per_second"]
    assert seconds < wall - 0.45


def test_phases_tell_training_from_the_rest():
    import torch

    began = time.perf_counter()
    phases = Phases(torch.device("cpu"))
    for name in ("optimizer", "evaluation", "saving"):
        with phases(name):
            time.sleep(0.05)
    seconds, spent = shares([phases.cut()])
    wall = time.perf_counter() - began
    assert sum(spent.values()) == pytest.approx(1.0)
    assert min(spent[name] for name in ("optimizer", "evaluation", "saving")) * wall >= 0.049
    assert seconds == pytest.approx(wall * (1 - spent["evaluation"] - spent["saving"]), rel=0.05)
