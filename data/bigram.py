"""A smoothed bigram model of the same tokens: the first loss that a language model has to beat.

Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999, section 2.7) with one discount of 0.75, its unigram
level interpolated with the uniform distribution likewise, so that every token has a probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from polargrad_dist.errors import DataError

DISCOUNT = 0.75


@dataclass(frozen=True)
class Bigram:
    """The bigram model's cross-entropy on the validation targets; bits per byte where the text's bytes are known."""

    bits_per_token: float
    bits_per_byte: float | None


def measure_bigram(data: Any, *, max_train_tokens: int = 20_000_000) -> Bigram:
    """Counts the first training tokens of ``data`` (see `data.Data`) and measures its validation targets."""
    tokens = data.train.tokens
    if data.validation is None:
        raise DataError(
            "the data have no validation set, expected one to measure a bigram model on: set data.validation_fraction"
        )
    counted, targets = tokens.read(0, min(len(tokens), max_train_tokens)), data.validation.targets()
    vocab_size = data.vocab_size or int(max(counted.max(), targets.max())) + 1
    bits = cross_entropy(counted, targets, vocab_size)
    per_byte = bits / data.validation.bytes_per_token if data.validation.bytes_per_token else None
    return Bigram(bits, per_byte)


def cross_entropy(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Mean bits of each token of ``held_out`` after the first, given the one before it, under counts of ``train``."""
    train, held_out = train.astype(np.int64), held_out.astype(np.int64)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    before, after = np.divmod(pairs, vocab_size)
    followed = np.bincount(before, weights=counts, minlength=vocab_size)
    kinds_after = np.bincount(before, minlength=vocab_size)
    kinds_before = np.bincount(after, minlength=vocab_size)

    spread = DISCOUNT * np.count_nonzero(kinds_before) / len(pairs)
    unigram = np.maximum(kinds_before - DISCOUNT, 0) / len(pairs) + spread / vocab_size

    a, b = held_out[:-1], held_out[1:]
    wanted = a * vocab_size + b
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place], 0)
    total = np.maximum(followed[a], 1)
    known = followed[a] > 0
    probability = np.where(
        known,
        np.maximum(seen - DISCOUNT, 0) / total + DISCOUNT * kinds_after[a] / total * unigram[b],
        unigram[b],
    )
    return float(-np.log(probability).mean() / math.log(2))
