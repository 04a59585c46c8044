"""The report's page says what the run directories hold, whatever state they are in."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.commandline import ROOT
from tools.report import write_report
from tools.report.__main__ import main
from tools.report.charts import charts
from tools.report.runs import differences, read_runs

ROLES = ("hidden", "embed", "head", "scalar")
SPECTRUM = ("condition", "nuclear_norm", "frobenius_norm", "spectral_norm", "stable_rank")


class Page(HTMLParser):
    """Sections by their id, rows of tables as lists of cells, the data, and everything that a browser would load or run."""

    def __init__(self, path: Path):
        super().__init__()
        self.sections: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.terms: list[str] = []
        self._section, self._cell, self._term = "", False, False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', self.source)
        self.data = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

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
        if tag in ("dt", "dd"):
            self.terms.append("")
            self._term = True

    def handle_endtag(self, tag):
        self._cell &= tag not in ("td", "th")
        self._term &= tag not in ("dt", "dd")
        if tag == "section":
            self._section = ""

    def handle_data(self, data):
        if self._section:
            self.sections[self._section] += data
        if self._cell:
            self.rows[-1][-1] += data
        if self._term:
            self.terms[-1] += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)

    def tiles(self) -> dict[str, str]:
        """The figures of a single run's summary."""
        return dict(zip(self.terms[::2], self.terms[1::2], strict=True))

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


def test_the_page_of_a_run_has_every_section_and_no_empty_one(whole):
    page = Page(whole)
    assert list(page.sections) == [
        *("summary", "loss", "optimizer", "speed", "conditioning", "setup", "configuration"),
    ]
    groups = page.data["groups"]
    assert {name: [one["id"] for one in found] for name, found in groups.items()} == {
        "loss": ["loss", "loss-time"],
        "optimizer": ["norm", "lr"],
        "speed": ["tokens_per_second", "mfu", "memory_gib"],
        "polar": ["polar-nuclear_norm", "polar-residual", "polar-seconds"],
    }
    assert page.count("figure") == sum(map(len, groups.values()))
    assert "layers.0.query.weight" in page.source
    (matrix,) = page.data["matrices"][0]
    assert "κ(G)" in matrix["q"]
    # The momentum is null.
    assert "κ(M)" not in matrix["q"]


def test_the_summary_holds_the_numbers_of_the_file(whole):
    assert Page(whole).tiles() == {
        "final validation loss": "7.2500",
        "best validation loss": "6.5000 at step 50",
        "bits per byte": "1.2500",
        "steps": "100 / 200",
        "tokens": "25.6k",
        "time": "0:00:20",
        "tokens/s, median": "1,280",
        "MFU, median": "40.0%",
        "skipped steps": "1",
    }


def test_the_parameters_are_shown_once_a_record_tells_them(tmp_path):
    told = run_of(tmp_path / "run", [{"step": 1, "parameters": 1_234_000}])
    assert Page(write_report([told], tmp_path / "a.html")).tiles()["parameters"] == "1.234M"


def test_curves_are_those_of_the_file_with_what_turns_steps_into_tokens_and_seconds(tmp_path):
    rows = [record(step, elapsed=step / 2) for step in range(10, 101, 10)]
    (run,) = read_runs([run_of(tmp_path / "run", [*rows, *FULL[-2:]])])
    drawn = charts([run])
    by_step, by_time = drawn["groups"]["loss"]
    training, held_out = by_step["series"]
    assert training["s"] == list(range(10, 101, 10))
    assert training["y"] == pytest.approx([8 - step / 100 for step in range(10, 101, 10)])
    assert held_out["y"] == [6.5, 7.25]
    assert by_time["series"] == by_step["series"]
    (entry,) = drawn["runs"]
    assert entry["tokensPerStep"] == 256
    assert dict(zip(entry["clock"]["s"], entry["clock"]["t"], strict=True))[60] == 30
    (rates,) = [one for one in drawn["groups"]["optimizer"] if one["id"] == "lr"]
    # All four roles have the same rate here: one curve with their names.
    assert [curve["name"] for curve in rates["series"]] == ["hidden, embed, head, scalar"]
    assert rates["series"][0]["y"] == pytest.approx([0.01 * step for step in range(10, 101, 10)])


def test_skipped_steps_are_marked_where_the_count_rises(tmp_path):
    (run,) = read_runs([run_of(tmp_path / "run")])
    assert charts([run])["runs"][0]["skips"] == [60]


def test_the_conditioning_of_each_matrix_comes_from_its_record(tmp_path):
    (run,) = read_runs([run_of(tmp_path / "run")])
    (matrix,) = charts([run])["matrices"][0]
    assert matrix["name"] == "layers.0.query.weight"
    assert matrix["s"] == list(range(10, 101, 10))
    assert matrix["q"]["κ(G)"] == [20 + 10 * i for i in range(10)]
    assert matrix["q"]["stable rank of G"] == [24 + 10 * i for i in range(10)]
    assert matrix["q"]["cosine"] == [0.9] * 10


def test_the_time_of_each_part_is_its_share_of_the_seconds_since_the_row_before(tmp_path):
    lines = [
        {"step": 1, "elapsed": 10.0, "share": {"data": 0.25, "other": 0.75}},
        {"step": 3, "elapsed": 50.0, "share": {"data": 0.25, "evaluation": 0.75}},
    ]
    (run,) = read_runs([run_of(tmp_path / "run", lines)])
    assert run.time_by_part() == pytest.approx({"evaluation": 30.0, "data": 12.5, "other": 7.5})
    page = Page(write_report([run.folder], tmp_path / "page.html"))
    assert "evaluation 60.0%" in " ".join(page.sections["speed"].split())


def test_the_bigram_model_of_a_run_is_its_line_and_its_figure(tmp_path):
    run = run_of(tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"bigram": {"loss": 3.25, "bits_per_byte": 1.5}}))
    page = Page(write_report([run], tmp_path / "page.html"))
    assert page.tiles()["bigram's bits per byte"] == "1.5000"
    assert page.data["runs"][0]["bigram"] == 3.25
    assert page.data["groups"]["loss"][0]["bigram"] is True


def test_a_mistake_at_the_command_line_names_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.report", str(tmp_path / "nope")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("python -m tools.report: error: ")
    assert "__main__" not in done.stderr


def test_hardware_versions_commit_and_command_are_those_of_run_json(tmp_path):
    facts = {
        "command": "train.py --config a.yaml <b>",
        "commit": "0123456789ab",
        "versions": {"torch": "2.13.0"},
        "ranks": {"world": 8, "strategy": "fsdp", "devices": ["8 x H100"], "hosts": ["n"]},
        "roles": {"hidden": {"rule": "polar, lr 0.02"}},
        "starts": [{"step": 0, "time": 0}, {"step": 40, "time": None}, "odd"],
        "training": {"epochs": "many"},
        "machine": [1],
        "expected": {
            "device": "H100 SXM",
            "available": 80 * 2**30,
            "memory": {"total": 60 * 2**30},
            "seconds_per_step": 0.5,
            "seconds": 3600.0,
        },
    }
    run = run_of(tmp_path / "run")
    (run / "run.json").write_text(json.dumps(facts))
    rows = dict(Page(write_report([run], tmp_path / "page.html")).rows)
    assert rows["ranks"] == "8 (fsdp) on 8 x H100"
    assert rows["versions"] == "torch 2.13.0"
    assert rows["commit"] == "0123456789ab"
    assert rows["command"] == "train.py --config a.yaml <b>"
    assert rows["rules"] == "hidden: polar, lr 0.02"
    assert rows["starts"] == "step 0 (1970-01-01 00:00 UTC), step 40 ()"
    assert "machine" not in rows
    described = {"cores": 2, "threads": 1, "system": "Linux 6", "memory_gib": 23.6}
    (run / "run.json").write_text(json.dumps({"machine": described}))
    rows |= dict(Page(write_report([run], tmp_path / "page.html")).rows)
    assert rows["machine"] == "2 cores, 1 thread per rank, Linux 6, 23.6 GiB of memory"
    assert rows["expected"] == (
        "60.0 of 80.0 GiB per rank (20.0 GiB left), 500 ms per step, 1:00:00 for the whole run on H100 SXM, estimated"
    )
    (run / "run.json").write_text(json.dumps({"expected": {"device": "H100", "memory": 3}}))
    assert "expected" not in dict(Page(write_report([run], tmp_path / "page.html")).rows)


@pytest.mark.parametrize(("targets", "marked"), [((558, 558), 1), ((558, 93_594), 0)])
def test_the_lowest_loss_is_marked_only_among_runs_validated_on_as_many_targets(tmp_path, targets, marked):
    runs = [
        run_of(tmp_path / name, [*LITTLE, validation(3, loss)]) for name, loss in (("a", 3.0), ("b", 4.6))
    ]
    for run, count in zip(runs, targets, strict=True):
        (run / "run.json").write_text(json.dumps({"data": {"validation_targets": count}}))
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert page.source.count('<td class="number best">') == marked
    assert ("Validated on different data (558, 93,594 targets)" in page.source) == (not marked)


def test_a_run_whose_last_validation_is_not_finite_says_so_and_is_never_the_best(tmp_path):
    lost = {"step": 3, "loss": None, "validation_loss": None, "bits_per_byte": None}
    runs = [
        run_of(tmp_path / "a", [*LITTLE, validation(1, 2.0), lost], trainer={"seed": 0}),
        run_of(tmp_path / "b", [*LITTLE, validation(3, 4.0)], trainer={"seed": 1}),
        run_of(tmp_path / "c", [*LITTLE, validation(3, 3.5)], trainer={"seed": 2}),
    ]
    alone = Page(write_report(runs[:1], tmp_path / "alone.html"))
    assert alone.tiles()["final validation loss"] == alone.tiles()["bits per byte"] == "not finite"
    assert alone.tiles()["best validation loss"] == "2.0000 at step 1"
    assert "a: the last validation loss, at step 3, is not finite: this run diverged." in alone.source
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert [row["final validation loss"] for row in page.summary()] == ["not finite", "4.0000", "3.5000"]
    assert re.findall(r'<td class="number best">([^<]*)', page.source) == ["3.5000 at step 3"]
    assert ["a, b, c", "0, 1, 2", "not the same", "not finite", "not finite"] in page.rows


def test_a_validation_that_is_finite_again_after_a_resume_counts(tmp_path):
    (run,) = read_runs([run_of(tmp_path / "run", [validation(1, 2.0), {"step": 2, "validation_loss": None}])])
    assert run.diverged_at == 2
    run.add(validation(1, 1.5))
    assert run.diverged_at is None
    assert run.summary().final_loss == 1.5
    run.add({"step": 3, "validation_loss": float("inf")})
    assert run.diverged_at == 3
    run.add(validation(4, 1.25))
    assert run.summary().final_loss == 1.25


@pytest.mark.parametrize(
    ("epochs", "shown"), [(120.0, "120 epochs"), (1200, "1,200 epochs"), (0.034, "0.034 epochs")]
)
def test_epochs_are_written_out(tmp_path, epochs, shown):
    run = run_of(tmp_path / "run", LITTLE)
    facts = {"training": {"epochs": epochs}, "data": {"source": "files", "train_tokens": 5}}
    (run / "run.json").write_text(json.dumps(facts))
    assert dict(Page(write_report([run], tmp_path / "page.html")).rows)["data"].endswith(f", {shown}")


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
    first = page.rows.index(["key", "a", "b", "c"]) + 1
    found = page.rows[first : first + 4]
    assert sorted(found) == [
        ["optimizer.embed.lr", "not set", "not set", "0.02"],
        ["optimizer.hidden", "not set", "not set", "null"],
        ["optimizer.hidden.beta", "0.95", "0.95", "not set"],
        ["optimizer.hidden.lr", "0.02", "0.1", "not set"],
    ]
    assert all(f"lr: {lr}" in page.sections["configuration"] for lr in (0.02, 0.1))


def test_runs_of_one_configuration_differ_in_nothing(tmp_path):
    runs = [run_of(tmp_path / name, LITTLE) for name in "ab"]
    assert differences(read_runs(runs)) == {}
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert "The configurations are the same." in page.sections["differences"]


def test_runs_that_differ_only_in_their_seed_are_one_row_of_means_with_least_and_largest(tmp_path):
    losses = {"a": (6.0, 6.5, 7.3), "b": (5.0, 5.5), "c": (4.0, 4.5)}
    folders = []
    for rule, found in losses.items():
        for seed, loss in enumerate(found):
            # The second of c's runs has not come as far as the first.
            end = 50 if (rule, seed) == ("c", 1) else 100
            folders.append(run_of(
                tmp_path / f"{rule}{seed}",
                [record(10), validation(end, loss, loss / 4)],
                trainer={"seed": seed, "run_dir": f"runs/{rule}{seed}", "logging": {"wandb_name": f"{seed}"}},
                optimizer={"hidden": {"lr": {"a": 0.1, "b": 0.2, "c": 0.3}[rule]}},
            ))  # fmt: skip
    rows = Page(write_report(folders, tmp_path / "report.html")).rows
    first = rows.index(["runs", "seeds", "at step", "validation loss", "bits per byte"])
    assert rows[first + 1 : first + 4] == [
        ["a0, a1, a2", "0, 1, 2", "100", "6.6000 (6.0000 to 7.3000)", "1.6500 (1.5000 to 1.8250)"],
        ["b0, b1", "0, 1", "100", "5.2500 (5.0000 to 5.5000)", "1.3125 (1.2500 to 1.3750)"],
        ["c0, c1", "0, 1", "not the same", "–", "–"],
    ]


def test_one_configuration_with_one_seed_each_has_no_row_of_means(tmp_path):
    folders = [run_of(tmp_path / name, trainer={"seed": 3}) for name in "ab"]
    folders += [run_of(tmp_path / "c", trainer={"seed": 4, "steps": 100})]
    assert "Over seeds" not in Page(write_report(folders, tmp_path / "report.html")).sections["summary"]


def test_runs_with_other_roles_and_parameters_share_a_page(tmp_path):
    other = record(
        3, lr={"hidden": 0.1, "value_embed": 0.2}, diagnostics={"wte": {"update": {"cosine": 0.5}}}
    )
    page = Page(write_report([run_of(tmp_path / "a"), run_of(tmp_path / "b", [other])], tmp_path / "r.html"))
    titles = [one["title"] for one in page.data["groups"]["optimizer"]]
    assert {"Learning rate, value_embed", "Learning rate, scalar"} <= set(titles)
    assert [[one["name"] for one in found] for found in page.data["matrices"]] == [
        ["layers.0.query.weight"],
        ["wte"],
    ]


def test_runs_of_one_folder_name_are_told_apart_and_one_run_given_twice_is_one(tmp_path):
    runs = [run_of(tmp_path / where) for where in ("x/one/run", "x/two/run", "other")]
    found = read_runs([*runs, runs[0] / ".." / "run"])
    assert [run.label for run in found] == ["one/run", "two/run", "other"]


def test_hostile_names_are_text(tmp_path):
    evil = "</text></script><script>alert(1)</script>&$x^{"
    line = {"step": 1, "loss": 5.0, "lr": {evil: 0.1}, "share": {evil: 1.0}, "polar": {evil: {"seconds": 1}}}
    line["diagnostics"] = {evil: {"update": {"cosine": 1}}}
    line["validation"] = {evil: {"loss": 1.0}}
    line["samples"] = [{"prompt": evil, "text": evil}]
    line["elapsed"] = 1.0
    for name in ("</title><img src=x onerror=alert(2)>", "_hidden\n\x07"):
        run = run_of(tmp_path / name.replace("/", "∕"), [line], model={"architecture": evil}, **{evil: evil})
        facts = {"command": evil, "model": {"name": evil}, "versions": {evil: evil}, "commit": evil}
        (run / "run.json").write_text(json.dumps(facts))
    runs = [path for path in tmp_path.iterdir() if path.is_dir()]
    changed = yaml.safe_load((runs[0] / "config.yaml").read_text()) | {evil: "<b onclick=alert(3)>"}
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(changed))
    page = Page(write_report(runs, tmp_path / "report.html"))
    # The data and the page's own two, and no other.
    assert page.count("script") == 3
    assert page.count("img") == page.source.count("<b onclick") == 0
    assert evil in page.sections["samples"]
    assert page.data["matrices"][0][0]["name"] == evil
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert {run["label"] for run in page.data["runs"]} >= {"_hidden\ufffd\ufffd"}


def test_the_page_loads_nothing_and_runs_its_own_scripts_alone(whole):
    page = Page(whole)
    without_namespace = page.source.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|@import|url\((?!#)", without_namespace)
    assert page.count("link") == page.count("iframe") == page.count("image") == page.count("img") == 0
    assert all(attrs.get(key, "#").startswith("#") for _, attrs in page.tags for key in ("href", "src"))
    (policy,) = [attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs]
    scripts = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    allowed = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; script-src "
        + " ".join(f"'sha256-{one}'" for one in allowed)
    )
    assert len(allowed) == 2
    assert "prefers-color-scheme: dark" in page.source
    assert "@media print" in page.source
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


def test_a_cut_last_line_is_passed_over_and_told(tmp_path):
    folder = run_of(tmp_path / "run", LITTLE)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 110, "loss": 0.01, "name": "\xc3')
    page = Page(write_report([folder], tmp_path / "report.html"))
    assert page.tiles()["steps"] == "3 / 200"
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
        "samples": 5,
        "validation_loss": "x",
    }
    (run,) = read_runs([run_of(tmp_path / "run", [record(1), odd, record(3, loss=float("nan"))])])
    assert run.curve("loss")[0].tolist() == [1]
    assert run.samples == run.not_finite == []
    write_report([run.folder], tmp_path / "report.html")


def test_a_single_record_and_none_at_all_make_a_page(tmp_path):
    one, none = run_of(tmp_path / "one", [{"step": 1, "loss": 5.0}]), run_of(tmp_path / "none", [])
    page = Page(write_report([one], tmp_path / "one.html"))
    assert "final validation loss" not in page.tiles()
    assert list(page.data["groups"]) == ["loss"]
    assert list(page.sections) == ["summary", "loss", "setup", "configuration"]
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
