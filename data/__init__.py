"""Corpora, tokenizers, token shards and the loader. Importing the package imports neither torch nor a tokenizer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.baseline import Bigram, bigram_baseline
    from data.config import DataConfig
    from data.loader import Loader, ValidationSet
    from data.open import Data, open_data

__all__ = ["Bigram", "Data", "DataConfig", "Loader", "ValidationSet", "bigram_baseline", "open_data"]
_HOMES = {
    "Bigram": "baseline",
    "bigram_baseline": "baseline",
    "DataConfig": "config",
    "Loader": "loader",
    "ValidationSet": "loader",
    "Data": "open",
    "open_data": "open",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'data' has no attribute {name!r}")
