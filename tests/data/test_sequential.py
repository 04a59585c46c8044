"""Shards in the batch order of modded-nanoGPT's loaders, against its description read aloud."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import Tokens
from data.sequential import SequentialLoader
from polargrad_dist.errors import DataError

T = 4


def loader(sizes, batch=6, micro=2, rank=0, world=1):
    ends = np.cumsum(sizes)
    shards = [np.arange(end - size, end, dtype=np.uint16) for end, size in zip(ends, sizes, strict=True)]
    return SequentialLoader(Tokens(shards), T, batch, micro, rank, world, 0, 0)


def described(sizes, batch, rank, world, steps):
    """Positions of the tokens of each step: while a batch and two tokens are left of a shard it is read on, else the next."""
    size, out, shard, pos = batch * T, [], 0, 0
    firsts = np.concatenate([[0], np.cumsum(sizes)])
    share = size // world
    for _ in range(steps):
        while pos + size + 1 >= sizes[shard % len(sizes)]:
            shard, pos = shard + 1, 0
        first = firsts[shard % len(sizes)] + pos + rank * share
        out.append(np.arange(first, first + share + 1))
        pos += size
    return out


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(26, 130), min_size=1, max_size=4), st.sampled_from([1, 3]), st.integers(0, 9))
def test_every_rank_reads_the_tokens_that_the_description_says(sizes, world, start):
    for rank in range(world):
        made = loader(sizes, rank=rank, world=world)
        batches = made.batches(start)
        for expected in described(sizes, 6, rank, world, start + 5)[start:]:
            pairs = [next(batches) for _ in range(6 // world // 2)]
            tokens = np.concatenate([pair[0].numpy().ravel() for pair in pairs])
            targets = np.concatenate([pair[1].numpy().ravel() for pair in pairs])
            assert tokens.tolist() == expected[:-1].tolist()
            assert targets.tolist() == expected[1:].tolist()


def test_the_batch_is_part_of_what_a_sample_means_and_short_shards_are_refused():
    assert loader([60]).fingerprint()["order"] == "sequential"
    assert loader([60], batch=6).fingerprint() != loader([60], batch=12).fingerprint()
    with pytest.raises(DataError, match=r"too few for one batch of 24 and two more"):
        loader([25, 20])
