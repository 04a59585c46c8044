"""The report where something is missing, full or too long: one sentence, and the earlier page whole."""

import json

import numpy as np
import pytest

from polargrad_dist.errors import ConfigError
from tests.tools.test_report import LITTLE, Page, run_of, tool
from tools.report import LARGEST, write_report
from tools.report.charts import charts, stretches
from tools.report.runs import read_runs


def test_folders_that_are_no_run_are_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    half = run_of(tmp_path / "half")
    (half / "metrics.jsonl").unlink()
    broken = run_of(tmp_path / "broken")
    (broken / "config.yaml").write_bytes(b"\xff\xfe: [")
    out = tmp_path / "report.html"
    for folder, said in (
        (tmp_path / "absent", "is not a folder"),
        (tmp_path / "empty", "holds no config.yaml"),
        (half, "holds no metrics.jsonl"),
        (broken, "cannot be read as a configuration"),
    ):
        code, _, error = tool(monkeypatch, capsys, str(run), str(folder), "--out", str(out))
        assert code == 2
        assert said in error
        assert str(folder) in error
        assert error.count("\n") == 1
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_refused_and_a_run_is_never_overwritten(tmp_path):
    run = run_of(tmp_path / "run", LITTLE)
    before = (run / "metrics.jsonl").read_bytes()
    for out in (tmp_path, run / "metrics.jsonl", run / "config.yaml" / "report.html"):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_report([run], out)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failed_report_leaves_the_earlier_one(tmp_path, monkeypatch):
    run, out = run_of(tmp_path / "run", LITTLE), tmp_path / "report.html"
    write_report([run], out)
    before = out.read_bytes()
    monkeypatch.setattr("tools.report.page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([run_of(tmp_path / "run", LITTLE[:1])], out)
    assert out.read_bytes() == before


def test_a_disk_that_fails_under_the_page_leaves_the_earlier_one_whole(tmp_path, monkeypatch):
    run, out = run_of(tmp_path / "run", LITTLE), tmp_path / "report.html"
    write_report([run], out)
    before = out.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tools.report.os.replace", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_report([run_of(tmp_path / "run", LITTLE[:1])], out)
    assert out.read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_many_matrices_over_a_long_run_are_all_there_in_a_page_of_its_limit(tmp_path):
    part = {"condition": 1234.5, "nuclear_norm": 3.21987, "stable_rank": 2.71828}
    names = {
        f"model.layers.{i}.self_attn.query_projection.weight": {
            "gradient": part,
            "momentum": part,
            "update": {"residual": 1.2345e-3, "cosine": 0.98765},
        }
        for i in range(400)
    }
    rows = [{"step": step, "diagnostics": names} for step in range(1, 61)]
    run = run_of(tmp_path / "run", rows)
    out = write_report([run], tmp_path / "report.html")
    assert out.stat().st_size <= LARGEST
    matrices = Page(out).data["matrices"][0]
    assert [one["name"] for one in matrices] == list(names)
    assert {(one["s"][0], one["s"][-1]) for one in matrices} == {(1, 60)}
    assert min(len(one["s"]) for one in matrices) >= 6


def test_thinning_keeps_both_ends_a_spike_and_the_mean():
    x, y = np.arange(1, 100_001.0), np.ones(100_000)
    y[77_777] = 50.0
    steps, means, low, high = stretches(x, y, 1000)
    assert steps.size == 1000
    assert steps[-1] == 100_000
    assert (np.diff(steps) > 0).all()
    assert high.max() == 50
    assert low.min() == 1
    assert means.mean() == pytest.approx(y.mean())


def test_a_short_curve_is_left_as_it_is(tmp_path):
    (run,) = read_runs([run_of(tmp_path / "run", LITTLE)])
    (curve,) = charts([run])["groups"]["loss"][0]["series"]
    assert (curve["s"], curve["y"]) == ([1, 2, 3], [5, 5, 5])
    assert "hi" not in curve


def test_long_runs_make_a_small_page(tmp_path):
    folder = run_of(tmp_path / "run", [])
    rng = np.random.default_rng(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step, noise in enumerate(rng.normal(size=20_000).tolist(), 1):
            line = {
                "step": step,
                "loss": 5 + noise,
                "grad_norm": 2**noise,
                "tokens_per_second": 1e5,
                "skipped": step // 9,
            }
            file.write(json.dumps(line) + "\n")
    assert write_report([folder], tmp_path / "report.html").stat().st_size < 400_000


def test_a_run_of_the_trainer_is_read_through_the_command_line(tmp_path, monkeypatch, capsys):
    from polargrad_dist.trainer.config import EvaluationConfig
    from tests.trainer.toy import settings, trainer

    outcome = trainer(settings(tmp_path / "toy", evaluation=EvaluationConfig(every=4))).fit()
    code, said, _ = tool(monkeypatch, capsys, str(tmp_path / "toy"))
    assert code == 0
    assert f"wrote {tmp_path / 'toy' / 'report.html'}" in said
    page = Page(tmp_path / "toy" / "report.html")
    row = page.tiles()
    assert row["steps"] == "12 / 12"
    assert row["tokens"] == "2.304k"
    assert row["final validation loss"] == f"{outcome.validation['validation_loss']:.4f}"
    assert {"loss", "optimizer", "speed", "polar"} == page.data["groups"].keys()
    assert dict(page.rows)["ranks"].startswith("1 (one rank) on 1 x ")
