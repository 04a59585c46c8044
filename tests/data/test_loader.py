import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import Loader, Tokens, ValidationSet, permutation
from polargrad_dist.errors import ConfigError, DataError

T = 8


def stream(count=1000, cuts=(301, 302, 700)):
    """Tokens 0, 1, 2, … in four shards, so that a token is its own position."""
    return Tokens(np.split(np.arange(count, dtype=np.uint16), cuts))


def loader(tokens=None, batch=12, micro=3, rank=0, world=1, seed=0, prefetch=0, length=T):
    return Loader(tokens or stream(), length, batch, micro, rank, world, seed, prefetch)


def take(batches, count):
    out = [next(batches) for _ in range(count)]
    getattr(batches, "close", lambda: None)()
    return out


@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_every_epoch_visits_every_window_once(size, key):
    order = permutation(np.arange(size), size, key)
    assert sorted(order.tolist()) == list(range(size))


@given(st.integers(1, 10**12), st.integers(0, 2**40), st.data())
@settings(max_examples=30)
def test_the_order_needs_no_table_and_does_not_depend_on_what_is_asked_together(size, key, data):
    asked = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    together = permutation(np.array(asked), size, key)
    assert together.tolist() == [int(permutation(np.array([i]), size, key)[0]) for i in asked]
    assert all(0 <= i < size for i in together)


def test_the_order_is_shuffled_and_changes_with_seed_and_epoch():
    size = 10_000
    order = permutation(np.arange(size), size, 1)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert (order == permutation(np.arange(size), size, 2)).sum() < 10
    one = loader(seed=0)
    n = one.num_samples
    first, second = (one.windows(np.arange(n) + epoch * n) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n))
    assert (first == second).sum() < n / 10
    assert (first == loader(seed=1).windows(np.arange(n))).sum() < n / 10


def test_the_order_of_a_seed_never_changes_between_versions():
    # A resumed run relies on it: a change here must come with a way to keep old runs going.
    assert permutation(np.arange(10), 10, 0).tolist() == [9, 0, 4, 3, 6, 7, 5, 8, 2, 1]
    assert loader().windows(np.arange(120, 126)).tolist() == [117, 15, 57, 113, 77, 114]


def test_a_sample_is_consecutive_tokens_over_shard_boundaries_with_the_next_ones_as_targets():
    one = loader()
    for tokens, targets in take(one.batches(), 3 * one.steps_per_epoch):
        assert tokens.shape == targets.shape == (3, T)
        starts = tokens[:, :1]
        assert (starts % T == 0).all()
        assert (tokens == starts + torch.arange(T)).all()
        assert (targets == tokens + 1).all()
        assert tokens.is_contiguous()
        assert targets.is_contiguous()


@pytest.mark.parametrize("prefetch", [0, 1, 7])
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3)])
def test_the_global_batch_of_a_step_is_the_same_for_every_world_micro_batch_and_prefetch(
    world, micro, prefetch
):
    # Into the second epoch
    steps = 12
    expected = np.concatenate([t.numpy() for t, _ in take(loader(micro=12).batches(), steps)])
    per_rank = [
        np.concatenate([t.numpy() for t, _ in take(ranked.batches(), steps * 12 // (world * micro))]).reshape(
            steps, 12 // world, T
        )
        for ranked in (loader(micro=micro, rank=r, world=world, prefetch=prefetch) for r in range(world))
    ]
    assert (np.concatenate(per_rank, axis=1).reshape(-1, T) == expected).all()


def test_sample_indices_of_all_ranks_are_each_index_once():
    seen = [loader(rank=r, world=4).sample_indices(step) for step in range(5) for r in range(4)]
    assert np.concatenate(seen).tolist() == list(range(60))


def test_starting_at_a_step_or_a_sample_gives_what_the_straight_run_gave_there():
    straight = take(loader(micro=12).batches(), 20)
    resumed = take(loader(micro=12, prefetch=3).batches(start_step=13), 7)
    assert all(
        (a == b).all()
        for one, two in zip(straight[13:], resumed, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    other_batch = take(loader(batch=6, micro=6).batches_from(13 * 12), 14)
    assert (
        np.concatenate([t for t, _ in other_batch]) == np.concatenate([t for t, _ in straight[13:]])
    ).all()


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_closing_or_dropping_the_iterator_ends_its_thread():
    batches = loader(prefetch=2).batches()
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(batches)
    batches = loader(prefetch=2).batches()
    next(batches)
    del batches
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads()


def test_an_error_in_the_background_reaches_the_training_loop():
    class Failing(Tokens):
        def read(self, first, count):
            raise OSError("the disk went away")

    batches = loader(Failing(stream().shards), prefetch=2).batches()
    with pytest.raises(OSError, match="the disk went away"):
        next(batches)


def test_impossible_batches_and_sequences_are_refused_in_words():
    with pytest.raises(ConfigError, match=r"global batch is 12, expected a multiple of .* 5 x 3"):
        loader(world=5)
    with pytest.raises(DataError, match=r"1,000 tokens, too few for one sequence of 1000"):
        loader(length=1000)
    assert loader(length=999).num_samples == 1


@pytest.mark.parametrize("targets", [1, 7, 8, 9, 100, 999])
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 5)])
def test_validation_covers_the_same_targets_exactly_once_at_every_world_size(world, micro, targets):
    seen, batches = [], set()
    for rank in range(world):
        made = list(ValidationSet(stream(), T, micro, rank, world, targets, None).batches())
        batches.add(len(made))
        for tokens, wanted in made:
            assert tokens.shape == wanted.shape == (micro, T)
            real = wanted != -100
            assert (wanted[real] == tokens[real] + 1).all()
            seen += wanted[real].tolist()
    assert sorted(seen) == list(range(1, targets + 1))
    # Ranks make the same number of calls, or their collectives would not match
    assert len(batches) == 1
