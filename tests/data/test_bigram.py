import itertools
import math

import numpy as np
import pytest

from data import measure_bigram, open_data
from data.bigram import DISCOUNT, cross_entropy
from tests.data.corpus import config, json_lines, quiet, texts


def by_hand(train: list[int], previous: int, token: int, vocab_size: int) -> float:
    """Interpolated Kneser-Ney straight from its definition, one probability at a time."""
    pairs = list(itertools.pairwise(train))
    kinds = set(pairs)
    continuation = sum(1 for _, b in kinds if b == token)
    spread = DISCOUNT * len({b for _, b in kinds}) / len(kinds)
    unigram = max(continuation - DISCOUNT, 0) / len(kinds) + spread / vocab_size
    total = sum(1 for a, _ in pairs if a == previous)
    if total == 0:
        return unigram
    seen = sum(1 for pair in pairs if pair == (previous, token))
    followers = sum(1 for a, _ in kinds if a == previous)
    return max(seen - DISCOUNT, 0) / total + DISCOUNT * followers / total * unigram


def test_every_probability_is_the_definitions_and_they_sum_to_one():
    vocab_size, train = 7, [0, 1, 2, 1, 2, 3, 1, 2, 0, 4, 4, 4, 1, 0, 5]
    for previous in range(vocab_size):
        probabilities = []
        for token in range(vocab_size):
            bits = cross_entropy(np.array(train), np.array([previous, token]), vocab_size)
            assert 2**-bits == pytest.approx(by_hand(train, previous, token, vocab_size), rel=1e-12)
            probabilities.append(2**-bits)
        assert sum(probabilities) == pytest.approx(1, rel=1e-12)


def test_a_bigram_source_is_modelled_to_its_entropy():
    rng = np.random.default_rng(0)
    vocab_size = 16
    steps = rng.choice(4, 200_000, p=[0.5, 0.25, 0.125, 0.125])
    tokens = np.cumsum(steps) % vocab_size
    assert cross_entropy(tokens[:150_000], tokens[150_000:], vocab_size) == pytest.approx(1.75, abs=0.01)
    shuffled = rng.permutation(tokens)
    assert cross_entropy(shuffled[:150_000], shuffled[150_000:], vocab_size) == pytest.approx(4, abs=0.01)


def test_bits_per_byte_divide_the_bits_by_the_bytes_of_the_text(tmp_path):
    data = open_data(
        config(tmp_path, json_lines(tmp_path / "a.jsonl", texts(600))),
        sequence_length=16,
        global_batch=4,
        micro_batch=1,
        report=quiet,
    )
    found = measure_bigram(data)
    assert found.bits_per_byte == pytest.approx(found.bits_per_token / data.validation.bytes_per_token)
    assert 0.1 < found.bits_per_byte < 8
    assert found.bits_per_token < math.log2(data.vocab_size)
