"""HellaSwag's multiple choice (Zellers et al. 2019): which ending does the model find likeliest?

Text, tokens and normalization are those of the LM evaluation harness, so that figures can be compared with published ones.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polargrad_dist.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """A context, its possible endings, and the index of the correct one."""

    context: str
    endings: tuple[str, ...]
    label: int


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """The first questions of a file of JSON lines. Raises ``ConfigError`` naming an invalid line."""
    found: list[Question] = []
    try:
        with open(Path(path).expanduser(), encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(found) == limit:
                    break
                if line.strip():
                    found.append(_question(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(
            f"trainer.evaluation.hellaswag is {path!r}, which cannot be read ({reason}): expected JSON lines"
        ) from error
    if not found:
        raise ConfigError(f"trainer.evaluation.hellaswag is {path!r}, which is empty: expected JSON lines")
    return found


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
        two = "ctx_a" in record
        text = record["ctx_a"] + " " + record["ctx_b"].capitalize() if two else record["ctx"]
        if "activity_label" in record:
            text = f"{record['activity_label']}: {text}"
        endings = tuple(_plain(ending) for ending in record["endings"])
        question = Question(_plain(text), endings, int(record["label"]))
        if not all(endings) or not 0 <= question.label < len(endings):
            raise ValueError(f"label {question.label} of {len(endings)} endings, none of them empty")
        return question
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"trainer.evaluation.hellaswag: {where} is not a question ({type(error).__name__}: {error}), expected an "
            "object with ctx (or ctx_a and ctx_b), endings and label"
        ) from error


def _plain(text: str) -> str:
    """Removes the remains of WikiHow's markup."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def encode_pair(tokenizer: Any, context: str, ending: str) -> tuple[list[int], list[int]]:
    """The tokens of context and ending, split from those of the whole text; spaces between them belong to the ending."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, ending = context[:-spaces], context[-spaces:] + ending
    whole, start = tokenizer.encode(context + ending), tokenizer.encode(context)
    return start, whole[len(start) :]


def score(
    logits_of: Callable[[torch.Tensor], torch.Tensor], question: Question, tokenizer: Any, limit: int | None
) -> tuple[bool, bool]:
    """Whether the correct ending is the likeliest, and the likeliest per character.

    logits_of: (B, T) int64 tokens on the CPU -> logits (B, T, V). limit: the longest sequence; longer ones are truncated at
    the start. An empty context is the tokenizer's end-of-text token, as in the harness. An ending without a token that could
    be predicted is never the likeliest.
    """
    marker = getattr(getattr(tokenizer, "info", None), "end_of_text", None)
    rows = []
    for ending in question.endings:
        start, end = encode_pair(tokenizer, question.context, " " + ending)
        if not start and marker is not None:
            start = [marker]
        whole = (start + end)[-(limit + 1) :] if limit is not None else start + end
        rows.append((whole, min(len(end), len(whole) - 1)))
    length = max(2, *(len(whole) for whole, _ in rows)) - 1
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, (whole, _) in zip(tokens, rows, strict=True):
        given = whole[:-1]
        row[: len(given)] = torch.tensor(given, dtype=torch.int64)
    logits = logits_of(tokens)
    likelihoods = []
    for row, (whole, count) in zip(logits, rows, strict=True):
        if count < 1:
            likelihoods.append(-math.inf)
            continue
        steps = row[len(whole) - 1 - count : len(whole) - 1].float().log_softmax(-1)
        targets = torch.tensor(whole[-count:], device=steps.device)
        likelihoods.append(float(steps.gather(1, targets[:, None]).sum()))
    lengths = [len(ending) for ending in question.endings]
    normed = [value / size for value, size in zip(likelihoods, lengths, strict=True)]
    best, best_normed = (max(range(len(rows)), key=values.__getitem__) for values in (likelihoods, normed))
    return best == question.label, best_normed == question.label
