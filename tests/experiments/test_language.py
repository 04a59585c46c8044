"""The language-model experiments in miniature, through their own command line; the arithmetic of the race."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.language import paper, race
from experiments.language.runner import SMALL, Curves, Job, run_all
from polargrad_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_length_that_ends_at_the_target_is_read_off_between_the_lengths_that_were_run():
    curve = [(100, 3.0), (200, 2.5), (400, 2.0)]
    assert race.steps_to(2.25, curve) == pytest.approx(math.sqrt(200 * 400))
    assert race.steps_to(2.0, curve) == pytest.approx(400)
    assert race.steps_to(1.9, curve) is None
    assert race.steps_to(3.5, curve) == 100
    assert race.steps_to(2.25, [(400, 2.0), (100, 3.0), (200, math.inf)]) == pytest.approx(100 * 4**0.75)
    assert race.steps_to(2.0, [(100, math.inf)]) is None


def test_every_racer_has_the_same_number_of_trials_and_a_rule_that_can_be_run(tmp_path):
    from train import parse_run

    assert {len(r.hidden) * len(r.ends) for r in race.RACERS} == {9}
    for racer in race.RACERS:
        config, _, _ = parse_run(race.job(racer, (0.01, 0.1), 40, 0, tmp_path).arguments)
        config.optimizer.check()
        assert config.optimizer.hidden.lr == 0.01
        assert config.optimizer.embed.lr == config.optimizer.rule("head").lr == 0.1


@pytest.mark.parametrize("name", paper.EXPERIMENTS)
def test_an_experiment_of_the_paper_is_its_full_size_configuration_made_small(name, tmp_path):
    from train import parse_run

    experiment = paper.EXPERIMENTS[name]
    for (entry_name, seed), job in experiment.jobs(name, tmp_path, [3], 80).items():
        config, _, _ = parse_run(job.arguments)
        config.optimizer.check()
        config.trainer.check(1)
        (entry,) = [e for e in experiment.entries if e.name == entry_name]
        full, _, _ = parse_run(["--config", str(ROOT / "configs" / f"{entry.config}.yaml")])
        assert config.model.architecture == full.model.architecture
        assert config.trainer.seed == seed == 3
        if not any(key.startswith("optimizer") for key in entry.changes):
            assert config.optimizer == full.optimizer


def small_job(folder: Path, **changes) -> Job:
    tiny = {
        "trainer.steps": 4,
        "trainer.sequence_length": 32,
        "model.layers": 2,
        "model.width": 16,
        "model.heads": 2,
    }
    rest = {"trainer.diagnostics.every": 2, "trainer.evaluation.every": 0, "data.validation_tokens": 512}
    short = {
        "trainer.schedule.warmup_steps": 0,
        "data.cache": str(folder.parent / "cache"),
        "data.tokenizer.vocab_size": 300,
    }
    return Job.of("quickstart", folder, SMALL, {"model.vocab_size": 300}, tiny, rest, short, changes)


def test_runs_are_trained_once_and_read_back(tmp_path):
    jobs = [small_job(tmp_path / name, **{"trainer.seed": seed}) for seed, name in enumerate("ab")]
    found = run_all(jobs, 2, "test")
    for curves in found.values():
        assert curves.validation[-1][0] == 4
        assert 4.0 < curves.final < 6.5
        condition = dict(curves.diagnostics["qwen.lm_head.weight/gradient/condition"])
        assert condition.keys() == {1, 2, 4}
        assert min(condition.values()) > 1
    assert found[jobs[0]].final != found[jobs[1]].final
    written = (jobs[0].folder / "metrics.jsonl").stat().st_mtime_ns
    assert run_all(jobs, 2, "again")[jobs[0]].final == found[jobs[0]].final
    assert (jobs[0].folder / "metrics.jsonl").stat().st_mtime_ns == written
    longer = small_job(tmp_path / "a", **{"trainer.steps": 6, "trainer.seed": 0})
    assert run_all([longer], 1, "longer")[longer].validation[-1][0] == 6
    with pytest.raises(ConfigError, match="learning"):
        run_all([small_job(tmp_path / "c", **{"optimizer.hidden.lr": -1, "optimizer.learning": 1})], 1, "bad")


def test_a_run_that_diverges_is_a_result(tmp_path):
    job = small_job(
        tmp_path / "d",
        **{"optimizer.head.lr": 1e30, "trainer.safety.max_skipped": 1, "trainer.clip_norm": None},
    )
    curves = run_all([job], 1, "test")[job]
    assert curves.final == math.inf
    assert json.loads((job.folder / "done.json").read_text())["ended"].startswith("diverged")


def test_a_picture_is_drawn_from_curves(tmp_path):
    curves = Curves(
        [(1, 5.0), (2, 4.0)], [(2, 4.5)], {"qwen.lm_head.weight/gradient/condition": [(1, 10.0), (2, 20.0)]}
    )
    from experiments.language.figures import draw

    draw(
        "Title",
        "embed",
        "qwen.lm_head.weight",
        {"one": [curves, curves], "diverged": [Curves()]},
        tmp_path / "x" / "p.png",
    )
    assert (tmp_path / "x" / "p.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("args", "said"),
    [(["race", "--only", "Adam"], "--only names 'Adam'"), (["paper", "--steps", "3"], "--steps is 3")],
)
def test_a_mistake_is_one_sentence(args, said):
    command = [sys.executable, "-m", "experiments.language", *args]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert said in found.stderr
    assert "Traceback" not in found.stderr
