"""What a run wrote while it trained is on its page."""

import json

import pytest

from tests.tools.test_report import Page, run_of
from tools.report import write_report

pytest.importorskip("matplotlib")


def sample(step: int, text: str) -> dict:
    return {"step": step, "samples": [{"prompt": "The ", "text": text}]}


def test_samples_are_shown_the_newest_first_and_those_of_a_killed_run_are_gone(tmp_path):
    run = run_of(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        for record in (sample(110, "first"), sample(120, "lost"), sample(115, "<b>second</b>")):
            file.write(json.dumps(record) + "\n")
    page = Page(write_report([run], tmp_path / "page.html"))
    text = page.sections["samples"]
    assert text.index("<b>second</b>") < text.index("first")
    assert "lost" not in text
    assert "samples" not in Page(write_report([run_of(tmp_path / "other")], tmp_path / "o.html")).sections
