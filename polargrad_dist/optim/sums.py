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

    def places(self, matrices: Sequence[tuple[Entry, int]]) -> Tensor:
        """Where the sums of these matrices lie, int64; to be kept, since it is made on the host."""
        found = [self.rows[e.key, i] for e, i in matrices]
        return torch.tensor(found, dtype=torch.int64, device=self.values.device)

    def add(self, places: Tensor, values: Tensor) -> None:
        """Adds what lies here of the matrices at these places: (matrices, 3)."""
        self.values[places] += values.to(self.values)

    def add_nuclear(self, entry: Entry, norms: Tensor) -> None:
        """Adds the scaled nuclear norms of matrices that are owned here."""
        if self.counted[entry.name] == entry.key:
            self.values[self.rows[entry.role, 0], 0] += norms.sum().to(self.values)

    def nuclear(self, role: str) -> Tensor:
        """What a role's scaled nuclear norms add up to, 0-d."""
        return self.values[self.rows[role, 0], 0]
