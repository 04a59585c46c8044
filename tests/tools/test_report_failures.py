"""The report where something is missing, full or too long: one sentence, and the earlier page whole."""

import json
import sys

import numpy as np
import pytest

from polargrad_dist.errors import ConfigError
from tests.tools.test_report import LITTLE, Page, run_of, tool
from tools.report import write_report
from tools.report_figures import smooth, thin

pytest.importorskip("matplotlib")
ROLES = ("hidden", "embed", "head", "scalar")
SPECTRUM = ("condition", "nuclear_norm", "frobenius_norm", "spectral_norm", "stable_rank")


def test_folders_that_are_no_run_are_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    half = run_of(tmp_path / "half")
    (half / "metrics.jsonl").unlink()
    broken = run_of(tmp_path / "broken")
    (broken / "config.yaml").write_bytes(b"\xff\xfe: [")
    out = tmp_path / "report.html"
    for folder, said in (
        (tmp_path / "absent", "is no folder"),
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
    assert not (tmp_path / "report-figures").exists()


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
    files = [out, tmp_path / "report-figures" / "loss.png"]
    before = [path.read_bytes() for path in files]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tools.report.os.replace", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_report([run_of(tmp_path / "run", LITTLE[:1])], out)
    assert [path.read_bytes() for path in files] == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_new_report_takes_its_own_old_figures_away_and_no_others(tmp_path):
    run = run_of(
        tmp_path / "run", [{"step": 1, "loss": 5.0, "grad_norm": 1.0, "polar": {"head": {"seconds": 1}}}]
    )
    out = tmp_path / "report.html"
    write_report([run], out)
    (tmp_path / "report-figures" / "mine.png").write_bytes(b"mine")
    write_report([run_of(tmp_path / "run", [{"step": 1, "loss": 5.0}])], out)
    assert sorted(path.name for path in (tmp_path / "report-figures").iterdir()) == ["loss.png", "mine.png"]


def test_without_matplotlib_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = tool(monkeypatch, capsys, str(run_of(tmp_path / "run")))
    assert code == 2
    assert "pip install 'polargrad-dist[plots]'" in error
    assert not (tmp_path / "run" / "report.html").exists()


def test_more_parameters_than_are_drawn_are_spread_over_the_model_and_told(tmp_path):
    names = {f"layers.{i}.w": {"update": {"cosine": 0.1}} for i in range(9)}
    page = Page(
        write_report([run_of(tmp_path / "run", [{"step": 1, "diagnostics": names}])], tmp_path / "r.html", 3)
    )
    shown = page.sections["conditioning"]
    assert [i for i in range(9) if f"layers.{i}.w" in shown] == [0, 4, 8]
    assert "3 of the 9 recorded parameters are shown: --parameters 9 shows all" in shown


def test_thinning_keeps_both_ends_and_a_spike_and_smoothing_keeps_a_constant():
    x, y = np.arange(100_000.0), np.ones(100_000)
    y[77_777] = 50.0
    a, b = thin(x, y, 1000)
    assert a.size <= 1000
    assert (a[0], a[-1]) == (0, 99_999)
    assert b[a == 77_777] == 50
    assert (np.diff(a) > 0).all()
    assert np.allclose(smooth(x, np.full(100_000, 3.0), 2000), 3)
    step = smooth(np.arange(1.0, 2001), np.repeat([0.0, 1.0], 1000), 50)
    assert 1 - step[1049] == pytest.approx(
        np.exp(-1), rel=0.02
    )  # a memory of 50 steps, 50 steps after the jump


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
    (row,) = page.summary()
    assert row["steps"] == "12 / 12"
    assert row["tokens"] == "2.304k"
    assert row["final validation loss"] == f"{outcome.validation['validation_loss']:.4f}"
    for anchor in ("loss", "learning-rates", "gradient-norm", "polar", "throughput"):
        assert "Nothing to show" not in page.sections[anchor]
