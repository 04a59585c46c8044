"""What a run wrote while it trained is on its page."""

import json
import re

from tests.tools.test_report import Page, run_of
from tools.report import write_report


def sample(step: int, text: str) -> dict:
    return {"step": step, "samples": [{"prompt": "The ", "text": text}]}


def test_samples_are_shown_as_they_developed_and_those_of_a_killed_run_are_gone(tmp_path):
    run = run_of(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        for record in (sample(110, "first"), sample(120, "lost"), sample(115, "<b>second</b>")):
            file.write(json.dumps(record) + "\n")
    page = Page(write_report([run], tmp_path / "page.html"))
    text = page.sections["samples"]
    assert text.index("step 110") < text.index("first") < text.index("step 115") < text.index("<b>second</b>")
    assert "lost" not in text
    assert "samples" not in Page(write_report([run_of(tmp_path / "other")], tmp_path / "o.html")).sections


def test_of_many_samples_the_first_the_last_and_more_early_ones_are_shown(tmp_path):
    run = run_of(tmp_path / "run", [sample(step, f"text {step}") for step in range(1, 101)])
    text = Page(write_report([run], tmp_path / "page.html")).sections["samples"]
    shown = [int(step) for step in re.findall(r"step (\d+)", text)]
    assert len(shown) == 8
    assert (shown[0], shown[-1]) == (1, 100)
    assert sum(step <= 50 for step in shown) > 4


def test_samples_of_several_runs_lie_under_their_prompt(tmp_path):
    runs = [run_of(tmp_path / name, [sample(1, f"by {name}")]) for name in ("one", "two")]
    page = Page(write_report(runs, tmp_path / "page.html"))
    assert page.sections["samples"].count("The ") == 3
    assert page.sections["samples"].index("by one") < page.sections["samples"].index("by two")
