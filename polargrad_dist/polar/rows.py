"""Row-sparse matrices: an embedding's gradient is zero in every row whose token is not in the batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CompressedRows(NamedTuple):
    """The non-zero rows (k, n) of an m×n matrix, their positions (k,), and m."""

    rows: Tensor
    positions: Tensor
    m: int


def compress_rows(a: Tensor) -> CompressedRows:
    """Leaves out the zero rows of a (m, n). Reads their number back from the device, so it waits for a GPU."""
    # Several times faster than any(), and true for NaN.
    nonzero = (a.amax(1) != 0) | (a.amin(1) != 0)
    positions = nonzero.nonzero().squeeze(1)
    return CompressedRows(a.index_select(0, positions), positions, a.shape[0])


def expand_rows(rows: Tensor, positions: Tensor, m: int) -> Tensor:
    """The m×n matrix with these rows at these positions and zeros elsewhere."""
    return rows.new_zeros(m, rows.shape[1]).index_copy_(0, positions, rows)
