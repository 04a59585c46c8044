"""EMA-Nesterov and the average of the last weights: their formulas, on two ranks, resumed, and read from a checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from polargrad_dist.errors import CheckpointError, ConfigError
from polargrad_dist.optim import OptimizerConfig, adamw_rule
from polargrad_dist.optim.around import AverageConfig, EmaNesterov, LookaheadConfig
from polargrad_dist.optim.schedules import RoleSchedule, ScheduleConfig
from polargrad_dist.trainer import World
from polargrad_dist.trainer.checkpoint import CheckpointConfig
from polargrad_dist.trainer.checkpoint.single import find_checkpoint
from polargrad_dist.trainer.config import EvaluationConfig, SafetyConfig, StrategyConfig
from tests.gloo import run_ranks
from tests.trainer.toy import interrupt, settings, trainer

AROUND = {
    "lookahead": LookaheadConfig(beta=0.6, decay=0.9, start=2, end=9),
    "average": AverageConfig(start=5, horizon=4, weight=0.6),
    "evaluation": EvaluationConfig(every=3, late_every=1),
    "schedule": ScheduleConfig(
        "linear", decay_fraction=0.7, scalar=RoleSchedule(decay_fraction=0.4), power=1.2
    ),
}


def adamw_everywhere() -> OptimizerConfig:
    return OptimizerConfig(hidden=adamw_rule(0.01), embed=adamw_rule(0.01), scalar=adamw_rule(0.01))


def validations(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}


def test_a_run_is_ema_nesterov_around_adamw_and_validates_the_average(tmp_path):
    t = trainer(settings(tmp_path, schedule=ScheduleConfig("constant"), **{k: AROUND[k] for k in AROUND if k != "schedule"}),
                optimizer=adamw_everywhere())  # fmt: skip
    plain = trainer(
        settings(tmp_path / "plain", schedule=ScheduleConfig("constant")), optimizer=adamw_everywhere()
    )
    t.fit()
    model = plain.bare
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    moves = {name: torch.zeros_like(p) for name, p in params.items()}
    mean: dict[str, torch.Tensor] = {}
    batches = plain.data.train.batches_from(0)
    for step in range(12):
        before = {name: p.detach().clone() for name, p in params.items()}
        if 2 <= step < 9:
            for name, p in params.items():
                p.data += 0.6 * moves[name]
        optimizer.zero_grad()
        for _ in range(4):
            (model(*next(batches)) / 4).backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        for name, p in params.items():
            moves[name] = 0.9 * moves[name] + 0.1 * (p.detach() - before[name])
            if step + 1 == 5:
                mean[name] = p.detach().clone()
            elif step + 1 > 5:
                mean[name] = 0.75 * mean[name] + 0.25 * p.detach()
    ours = dict(t.bare.named_parameters())
    assert max(float((ours[n] - p).abs().max()) for n, p in params.items()) < 2e-6
    used = {name: 0.4 * p.detach() + 0.6 * mean[name] for name, p in params.items()}
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.averaged == 0.6
    assert max(float((checkpoint.read(f"model/{n}") - x).abs().max()) for n, x in used.items()) < 2e-6
    last = replace(checkpoint, last=True)
    assert all(torch.allclose(last.read(f"model/{n}"), p.detach(), atol=2e-6) for n, p in params.items())
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(used[name])
        expected = float(model(*next(iter(plain.data.validation.batches()))))
    assert validations(tmp_path)[12] == pytest.approx(expected, abs=1e-5)
    assert sorted(validations(tmp_path)) == [3, 6, 9, 11, 12]


@pytest.mark.parametrize(("words", "last"), [([], False), (["--weights", "last"], True)])
def test_the_export_writes_what_was_validated_or_the_last_weights(tmp_path, monkeypatch, words, last):
    from tools import export

    given = []
    trainer(settings(tmp_path / "run", steps=2, average=AverageConfig(start=1))).fit()
    monkeypatch.setattr(export, "export", lambda checkpoint, out, **rest: given.append(checkpoint))
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "run"), str(tmp_path / "out"), *words])
    assert export.main() == 0
    assert [checkpoint.averaged for checkpoint in given] == [0.0 if last else 1.0]


def _run(rank: int, world: int, folder: str, strategy: StrategyConfig) -> None:
    here = World(rank, world, rank, torch.device("cpu"), dist.group.WORLD)
    trainer(settings(folder, strategy=strategy, **AROUND), here).fit()


@pytest.mark.parametrize(
    ("name", "reshard"), [("ddp", True), ("fsdp", True), pytest.param("fsdp", False, marks=pytest.mark.slow)]
)
def test_two_ranks_look_ahead_and_average_as_one_does(tmp_path, name, reshard):
    trainer(settings(tmp_path / "one", **AROUND)).fit()
    run_ranks(_run, 2, str(tmp_path / "two"), StrategyConfig(name, reshard_after_forward=reshard))
    one, two = find_checkpoint(tmp_path / "one"), find_checkpoint(tmp_path / "two")
    for part in ("model/", "lookahead/", "average/"):
        assert one.names(part) == two.names(part) != []
        for key in one.names(part):
            assert torch.allclose(one.read(part + key), two.read(part + key), atol=2e-5), part + key
    a, b = validations(tmp_path / "one"), validations(tmp_path / "two")
    assert a.keys() == b.keys()
    assert max(abs(a[step] - b[step]) for step in a) < 1e-4


def test_it_resumes_exactly_and_a_skipped_step_goes_back(tmp_path):
    changes = AROUND | {"checkpoint": CheckpointConfig(every=2), "safety": SafetyConfig(max_skipped=5)}
    poison = {12 * 6 + 1}
    straight = trainer(settings(tmp_path / "a", **changes), poison=poison)
    straight.fit()
    assert straight.progress.skipped == 1
    first = trainer(settings(tmp_path / "b", **changes), poison=poison)
    interrupt(first, 9)
    second = trainer(settings(tmp_path / "b", **changes), poison=poison)
    second.fit()
    expected = straight.tensors()
    for name, tensor in second.tensors().items():
        assert torch.equal(tensor, expected[name]), name


def test_undo_gives_back_the_bits():
    p = torch.nn.Parameter(torch.randn(5, 3))
    ahead = EmaNesterov({"p": p}, LookaheadConfig(beta=0.5))
    ahead.moves["p"].fill_(0.3)
    before = p.detach().clone()
    ahead.look_ahead(0, 1.0)
    assert torch.equal(p.detach(), before + 0.15 * torch.ones(5, 3))
    ahead.undo()
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lookahead": LookaheadConfig(beta=0.5, start=9, end=3)}, "trainer.lookahead.end is 3, expected null, or a step"),
        ({"average": AverageConfig(start=1, weight=1.5)}, "trainer.average.weight is 1.5, expected a share"),
        ({"average": AverageConfig(start=400)}, "trainer.average.start is 400, expected null, or a step before the last"),
        ({"lookahead": LookaheadConfig(beta=0.5, start=400)}, "trainer.lookahead.start is 400, expected a step before"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        trainer(settings(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lookahead": LookaheadConfig(beta=0.6), "precision": "bf16"}, "would round the look-ahead away"),
        (
            {"lookahead": LookaheadConfig(beta=0.6), "strategy": StrategyConfig("deepspeed", zero_stage=1)},
            "lookahead.beta above 0 with strategy 'deepspeed'",
        ),
        (
            {"average": AverageConfig(start=1), "strategy": StrategyConfig("deepspeed", zero_stage=3)},
            "average.start at ZeRO stage 3 with strategy 'deepspeed'",
        ),
    ],
)
def test_weights_that_it_could_not_move_are_refused(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, **changes).check(1)


def test_an_average_cannot_begin_in_the_middle_of_a_run(tmp_path):
    trainer(settings(tmp_path, steps=2)).fit()
    later = trainer(settings(tmp_path, steps=4, average=AverageConfig(start=1), allow_changes=True))
    with pytest.raises(CheckpointError, match=r"was saved without trainer\.average\.start"):
        later.fit()


def test_an_average_cannot_begin_at_an_earlier_step_than_that_of_the_checkpoint(tmp_path):
    trainer(settings(tmp_path / "run", steps=12, average=AverageConfig(start=6))).fit()
    begin = CheckpointConfig(resume=str(tmp_path / "run" / "checkpoints" / "step-00000004"))
    for start in (4, 2):
        early = settings(tmp_path / f"from {start}", average=AverageConfig(start=start), checkpoint=begin)
        with pytest.raises(CheckpointError, match=f"before its average began, which cannot begin at {start}"):
            trainer(early).fit()
    trainer(settings(tmp_path / "later", average=AverageConfig(start=5), checkpoint=begin)).fit()
