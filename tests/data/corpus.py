"""Small corpora and configurations that the data tests share. The words repeat, so that a small BPE learns merges."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from data.config import DataConfig, TokenizerConfig

WORDS = [
    f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "rø", "日本", "🙂") for b in ("", "ra", "sta", "ting")
]


def texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) + "\n" for _ in range(count)]


def json_lines(path: Path, documents: list[str]) -> Path:
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def config(folder: Path, *paths: Path, **fields: Any) -> DataConfig:
    """Files of ``paths``, a BPE of 300 entries, prepared below ``folder``."""
    return DataConfig(
        **{
            "source": "files",
            "paths": [str(path) for path in paths],
            "tokenizer": TokenizerConfig(vocab_size=300),
            "validation_fraction": 0.1,
            "cache": str(folder / "cache"),
            "workers": 2,
        }
        | fields
    )


def quiet(_: str) -> None:
    """A report that says nothing."""
