"""The language-model experiments in miniature, through their own command line; the arithmetic of the race."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from experiments.language import defaults, figures, paper, race, rates
from experiments.language.runner import SMALL, Curves, Job, run_all
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim import OptimizerConfig

ROOT = Path(__file__).resolve().parents[2]


def test_the_length_that_ends_at_the_target_is_read_off_between_the_lengths_that_were_run():
    curve = [(100, 3.0), (200, 2.5), (400, 2.0)]
    assert race.steps_to(2.25, curve) == pytest.approx(math.sqrt(200 * 400))
    assert race.steps_to(2.0, curve) == pytest.approx(400)
    assert race.steps_to(1.9, curve) is None
    assert race.steps_to(3.5, curve) == 100
    assert race.steps_to(2.25, [(400, 2.0), (100, 3.0), (200, math.inf)]) == pytest.approx(100 * 4**0.75)
    assert race.steps_to(2.0, [(100, math.inf)]) is None


def fake_curves(jobs, stage):
    """A bowl around a point of each racer's own, off its grid, a little lower with every step of the run."""
    out = {}
    for key, job in jobs.items():
        values = dict(job.overrides)
        hidden, ends = (math.log(float(values[f"optimizer.{role}.lr"])) for role in ("hidden", "embed"))
        adam = values.get("optimizer.hidden.algorithm") == "adamw"
        adam_ends = values.get("optimizer.embed.algorithm") == "adamw"
        centre = (math.log(0.05 if adam else 0.02), math.log(0.1 if adam_ends else 6.0))
        bowl = (hidden - centre[0]) ** 2 + (ends - centre[1]) ** 2
        steps = int(values["trainer.steps"])
        loss = 3 + 0.3 * adam + bowl / 10 + 100 / steps + int(values["trainer.seed"]) / 1e4
        out[key] = Curves(validation=[(steps // 2, loss + 1), (steps, loss)])
    return out


def test_every_racer_has_the_same_budget_goes_beyond_edges_and_can_be_run(tmp_path):
    from train import parse_run

    swept = race.sweep(list(race.RACERS), 64, 160, tmp_path, fake_curves)
    assert set(swept) == {r.name for r in race.RACERS}
    for found in swept.values():
        if found.racer.kin:
            assert 3 <= len(found.tried) <= 3 + race.FURTHER
        else:
            assert len(found.tried) == 9 + 4 + 2 * race.FURTHER, found.racer.name
        config, _, _ = parse_run(race.job(found.racer, found.best, 64, 160, 0, tmp_path).arguments)
        config.optimizer.check()
        config.trainer.check(1)
        assert config.optimizer.hidden.lr == found.best[0]
        assert config.optimizer.embed.lr == config.optimizer.rule("head").lr == found.best[1]
        adam = found.racer.adam
        assert (config.optimizer.hidden.betas[0] if adam[0] else config.optimizer.hidden.beta) == found.best[
            2
        ]
        assert (config.optimizer.embed.betas[0] if adam[1] else config.optimizer.embed.beta) == found.best[3]
        if found.racer.name == "the default rules":
            swept_or_exact = ("lr", "beta", "oracle_dtype")
            for role in ("hidden", "embed", "head"):
                mine, default = (asdict(c.rule(role)) for c in (config.optimizer, OptimizerConfig()))
                assert [k for k in mine if mine[k] != default[k] and k not in swept_or_exact] == [], role
    assert len(swept["nuclear_shared"].tried) > 3
    assert not swept["nuclear_shared"].on_an_edge, "a variant too goes beyond its first rates"
    muon = swept["Muon + PolarSGDM"]
    assert muon.best[1] > max(muon.racer.ends), "the best lies beyond the grid"
    report = {"races": {"one": race.judge(swept, 64, 160, [2, 3], tmp_path, fake_curves)}}
    racers = report["races"]["one"]["racers"]
    assert racers["AdamW"]["steps_to_target"] is None
    steps = racers["Muon + PolarSGDM"]["steps_to_target"]
    assert all(96 <= s < 160 for s in steps)
    assert "Muon + PolarSGDM" in race.table(report)
    curves = {name: found["curves"] for name, found in racers.items()}
    curves["diverged"] = [[(80, math.inf), (160, math.inf)], []]
    figures.draw_race("a race", curves, tmp_path / "race.svg")
    assert all(f">{name}<" in (tmp_path / "race.svg").read_text() for name in racers)


@pytest.mark.parametrize("family", defaults.FAMILIES)
def test_a_swept_role_differs_from_the_default_rules_in_its_rate_alone(family, tmp_path):
    from train import parse_run

    config, _, _ = parse_run(defaults.Place(family, 64, 300).job("embed", 4.0, 0, tmp_path).arguments)
    config.trainer.check(1)
    assert config.model.architecture == family
    for role in defaults.FAMILIES[family]:
        rule = OptimizerConfig().rule(role)
        expected = replace(rule, lr=4 * rule.lr) if role == "embed" else rule
        assert config.optimizer.rule(role) == expected


def test_a_sweep_around_the_defaults_goes_beyond_its_edges_and_says_what_is_not_good_enough(
    tmp_path, monkeypatch
):
    def fake(jobs, workers, description):
        ended = {}
        for job in jobs:
            values = dict(job.overrides)
            embed = math.log2(float(values["optimizer.embed.lr"]) / OptimizerConfig().embed.lr)
            head = math.log2(float(values["optimizer.head.lr"]) / OptimizerConfig().embed.lr)
            final = 3 + (embed - 4) ** 2 / 100 + head**2 / 100 + int(values["trainer.seed"]) / 1e4
            ended[job] = Curves(validation=[(300, final)])
        return ended

    monkeypatch.setattr(defaults, "run_all", fake)
    report = defaults.run(tmp_path, ["qwen2.5"], [64], 300, [0, 1], 1)
    roles = report["places"][0]["roles"]
    assert list(roles["embed"]) == ["0.25", "0.5", "1", "2", "4", "8", "16", "32"]
    assert list(roles["head"]) == ["0.25", "0.5", "1", "2", "4"]
    assert roles["head"]["1"] == pytest.approx(3.16 + 0.5e-4)
    lines = {line.split()[2]: line for line in defaults.table(report).splitlines()[1:]}
    assert lines["embed"].endswith("more than allowed")
    assert "0.1600" in lines["embed"]
    assert lines["head"].endswith("0.0000")


def test_points_move_by_ratios_of_rates_and_of_a_momentum_s_distance_from_one():
    point = (0.02, 0.4, 0.95, 0.5)
    assert race.moved(point, 0, True, 3.0) == (0.06, 0.4, 0.95, 0.5)
    assert race.moved(point, 2, True, 2.0) == pytest.approx((0.02, 0.4, 0.975, 0.5))
    assert race.moved(point, 3, False, 2.0) == (0.02, 0.4, 0.95, 0.0)


@pytest.mark.parametrize(
    ("ended", "final"), [("diverged: 20 steps in a row were skipped", math.inf), ("finished", 4.0)]
)
def test_a_run_that_diverged_after_a_finite_validation_has_an_infinite_final_loss(tmp_path, ended, final):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 40, "validation_loss": 4.0}\n{"step": 45, "loss": null}\n'
    )
    (tmp_path / "done.json").write_text(json.dumps({"ended": ended, "identity": {}}))
    found = Curves.read(tmp_path)
    assert found.final == final
    assert found.validation == [(40, 4.0)]


@pytest.mark.slow
def test_the_race_runs_for_real_and_again_from_what_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(race, "FURTHER", 0)
    monkeypatch.setitem(race.COMMON, "data.cache", str(tmp_path / "cache"))
    arguments = (tmp_path, [2], 40, 2, ["Muon + PolarSGDM"], (16,), (40,))
    first = race.run(*arguments)
    (found,) = first["races"].values()
    assert found["racers"].keys() == {"AdamW", "Muon + PolarSGDM"}
    assert all(3 < loss < 8 for r in found["racers"].values() for loss in r["losses"])
    assert race.run(*arguments) == first


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


def test_the_best_rate_of_a_sweep_is_a_parabolas_vertex_and_sweeps_go_beyond_edges(monkeypatch, tmp_path):
    assert rates.vertex({0.5: 2.0, 1.0: 1.0, 2.0: 2.0}) == 1.0
    assert rates.vertex({f: (math.log2(f) - 0.3) ** 2 for f in (0.5, 1.0, 2.0)}) == pytest.approx(2**0.3)
    assert rates.vertex({0.5: 2.0, 1.0: 1.0, 2.0: math.inf}) == 1.0
    seen = []

    def fake(jobs, workers, description):
        """Best rates: hidden ones 3.2 times the start at the base, 0.8 at other points; of the ends as they start."""
        out = {}
        for job in jobs:
            values = dict(job.overrides)
            seen.append(job)
            base = str(rates.BASE) in job.folder.parts
            hidden = math.log2(float(values["optimizer.hidden.lr"]) / 0.02) - math.log2(3.2 if base else 0.8)
            ends = math.log2(float(values["optimizer.embed.lr"]))
            out[job] = Curves(validation=[(1, 3 + hidden**2 + ends**2)])
        return out

    monkeypatch.setattr(rates, "run_all", fake)
    report = rates.run(tmp_path, ["the default rules"], [0, 1], 1)
    points = report["rules"]["the default rules"]
    assert points["base"]["hidden"]["best"] == pytest.approx(0.064)
    assert points["width 128"]["hidden"]["best"] == pytest.approx(0.016)
    assert all(point["ends"]["best"] == pytest.approx(1.0) for point in points.values())
    assert len({job.folder for job in seen}) == len(set(seen)), "every training has a folder of its own"
    lines = rates.table(report).splitlines()
    assert [line.split()[-4] for line in lines[1:]] == ["1.00", "0.25", "0.25", "0.25", "0.25"]


def test_every_setting_of_the_rates_can_be_run(tmp_path):
    from train import parse_run

    for rules in rates.RULES:
        for setting in rates.POINTS.values():
            config, _, _ = parse_run(setting.job(rules, "ends", 2.0, 0, tmp_path).arguments)
            config.optimizer.check()
            config.trainer.check(1)
            assert config.optimizer.rule("head").lr == 2 * rates.START[rules][1]


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
    [
        (["race", "--only", "Adam"], "--only has 'Adam'"),
        (["paper", "--steps", "3"], "--steps is 3"),
        (["rates", "--steps", "80"], "leave --steps"),
    ],
)
def test_a_mistake_is_one_sentence(args, said):
    command = [sys.executable, "-m", "experiments.language", *args]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert said in found.stderr
    assert "Traceback" not in found.stderr
