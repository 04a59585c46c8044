"""What the steps of several matrices, or of one matrix's shards, need of each other: added up once, between two phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polargrad_dist.distributed.plan import SUMS, Entry


class Sums:
    """|W|^2, <W, S> and |S|^2 of every matrix W and its step S that wait for them, and each role's nuclear norms.

    ``rows`` says where (`plan.sum_rows`), ``counted`` which entry of a name counts: experts on several meshes are copies.
    """

    def __init__(self, rows: dict[tuple[Any, int], int], counted: dict[str, Any], device: torch.device):
        self.rows, self.counted = rows, counted
        self.values = torch.zeros(len(rows), SUMS, dtype=torch.float64, device=device)

    def add(self, entries: Sequence[tuple[Entry, int]], values: Tensor) -> None:
        """Adds what lies here of these matrices: (matrices, 3)."""
        if entries:
            self.values[[self.rows[e.key, i] for e, i in entries]] += values.to(self.values)

    def add_nuclear(self, entry: Entry, norms: Tensor) -> None:
        """Adds the scaled nuclear norms of matrices that are owned here."""
        if self.counted[entry.name] == entry.key:
            self.values[self.rows[entry.role, 0], 0] += norms.sum().to(self.values)

    def of(self, entries: Sequence[tuple[Entry, int]]) -> tuple[Tensor, Tensor]:
        """The sums of these matrices, (matrices, 3), and what their role's nuclear norms add up to, 0-d."""
        role = self.values[self.rows[entries[0][0].role, 0], 0]
        return self.values[[self.rows[e.key, i] for e, i in entries]], role
