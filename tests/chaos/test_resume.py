"""A run that was stopped, killed, spread over more ranks or sharded otherwise goes on as if nothing had been."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from polargrad_dist.trainer.signals import PREEMPTED
from polargrad_dist.trainer.world import World
from tests.chaos.harness import assert_same_end, chaos, final_state, records
from tests.chaos.program import GLOBAL_BATCH, Options, run
from tests.gloo import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def life(rank, world, options):
    return run(
        Options(**options), World(rank, world, rank, torch.device("cpu"), dist.new_group(backend="gloo"))
    )


def live(world, run_dir, **options):
    return run_ranks(life, world, options | {"run_dir": str(run_dir)})


@pytest.mark.parametrize(
    ("strategy", "world", "asynchronous"),
    [
        pytest.param("ddp", 1, False, marks=pytest.mark.slow),
        ("ddp", 2, True),
        ("fsdp", 2, False),
        pytest.param("fsdp", 2, True, marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_a_kill_and_forty_more_are_sixty_bit_for_bit(tmp_path, strategy, world, asynchronous):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    options = {"strategy": strategy, "asynchronous": asynchronous}
    assert live(world, straight, **options) == [0] * world
    with pytest.raises(AssertionError, match=r"died with exit code -9|by peer"):
        live(world, killed, kill_at=33, **options)
    assert final_state(killed)[0] == 20
    assert live(world, killed, **options) == [0] * world
    assert len(records(killed)) == 60
    assert_same_end(killed, straight)


def test_the_comparison_would_see_a_lost_generator(tmp_path):
    """What makes the test above mean something: without the generators' states, dropout changes the end."""
    straight, other = tmp_path / "straight", tmp_path / "other"
    live(1, straight, steps=8, every=4)
    live(1, other, steps=8, every=4, leave_at=3)
    for file in (other / "checkpoints").glob("step-*/manifest.json"):
        body = json.loads(file.read_bytes())
        # So that the generators are taken for those of another world, and start anew
        body["world_size"] = 2
        file.write_text(json.dumps(body))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        file.with_suffix(".sha256").write_text(f"{digest}  manifest.json\n")
    live(1, other, steps=8, every=4)
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same_end(other, straight)


@pytest.mark.parametrize(
    "lives",
    [
        pytest.param([("ddp", 1, 6), ("ddp", 2, 12), ("ddp", 4, 18), ("ddp", 3, 24)], id="world size"),
        pytest.param(
            [("ddp", 2, 6), ("fsdp", 2, 12), ("ddp", 2, 18), ("fsdp", 3, 24)],
            id="ddp and fsdp",
            marks=pytest.mark.slow,
        ),
        pytest.param([("fsdp", 2, 8), ("hsdp", 4, 16), ("ddp", 1, 24)], id="hsdp"),
    ],
)
def test_no_sample_is_lost_or_repeated_when_ranks_and_strategy_change(tmp_path, lives):
    straight, changed, steps = tmp_path / "straight", tmp_path / "changed", 24
    assert live(1, straight, steps=steps, every=6, dropout=0.0) == [0]
    for strategy, world, until in lives:
        last = until == steps
        # SIGTERM to rank 0 alone, within the step before: all agree to save and leave.
        leave_at = -1 if last else until - 1
        codes = live(
            world, changed, strategy=strategy, steps=steps, every=1000, dropout=0.0, leave_at=leave_at
        )
        assert codes == [0 if last else PREEMPTED] * world
        assert final_state(changed)[0] == until
    seen = Counter()
    for file in changed.glob("samples-*.txt"):
        for line in file.read_text().splitlines():
            step, index = map(int, line.split())
            assert step == index // GLOBAL_BATCH
            seen[index] += 1
    assert seen == Counter(range(steps * GLOBAL_BATCH))
    expected = records(straight)
    assert records(changed).keys() == expected.keys()
    for step, (loss, norm) in records(changed).items():
        assert loss == pytest.approx(expected[step][0], abs=1e-4)
        assert norm == pytest.approx(expected[step][1], rel=1e-3)


@pytest.mark.slow
def test_three_kills_at_random_moments_leave_no_trace(tmp_path):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    report = chaos(tmp_path, 3, seed)
    assert sum(report.kills.values()) == 3
