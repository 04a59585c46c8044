"""`python -m experiments`: what it writes and prints, and one sentence for each mistake."""

import json
import math
import sys

import pytest

from experiments import __main__ as command
from experiments.curves import Curve, Curves, follow
from experiments.methods import METHODS, Method
from experiments.problems import Completion, Quadratic
from polargrad_dist import PolarGrad
from polargrad_dist.trainer.cli import run


def curves(folder, name):
    found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["curves"]
    return [{key: value for key, value in curve.items() if key != "seconds"} for curve in found]


def test_a_short_run_writes_curves_and_figures_and_prints_a_row_per_method(tmp_path, capsys):
    arguments = ["completion", "--steps", "22", "--seeds", "0", "4", "--out", str(tmp_path), "--jobs", "1"]
    assert command.main(arguments) == 0
    found = curves(tmp_path, "completion")
    assert [(c["method"], c["seed"]) for c in found] == [
        (m.name, s) for m in METHODS["completion"] for s in (0, 4)
    ]
    assert all(c["steps"] == [0, 10, 20, 22] for c in found)
    assert all(len(c["nuclear_norm"]) == len(c["condition_gradient"]) == len(c["gap"]) == 4 for c in found)
    first = {c["seed"]: c["loss"][0] for c in found}
    assert all(c["loss"][0] == first[c["seed"]] for c in found)
    assert first[0] != first[4]
    pictures = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert set(pictures) == {
        "figure_4_and_D.6.png", "figure_D.7_and_D.8.png", "figure_D.9.png", "figure_D.10.png", "figure_D.11.png"
    }  # fmt: skip
    assert min(pictures.values()) > 10_000
    printed = capsys.readouterr().out
    assert all(method.name in printed for method in METHODS["completion"])
    assert "needs 1000 steps, this run has 22" in printed


@pytest.mark.slow
def test_two_processes_find_the_curves_of_one(tmp_path):
    for jobs in ("1", "2"):
        arguments = ["--steps", "3", "--seeds", "0", "--jobs", jobs, "--out", str(tmp_path / jobs)]
        assert command.main(arguments) == 0
    for name in METHODS:
        assert curves(tmp_path / "1", name) == curves(tmp_path / "2", name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["quadratik"], "there is no problem 'quadratik', expected quadratic, logistic, completion or all"),
        (["--steps", "0"], "--steps is 0, expected a whole number >= 1"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--jobs", "0"], "--jobs is 0, expected a whole number >= 1"),
        (["--seeds", "1", "1"], "--seeds is [1, 1], expected different whole numbers >= 0"),
        (["--seed", "-1"], "--seeds is [-1], expected different whole numbers >= 0"),
        (["--out", "FILE"], "cannot be made a folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(arguments, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    with pytest.raises(SystemExit) as left:
        run(command.main)
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert sentence in error
    assert error.count("\n") == 1


def test_a_diverging_run_ends_is_marked_and_counts_as_infinite():
    method = Method("too fast", "D.1", 1.0, lambda problem, lr: PolarGrad(list(problem.params.values()), lr))
    heard = []
    curve = follow(Quadratic(0, (8, 4, 16, 12)), method, 0, 500, 5, heard.append)
    assert curve.diverged_at is not None
    assert curve.diverged_at < 100
    assert sum(heard) == 500
    assert curve.at(500) == math.inf
    assert curve.at(0) == curve.gap[0]
    assert all(x is None or math.isfinite(x) for x in curve.plain()["gap"])


def test_rates_decay_every_25_steps():
    method = next(m for m in METHODS["completion"] if m.name == "PolarGrad (QDWH; lr ↓)")
    optimizer, schedule = method.optimizer(Completion(0, (10, 8, 2)))
    rates = []
    for _ in range(60):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[24] == 15
    assert rates[25] == pytest.approx(15 * 0.95)
    assert rates[50] == pytest.approx(15 * 0.95**2)


def test_a_verdict_needs_every_seed():
    from experiments.claims import Claim, Side

    def run_of(seed, last):
        return Curve("quadratic", "m", seed, [0, 100], [9.0, last], [9.0, last])

    claim = Claim("quadratic", "orders", "below 1", ((Side("m", 100), 1.0),))
    assert claim.verdict(Curves([run_of(0, 0.5), run_of(1, 0.9)]))[0] == "agrees"
    assert claim.verdict(Curves([run_of(0, 0.5), run_of(1, 1.1)]))[0] == "differs"
    late = Claim("quadratic", "orders", "below 1", ((Side("m", 200), 1.0),))
    assert late.verdict(Curves([run_of(0, 0.5)]))[0] == "not run"


def test_every_claim_names_a_method_of_its_problem():
    from experiments.claims import CLAIMS, Side

    for claim in CLAIMS:
        names = {m.name for m in METHODS[claim.problem]}
        assert {s.method for pair in claim.pairs for s in pair if isinstance(s, Side)} <= names
