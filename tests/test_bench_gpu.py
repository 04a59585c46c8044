"""The GPU benchmark in its reduced form: every section runs on a CPU, so that it cannot rot unseen."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import __main__ as bench
from benchmarks.gpu.measure import Line, Setting, launches_and_idle, table


def test_every_section_runs_in_the_reduced_form(tmp_path, capsys):
    out = tmp_path / "found.json"
    assert bench.main(["--reduced", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert list(found) == list(bench.SECTIONS)
    for section in found.values():
        assert "failed" not in section
        assert section["machine"]["form"] == "reduced"
        assert all(line["value"] == line["value"] for line in section["lines"])
    printed = capsys.readouterr().out
    assert "0 goals missed" in printed
    # Goals of time are a GPU's
    assert "not judged" in printed


def test_a_section_that_fails_or_hangs_fails_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SECTIONS", {"nonsense": 60, "methods": 0.01})
    assert bench.main(["--reduced", "--out", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert "benchmarks.gpu.nonsense" in found["nonsense"]["failed"]
    assert found["methods"]["failed"] == "took longer than its limit of 0.04 s"
    assert "sections failed: ['nonsense', 'methods']" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_full_form_says_so(capsys):
    assert bench.main([]) == 2
    assert "--reduced" in capsys.readouterr().err


def test_the_benchmark_needs_nothing_but_torch_transformers_and_numpy():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['jsonargparse', 'datasets', 'wandb', 'yaml', 'matplotlib'])); "
        "from benchmarks.gpu import __main__, methods, steps, ranks, roots, training, collectives, rounds"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missed_goal_is_printed_as_missed():
    printed = table([Line("roots", "1 x 768", "faster", 2.0, "times", ">= 8", False)])
    assert "| roots | 1 x 768 | faster | 2 times | >= 8 | **no** |" in printed


def test_operations_are_counted():
    setting = Setting(torch.device("cpu"), True)
    x = torch.ones(3)
    few, _ = launches_and_idle(lambda: x + 1, setting)
    more, _ = launches_and_idle(lambda: [x + 1 for _ in range(10)], setting)
    assert more == 10 * few
