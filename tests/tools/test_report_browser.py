"""The page as a browser makes it: a headless Chromium draws every chart, on narrow and wide screens, without an error."""

import json
import re
import shutil
import subprocess

import pytest

from tests.tools.test_report import run_of
from tools.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian's package chromium)"
)


def dom(page, width: int) -> str:
    """The page's HTML after its scripts ran, in a window of ``width`` pixels."""
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"),
            f"--window-size={width},900",
            "--virtual-time-budget=2000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("width", [600, 1280])
def test_every_chart_is_drawn_within_its_width(tmp_path, width):
    runs = [run_of(tmp_path / name) for name in ("a", "b")]
    text = dom(write_report(runs, tmp_path / "report.html"), width)
    figures = re.findall(r"<figure data-chart.*?</figure>", text, re.DOTALL)
    # Those of the conditioning are drawn once it is unfolded.
    drawn = [figure for figure in figures if "<svg" in figure]
    assert len(drawn) >= 9
    for figure in drawn:
        (size,) = re.findall(r'<svg width="(\d+)"', figure)
        assert 200 < int(size) <= width
        assert len(re.findall(r'class="line', figure)) >= 2
        assert "NaN" not in figure
        assert len(re.findall(r'class="tick"', figure)) >= 3


def test_a_run_of_nothing_and_one_of_a_single_row_draw_without_an_error(tmp_path):
    runs = [run_of(tmp_path / "none", []), run_of(tmp_path / "one", [{"step": 1, "loss": 5.0}])]
    assert "<circle" in dom(write_report(runs, tmp_path / "report.html"), 1280)


def test_the_bigram_lines_are_named_above_the_plot_each_with_its_runs(tmp_path):
    runs = [run_of(tmp_path / name) for name in ("a", "b", "c")]
    for run, loss in zip(runs, (3.25, 3.24, 3.25), strict=True):
        (run / "run.json").write_text(json.dumps({"bigram": {"loss": loss, "bits_per_byte": 1.5}}))
    text = dom(write_report(runs, tmp_path / "report.html"), 1280)
    figures = re.findall(r"<figure data-chart.*?</figure>", text, re.DOTALL)
    named = [re.findall(r'class="dashes"[^>]*></i>([^<]*)<', figure) for figure in figures]
    # The loss by step and by time.
    expected = ["bigram model of a, c 3.250", "bigram model of b 3.240"]
    assert [labels for labels in named if labels] == [expected, expected]
    for figure, labels in zip(figures, named, strict=True):
        assert figure.count('class="bigram"') == len(labels)
        assert re.findall(r"<title>(bigram[^<]*)<", figure) == labels
        # Nothing is written into such a plot but the numbers of its axes.
        assert not labels or set(re.findall(r'<text[^>]*class="(\w+)"', figure)) == {"tick"}
    alone = dom(write_report(runs[:1], tmp_path / "alone.html"), 1280)
    assert ">bigram model 3.250<" in alone


def test_of_one_run_the_curves_of_a_chart_are_named_above_it(tmp_path):
    text = dom(write_report([run_of(tmp_path / "a")], tmp_path / "report.html"), 1280)
    figures = re.findall(r"<figure data-chart.*?</figure>", text, re.DOTALL)
    named = [re.findall(r'<span class="key"><i style="background: [^"]+"></i>([^<]*)<', f) for f in figures]
    # The loss by step and by time, then the gradient's norm, whose title names its only curve.
    assert named[:3] == [["training", "validation"], ["training", "validation"], []]
