"""The loss of a bigram model on a run's own data, stored in its ``run.json``: the first loss to beat."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from data import measure_bigram
from polargrad_dist.trainer import header
from tools.runs import data_of


def measure(folder: Path, data: Any = None) -> dict[str, float | None]:
    """``loss`` in nats per token and ``bits_per_byte`` of interpolated Kneser-Ney on the run's tokens; measured once per run.

    data: the run's data; None opens them, and prepares them if necessary. Raises ``DataError`` for a run without
    validation data.
    """
    known = header.read_facts(folder).get("bigram")
    if isinstance(known, dict) and {"loss", "bits_per_byte"} <= known.keys():
        return known
    found = measure_bigram(data_of(folder) if data is None else data)
    figures = {"loss": found.bits_per_token * math.log(2), "bits_per_byte": found.bits_per_byte}
    header.note(folder, bigram=figures)
    return figures
