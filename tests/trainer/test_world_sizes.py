"""The same global batch on any number of ranks that can share it."""

import pytest

from polargrad_dist.errors import ConfigError
from tests.trainer.toy import settings


@pytest.mark.parametrize(
    ("world", "micro", "accumulation"), [(1, 8, 3), (2, 6, 2), (3, 8, 1), (4, 6, 1), (8, 3, 1), (24, 1, 1)]
)
def test_micro_batches_are_divided_anew_and_never_grow(world, micro, accumulation):
    config = settings("unused", global_batch=24, micro_batch=8).for_world(world)
    config.check(world)
    assert (config.micro_batch, config.accumulation(world)) == (micro, accumulation)
    assert config.micro_batch * config.accumulation(world) * world == 24


def test_a_world_that_cannot_share_the_batch_is_told_sizes_that_can():
    with pytest.raises(
        ConfigError,
        match=r"global_batch is 24, which 7 ranks cannot share evenly: start 3 or 4 or 6 or 8 ranks",
    ):
        settings("unused", global_batch=24).for_world(7)
