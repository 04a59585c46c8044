"""The public benchmark: its verdict, its table, and every race-*.yaml scaled down, on one rank and on two."""

import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data import open_data
from experiments import benchmark
from models import build_model
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer import Trainer, World, seed_everything
from tests.gloo import run_ranks
from train import RunConfig, parse_run

ROOT = Path(__file__).resolve().parents[2]
RACES = sorted(path.stem for path in (ROOT / "configs").glob("race-*.yaml"))
VOCABULARY, LENGTH = 64, 32


def write_shards(folder: Path) -> None:
    """Two shards to train on and one to validate on, as published, of text whose next token is mostly known."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train_000001", 3000), ("train_000002", 2500), ("val_000000", 600)):
        steps = np.where(generator.random(count) < 0.9, 1, generator.integers(0, VOCABULARY, count))
        tokens = (np.cumsum(steps) % VOCABULARY).astype("<u2")
        header = struct.pack("<256i", 20240520, 1, count, *[0] * 253)
        (folder / f"fineweb_{name}.bin").write_bytes(header + tokens.tobytes())


def small(name: str, shards: Path, run_dir: Path) -> RunConfig:
    """A race with the model, the batch and the run made small, and what counts steps with them; nothing else."""
    changes = {
        "data.paths": json.dumps([str(shards)]), "data.cache": str(shards.parent / "cache"), "model.width": 32,
        "model.layers": 2, "model.heads": 2, "model.vocab_size": VOCABULARY, "model.end_of_text": 0,
        "data.tokenizer.end_of_text": 0,
        "trainer.run_dir": str(run_dir), "trainer.steps": 20, "trainer.global_batch": 8, "trainer.micro_batch": 4,
        "trainer.sequence_length": LENGTH, "trainer.precision": "fp32", "trainer.compile": "false", "trainer.device": "cpu",
        "trainer.logging.every": 1, "trainer.logging.progress": "off", "trainer.checkpoint.every": 0,
        "trainer.evaluation.every": 10, "trainer.evaluation.late_every": 1,
    }  # fmt: skip
    if name == "race-adamw":
        changes["trainer.schedule.hidden.warmup_steps"] = 2
    if name in ("race-ema-nesterov", "race-recipe"):
        changes |= {"trainer.lookahead.start": 5, "trainer.lookahead.end": 15}
    if name == "race-recipe":
        changes |= {
            "trainer.average.start": 15,
            "trainer.average.horizon": 3,
            "trainer.schedule.momentum_warmup_steps": 3,
        }
        changes |= {"trainer.schedule.momentum_cooldown_steps": 3}
    arguments = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    return parse_run(["--config", str(ROOT / "configs" / f"{name}.yaml"), *arguments])[0]


def trained(rank: int, world: int, names: list[str], shards: str, out: str) -> list[dict[int, float]]:
    """Validation losses by step of each race, on this rank of ``world``."""
    group = dist.group.WORLD if world > 1 else None
    here = World(rank, world, rank, torch.device("cpu"), group) if world > 1 else World()
    found = []
    for name in names:
        config = small(name, Path(shards), Path(out) / name)
        trainer = config.trainer.for_world(world)
        data = open_data(
            config.data, sequence_length=LENGTH, global_batch=trainer.global_batch, micro_batch=trainer.micro_batch,
            rank=rank, world=world, seed=trainer.seed, all_gather=here.gather, meanwhile=here.meanwhile,
        )  # fmt: skip
        seed_everything(trainer.seed)
        model = build_model(config.model, vocab_size=VOCABULARY, end_of_text=0)
        outcome = Trainer(trainer, config.optimizer, model, data, here, {"race": name}).fit()
        assert outcome.exit_code == 0
        found.append(dict(benchmark.Curves.read(Path(out) / name).validation))
    return found


def test_every_race_runs_scaled_down_on_one_rank_and_two_alike(tmp_path):
    write_shards(tmp_path / "shards")
    names = [*RACES]
    one = trained(0, 1, names, str(tmp_path / "shards"), str(tmp_path / "one"))
    two = run_ranks(trained, 2, names, str(tmp_path / "shards"), str(tmp_path / "two"))[0]
    assert len(names) == 6
    for name, alone, together in zip(names, one, two, strict=True):
        assert sorted(alone) == sorted(together) == [10, 18, 19, 20], name
        assert alone[20] < alone[10], name
        assert max(abs(alone[step] - together[step]) for step in alone) < 0.02, (name, alone, together)


def test_the_races_have_the_hyperparameters_of_the_page():
    page = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(race-[a-z-]+)` \|(.*)\|$", page, re.MULTILINE)
    assert sorted(name for name, _ in rows) == RACES
    for name, rest in rows:
        cells = [cell.strip() for cell in rest.split("|")]
        config = parse_run(["--config", str(ROOT / "configs" / f"{name}.yaml")])[0]
        rules = {
            role: config.optimizer.rule(role) for role in ("hidden", "embed", "value_embed", "head", "scalar")
        }
        rates = [rules[role].lr for role in ("embed", "head", "scalar")]
        schedule = config.trainer.schedule
        parts = [schedule.of(role).decay_fraction for role in ("hidden", "scalar")]
        said = [float(cell) for cell in cells[:6]]
        assert said == [config.trainer.steps, rules["hidden"].lr, rules["hidden"].weight_decay, *rates], name
        # Of all others, or of embeddings and head, then of scalars
        decays = [float(part.split()[-1]) for part in cells[6].split(";")]
        assert {rules[role].weight_decay for role in ("embed", "value_embed", "head")} == {decays[0]}, name
        assert rules["scalar"].weight_decay == decays[-1], name
        assert [float(part) for part in cells[7].split(";")] == parts, name
        tokens = config.trainer.tokens_per_step
        assert (tokens, config.data.validation_tokens, config.data.order) == (
            524_288,
            20 * 524_288,
            "sequential",
        )
        assert config.model.architecture == "gpt"
        assert config.trainer.clip_norm is None
        assert all(rule.eps == 1.9e-16 for rule in rules.values() if rule.algorithm == "adamw")
        for world in (1, 2, 4, 8):
            config.trainer.for_world(world).check(world)
    assert pytest.approx(1.9e-16, rel=0.01) == 1e-10 / 524_288


def test_the_rule_is_the_benchmarks():
    # Its own examples: any single run below 3.276, and four whose mean is below 3.278.
    assert benchmark.significant([3.276])
    assert not benchmark.significant([3.2761])
    assert benchmark.significant([3.279, 3.277, 3.278, 3.278])
    assert not benchmark.significant([3.279, 3.2775, 3.278, 3.278])
    curves = {
        0: [(100, 3.4), (125, 3.277), (150, 3.275)],
        1: [(100, 3.4), (125, 3.278), (150, 3.276), (175, 3.27)],
    }
    found = benchmark.verdict(curves)
    assert [row["step"] for row in found["rows"]] == [100, 125, 150]
    assert found["steps_to_target"] == 150
    assert "150 steps" in benchmark.table(found)
    assert benchmark.verdict({0: [(100, 3.28)]})["steps_to_target"] is None


def test_runs_that_have_ended_are_reported_and_others_named(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "race-muon" / "seed-3"
    folder.mkdir(parents=True)
    rows = [{"step": step, "validation_loss": loss} for step, loss in ((3225, 3.279), (3250, 3.2755))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["benchmark", "race-muon", "--report", "--out", str(tmp_path), "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", words)
    assert benchmark.main() == 0
    assert "3.28 with n = 1 (a mean of at most 3.27600): 3250 steps" in capsys.readouterr().out
    assert json.loads((tmp_path / "race-muon" / "verdict.json").read_text())["steps_to_target"] == 3250
    monkeypatch.setattr(sys, "argv", [*words, "4"])
    with pytest.raises(ConfigError, match="seed 4 has no validation"):
        benchmark.main()
    monkeypatch.setattr(sys, "argv", ["benchmark", "race-sgd"])
    with pytest.raises(ConfigError, match="expected a file or one of: race-adamw"):
        benchmark.main()


def test_a_seed_is_started_on_every_gpu():
    words = benchmark.command(Path("a.yaml"), Path("out"), 7, 8, ["--trainer.micro_batch", "32"])
    assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "8"]
    assert words[6:] == ["train.py", "--config", "a.yaml", "--trainer.run_dir", "out", "--trainer.seed", "7",
                         "--trainer.micro_batch", "32"]  # fmt: skip
    assert benchmark.command(Path("a.yaml"), Path("out"), 7, 1, [])[1] == "train.py"
