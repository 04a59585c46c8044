"""The report's page says what the run directories hold, whatever state they are in."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from tools.report import main, write_report
from tools.report_figures import every_name, loss_figure, per_role, sections, share_figure
from tools.report_runs import differences, read_runs

pytest.importorskip("matplotlib")
ROLES = ("hidden", "embed", "head", "scalar")
SPECTRUM = ("condition", "nuclear_norm", "frobenius_norm", "spectral_norm", "stable_rank")


class Page(HTMLParser):
    """Sections by their id, rows of tables as lists of cells, and everything that a browser would load or run."""

    def __init__(self, path: Path):
        super().__init__()
        self.sections: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._section, self._cell = "", False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"]
            self.sections[self._section] = ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._section:
            self.sections[self._section] += data
        if self._cell:
            self.rows[-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)

    def summary(self) -> list[dict[str, str]]:
        """The rows of the first table under its headings."""
        head = self.rows[0]
        return [dict(zip(head, row, strict=True)) for row in self.rows[1:] if len(row) == len(head)]


def record(step: int, **more) -> dict:
    """A log line with everything that the trainer writes."""
    spectrum = {name: 10.0 + step + i for i, name in enumerate(SPECTRUM)}
    return {
        "step": step,
        "loss": 8.0 - step / 100,
        "grad_norm": 1.5,
        "skipped": 0,
        "lr": {role: 0.01 * step for role in ROLES},
        "tokens_per_second": 1280.0,
        "mfu": 0.4,
        "memory_gib": 2.5,
        "share": {"data": 0.1, "forward_backward": 0.6, "optimizer": 0.2, "other": 0.1},
        "polar": {
            "hidden": {"nuclear_norm": 3.0, "condition": None, "residual": 1e-3, "seconds": 0.02, "bytes": 0}
        },
        "diagnostics": {
            "layers.0.query.weight": {
                "gradient": spectrum,
                "momentum": None,
                "update": {"residual": 1e-3, "cosine": 0.9},
            }
        },
        **more,
    }


def validation(step: int, loss: float, bits: float | None = 1.25) -> dict:
    return {"step": step, "validation_loss": loss} | ({} if bits is None else {"bits_per_byte": bits})


FULL = [
    *(record(step, skipped=int(step >= 60)) for step in range(10, 101, 10)),
    validation(50, 6.5),
    validation(100, 7.25),
]


def run_of(folder: Path, records=FULL, **config) -> Path:
    """A run directory in the trainer's form."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = {"steps": 200, "global_batch": 4, "sequence_length": 64} | config.pop("trainer", {})
    tree = {"model": {"architecture": "qwen2.5", "layers": 3, "width": 128}, "trainer": trainer} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    ordered = sorted(records, key=lambda r: r["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ordered))
    return folder


LITTLE = [{"step": step, "loss": 5.0} for step in (1, 2, 3)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The page of a run that recorded everything."""
    folder = run_of(tmp_path_factory.mktemp("whole") / "run")
    return write_report([folder], folder / "report.html")


def tool(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    """`python -m tools.report ARGS` in this process: (exit code, stdout, stderr)."""
    from polargrad_dist.trainer.cli import run

    monkeypatch.setattr(sys, "argv", ["report.py", *args])
    with pytest.raises(SystemExit) as left:
        run(main)
    return left.value.code, *capsys.readouterr()


def test_the_page_of_a_run_has_every_section_with_its_figures(whole):
    page = Page(whole)
    assert list(page.sections) == [
        *("summary", "loss", "learning-rates", "gradient-norm", "conditioning", "polar", "throughput"),
        "configuration",
    ]
    names = {"loss", "learning-rates", "gradient-norm", "conditioning-001", "polar-01", "throughput", "time"}
    pictures = list((whole.parent / "report-figures").iterdir())
    assert {path.name for path in pictures} == {f"{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000 for path in pictures)
    assert page.count("svg") == len(names)
    assert "Nothing to show" not in page.source
    for text in ("κ(G)", "stable rank", "cosine", "layers.0.query.weight"):
        assert text in page.sections["conditioning"]
    assert "κ(M): not recorded" in page.sections["conditioning"]  # the momentum is null


def test_the_summary_holds_the_numbers_of_the_file(whole):
    (row,) = Page(whole).summary()
    assert row == {
        "run": "run",
        "model": "qwen2.5, 3 layers, width 128",
        "steps": "100 / 200",
        "final validation loss": "7.2500",
        "best validation loss": "6.5000 at step 50",
        "bits per byte": "1.2500",
        "tokens": "25.6k",
        "tokens/s, median": "1,280",
        "skipped steps": "1",
        "time": "0:00:20",
    }


def test_the_parameters_are_shown_once_a_record_tells_them(tmp_path):
    told = run_of(tmp_path / "run", [{"step": 1, "parameters": 1_234_000}])
    assert Page(write_report([told], tmp_path / "a.html")).summary()[0]["parameters"] == "1.234M"


def test_curves_are_those_of_the_file_against_steps_and_tokens(tmp_path):
    (run,) = read_runs([run_of(tmp_path / "run")])
    by_step, by_token, _, validated = loss_figure([run]).panels
    raw, smoothed, points = by_step.curves
    steps = np.arange(10.0, 101, 10)
    assert np.array_equal(raw.x, steps)
    assert np.allclose(raw.y, 8 - steps / 100)
    assert raw.y.min() < smoothed.y.min() < smoothed.y.max() <= raw.y.max()
    assert points.y.tolist() == [6.5, 7.25]
    assert np.array_equal(by_token.curves[0].x, steps * 4 * 64)
    assert validated.curves[0].x.tolist() == [50 * 256, 100 * 256]
    assert by_step.marks[0][1].tolist() == [60]
    assert by_token.marks[0][1].tolist() == [60 * 256]
    rates = per_role("lr", "", [run], "lr")
    assert [panel.title for panel in rates.panels] == list(ROLES)
    assert np.allclose(rates.panels[0].curves[0].y, 0.01 * steps)


def test_the_conditioning_of_each_parameter_comes_from_its_record(tmp_path):
    (run,) = read_runs([run_of(tmp_path / "run")])
    part = next(s for s in sections([run], every_name([run], "diagnostics")) if s.anchor == "conditioning")
    panels = {panel.title: panel for panel in part.figures[0].panels}
    assert list(panels) == ["κ(G)", "κ(M)", "nuclear norm", "stable rank", "residual", "cosine"]
    assert [title for title, panel in panels.items() if not panel.filled] == ["κ(M)"]
    assert panels["κ(G)"].log
    assert panels["κ(G)"].curves[0].y.tolist() == [20.0 + 10 * i for i in range(10)]
    assert panels["stable rank"].curves[0].y.tolist() == [24.0 + 10 * i for i in range(10)]
    assert panels["cosine"].curves[0].y.tolist() == [0.9] * 10
    assert not panels["cosine"].log


def test_shares_of_time_are_stacked_with_a_phase_that_only_some_records_name(tmp_path):
    lines = [
        record(1, share={"data": 0.25, "other": 0.75}),
        record(2, share={"data": 0.25, "diagnostics": 0.75}),
    ]
    (panel,) = share_figure(read_runs([run_of(tmp_path / "run", lines)])).panels
    layers = {name: curve.y.tolist() for name, curve in panel.areas}
    assert layers == {"data": [0.25, 0.25], "other": [0.75, 0], "diagnostics": [0, 0.75]}


def test_several_runs_lie_beside_each_other_with_only_their_differences(tmp_path):
    a = run_of(
        tmp_path / "a",
        [*LITTLE, validation(2, 6.5), validation(3, 7.0)],
        optimizer={"hidden": {"lr": 0.02, "beta": 0.95}},
    )
    b = run_of(tmp_path / "b", [*LITTLE, validation(3, 3.0)], optimizer={"hidden": {"lr": 0.1, "beta": 0.95}})
    c = run_of(tmp_path / "c", LITTLE, optimizer={"hidden": None, "embed": {"lr": 0.02}})
    page = Page(write_report([a, b, c], tmp_path / "out" / "report.html"))
    assert [row["best validation loss"] for row in page.summary()] == [
        "6.5000 at step 2",
        "3.0000 at step 3",
        "–",
    ]
    assert re.findall(r'<td class="number best">([^<]*)', page.source) == ["3.0000 at step 3"]
    found = page.rows[page.rows.index(["key", "a", "b", "c"]) + 1 :]
    assert sorted(found) == [
        ["optimizer.embed.lr", "not set", "not set", "0.02"],
        ["optimizer.hidden", "not set", "not set", "null"],
        ["optimizer.hidden.beta", "0.95", "0.95", "not set"],
        ["optimizer.hidden.lr", "0.02", "0.1", "not set"],
    ]
    assert page.count("details") == 3
    assert all(f"lr: {lr}" in page.sections["configuration"] for lr in (0.02, 0.1))


def test_runs_of_one_configuration_differ_in_nothing(tmp_path):
    runs = [run_of(tmp_path / name, LITTLE) for name in "ab"]
    assert differences(read_runs(runs)) == {}
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert "The configurations are the same." in page.sections["differences"]


def test_runs_with_other_roles_and_parameters_share_a_page(tmp_path):
    other = record(
        3, lr={"hidden": 0.1, "value_embed": 0.2}, diagnostics={"wte": {"update": {"cosine": 0.5}}}
    )
    page = Page(write_report([run_of(tmp_path / "a"), run_of(tmp_path / "b", [other])], tmp_path / "r.html"))
    assert "value_embed" in page.sections["learning-rates"]
    assert "scalar" in page.sections["learning-rates"]
    assert (tmp_path / "r-figures" / "conditioning-002.png").exists()


def test_runs_of_one_folder_name_are_told_apart_and_one_run_given_twice_is_one(tmp_path):
    runs = [run_of(tmp_path / where) for where in ("x/one/run", "x/two/run", "other")]
    found = read_runs([*runs, runs[0] / ".." / "run"])
    assert [run.label for run in found] == ["one/run", "two/run", "other"]


def test_hostile_names_are_text(tmp_path):
    evil = "</text></svg><script>alert(1)</script>&$x^{"
    line = {"step": 1, "loss": 5.0, "lr": {evil: 0.1}, "share": {evil: 1.0}, "polar": {evil: {"seconds": 1}}}
    line["diagnostics"] = {evil: {"update": {"cosine": 1}}}
    for name in ("</title><img src=x onerror=alert(2)>", "_hidden\n\x07"):
        run_of(tmp_path / name.replace("/", "∕"), [line], model={"architecture": evil}, **{evil: evil})
    runs = [path for path in tmp_path.iterdir() if path.is_dir()]
    changed = yaml.safe_load((runs[0] / "config.yaml").read_text()) | {evil: "<b onclick=alert(3)>"}
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(changed))
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert page.count("script") == page.count("img") == page.count("b") == 0
    assert "<script>alert(1)</script>" in page.sections["conditioning"]  # as text
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert "_hidden\ufffd\ufffd" in page.sections["loss"]  # the legend names it in spite of its underscore
    for drawing in re.findall(r"<svg.*?</svg>", page.source, re.DOTALL):
        ET.fromstring(drawing.replace("xlink:href", "href"))


def test_the_page_loads_nothing_and_serves_light_dark_and_print(whole):
    page = Page(whole)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page.source)
    assert page.count("script") == page.count("link") == page.count("iframe") == page.count("image") == 0
    assert all(
        attrs.get(key, "#").startswith("#") for _, attrs in page.tags for key in ("href", "src", "xlink:href")
    )
    assert "prefers-color-scheme: dark" in page.source
    assert "@media print" in page.source
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL))
    assert "var(--c0)" in drawings
    assert not re.findall(
        r"(?:fill|stroke): (#[0-9a-f]{6})", drawings
    )  # a fixed colour would vanish in the dark
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


def test_a_cut_last_line_is_passed_over_and_told(tmp_path):
    folder = run_of(tmp_path / "run", LITTLE)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 110, "loss": 0.01, "name": "\xc3')
    page = Page(write_report([folder], tmp_path / "report.html"))
    assert page.summary()[0]["steps"] == "3 / 200"
    assert "1 of 4 lines of metrics.jsonl could not be read" in page.sections["summary"]


@pytest.mark.parametrize(
    "line",
    ["[1]", "null", '{"loss": 1}', '{"step": null}', '{"step": "7"}', '{"step": -1}', "{" * 5000, "\x00"],
)
def test_a_line_that_is_no_record_changes_nothing_else(tmp_path, line):
    folder = run_of(tmp_path / "run", [record(1)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n" + json.dumps({"step": 2, "loss": 5.0}) + "\n")
    (run,) = read_runs([folder])
    assert (run.step, run.records, run.unreadable) == (2, 2, 1)
    assert run.curve("loss")[1].tolist() == [7.99, 5.0]


def test_nulls_and_values_of_another_kind_are_left_out(tmp_path):
    odd = {
        "step": 2,
        "loss": None,
        "lr": 3,
        "polar": None,
        "diagnostics": [1],
        "share": {"data": "x"},
        "skipped": True,
    }
    (run,) = read_runs([run_of(tmp_path / "run", [record(1), odd, record(3, loss=float("nan"))])])
    assert run.curve("loss")[0].tolist() == [1]
    write_report([run.folder], tmp_path / "report.html")


def test_a_single_record_and_none_at_all_make_a_page(tmp_path):
    one, none = run_of(tmp_path / "one", [{"step": 1, "loss": 5.0}]), run_of(tmp_path / "none", [])
    page = Page(write_report([one], tmp_path / "one.html"))
    assert page.summary()[0]["final validation loss"] == "–"
    assert page.count("svg") == 1
    assert "Nothing to show: no learning rate was recorded" in page.sections["learning-rates"]
    write_report([run_of(tmp_path / "full-one", FULL[:1])], tmp_path / "full.html")
    assert "none: nothing is recorded yet" in Page(write_report([one, none], tmp_path / "b.html")).source


def test_what_a_resume_wrote_again_takes_the_place_of_what_was_there(tmp_path):
    folder = run_of(tmp_path / "run", [record(s) for s in (1, 2, 3)] + [validation(3, 1.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(2, loss=4.0)) + "\n")
    (run,) = read_runs([folder])
    assert run.curve("loss")[0].tolist() == [1, 2]
    assert run.curve("loss")[1].tolist() == [7.99, 4.0]
    assert run.curve("validation_loss")[0].size == 0
    assert run.step == 2
