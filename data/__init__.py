"""Corpora, tokenizers, token shards and the loader. Importing the package imports neither torch nor tokenizers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.bigram import Bigram, measure_bigram
    from data.config import DataConfig
    from data.dataset import Data, open_data
    from data.loader import Loader, ValidationSet

__all__ = ["Bigram", "Data", "DataConfig", "Loader", "ValidationSet", "measure_bigram", "open_data"]
_HOMES = {
    "Bigram": "bigram",
    "measure_bigram": "bigram",
    "DataConfig": "config",
    "Loader": "loader",
    "ValidationSet": "loader",
    "Data": "dataset",
    "open_data": "dataset",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'data' has no attribute {name!r}")
