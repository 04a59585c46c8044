"""How a parameter is sharded or replicated, and which parts of it are matrices: pure geometry of shapes, for all ranks.

A *layout* shards a tensor over ranks one mesh dimension after another, as DTensor's ``Shard`` does. Ranks that store the same
elements hold *copies*, and divide them into *optimizer shards*. A *split* says which blocks of a parameter are matrices.
Neither knows process groups or values, so a plan for 512 ranks can be made on a laptop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from polargrad_dist.errors import ConfigError

Box = tuple[tuple[int, int], ...]
"""Half-open ranges, one for each dimension."""


def chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """The half-open range of part ``index`` if ``length`` rows are split as by ``torch.chunk`` and DTensor."""
    size = -(-length // parts)
    return min(length, index * size), min(length, (index + 1) * size)


def volume(box: Box) -> int:
    """The number of elements in a box."""
    return math.prod(last - first for first, last in box)


def overlap(a: Box, b: Box) -> Box:
    """The intersection of ``a`` and ``b``, relative to the beginning of ``a``."""
    out = []
    for (first, last), (low, high) in zip(a, b, strict=True):
        start = min(max(first, low), last)
        out.append((start - first, max(start, min(last, high)) - first))
    return tuple(out)


def slices(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(first, last) for first, last in box)


@dataclass(frozen=True)
class Layout:
    """A tensor of ``shape`` on the ranks of a mesh.

    ``sizes`` are the mesh dimensions: first those that shard the tensor, in the order in which they do, then those that hold
    copies. ``cuts`` gives the tensor dimension that each shards, None for copies. ``cut`` is the dimension along which copies
    are divided into optimizer shards, None if each copy updates all that it stores. Places count the mesh row by row.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    cuts: tuple[int | None, ...] = ()
    cut: int | None = None

    @property
    def world(self) -> int:
        return math.prod(self.sizes)

    @cached_property
    def copies(self) -> int:
        """How many ranks store the same elements; their places are consecutive."""
        return math.prod(size for size, cut in zip(self.sizes, self.cuts, strict=True) if cut is None)

    @property
    def state_cuts(self) -> tuple[int | None, ...]:
        """``cuts`` of the optimizer shards."""
        return tuple(self.cut if cut is None else cut for cut in self.cuts)

    @cached_property
    def stored(self) -> list[Box]:
        """What each place stores."""
        return [self._box(place, self.cuts) for place in range(self.world)]

    @cached_property
    def shards(self) -> list[Box]:
        """The optimizer shard of each place."""
        return [self._box(place, self.state_cuts) for place in range(self.world)]

    def _box(self, place: int, cuts: tuple[int | None, ...]) -> Box:
        box = [(0, size) for size in self.shape]
        stride = self.world
        for size, cut in zip(self.sizes, cuts, strict=True):
            stride //= size
            if cut is not None:
                first, last = box[cut]
                low, high = chunk(last - first, size, place // stride % size)
                box[cut] = (first + low, first + high)
        return tuple(box)

    def counted(self, place: int) -> bool:
        """Whether this place counts its result, rather than another copy that computes the same."""
        return self.cut is not None or place % self.copies == 0

    @cached_property
    def longest(self) -> list[int]:
        """Elements of the longest optimizer shard, among the copies of each block of the tensor."""
        sizes = list(map(volume, self.shards))
        return [max(sizes[first : first + self.copies]) for first in range(0, self.world, self.copies)]

    def gathered(self, place: int) -> int:
        """Elements that a place receives when copies exchange their shards, padded to the longest."""
        if self.copies == 1 or self.cut is None:
            return 0
        return self.copies * self.longest[place // self.copies]


@dataclass(frozen=True)
class Stretches(Layout):
    """A tensor whose elements are split anywhere, in memory order; ``bounds`` are the first and last of each place.

    ``shape`` is (elements,). DeepSpeed's ZeRO splits in this way, also within rows; no place holds copies.
    """

    bounds: tuple[tuple[int, int], ...] = ()

    @cached_property
    def stored(self) -> list[Box]:
        return [(bounds,) for bounds in self.bounds]

    @cached_property
    def shards(self) -> list[Box]:
        return self.stored


@lru_cache(maxsize=4096)
def laid_out(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    cuts: tuple[int | None, ...],
    among: tuple[int, ...],
) -> Layout:
    """The layout that divides copies into optimizer shards along the dimension of ``among`` that divides most evenly.

    Of several such dimensions it takes the first. With an empty ``among`` copies are not divided.
    """
    plain = Layout(shape, sizes, cuts)
    if plain.copies == 1 or not among:
        return plain
    found = [Layout(shape, sizes, cuts, dim) for dim in among]
    return min(found, key=lambda layout: max(layout.longest))


Cut3 = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Split:
    """The matrices of a parameter of ``stack * rows * cols`` elements, each stepped as one.

    ``runs`` splits each of the ``stack`` slices into equal blocks, along its columns if ``transposed``, else along its rows:
    (first, blocks, size of a block). A transposed parameter stores the transposes of its matrices. A ``flattened`` parameter
    is a single matrix of which ranks hold `Stretches`: it is treated as one column of all its elements.
    """

    stack: int
    rows: int
    cols: int
    runs: tuple[tuple[int, int, int], ...]
    stacked: bool = False
    transposed: bool = False
    flattened: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        shape: Sequence[int],
        split_sizes: Sequence[int] | None = None,
        num_heads: int | None = None,
        flatten: bool = False,
        transposed: bool = False,
    ) -> Split:
        """Reads a parameter's shape: 2-D is one matrix, 3-D a stack of experts, more (or ``flatten``) a convolution.

        Raises ``ConfigError`` if the splits do not add up to the rows (``transposed``: columns).
        """
        if len(shape) < 2 or math.prod(shape) == 0:
            raise ConfigError(
                f"{name} has shape {tuple(shape)}, expected a matrix with at least one element: "
                "pass the model itself, whose modules tell what is a matrix, or put this parameter into a group with "
                "algorithm 'adamw'"
            )
        stack, rows, cols = (1, shape[0], math.prod(shape[1:])) if flat(shape, flatten) else tuple(shape)
        if split_sizes and num_heads:
            raise ConfigError(f"{name}: split_sizes and num_heads are both set, expected at most one of them")
        length, what = (cols, "columns") if transposed else (rows, "rows")
        if num_heads:
            if length % num_heads:
                raise ConfigError(
                    f"{name} has num_heads={num_heads}, expected a divisor of its {length} {what}"
                )
            split_sizes = (length // num_heads,) * num_heads
        sizes = tuple(split_sizes or (length,))
        if sum(sizes) != length or min(sizes) < 1:
            raise ConfigError(
                f"{name} has split_sizes {sizes}, which add up to {sum(sizes)}, expected its {length} {what}"
            )
        runs: list[tuple[int, int, int]] = []
        first = 0
        for size in sizes:
            if runs and runs[-1][2] == size:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, size)
            else:
                runs.append((first, 1, size))
            first += size
        return cls(stack, rows, cols, tuple(runs), not flat(shape, flatten), transposed)

    @cached_property
    def matrices(self) -> list[Cut3]:
        """Each matrix as ranges of (slice, row, column), in the order of the parameter's elements."""
        if self.flattened:
            return [((0, 1), (0, self.rows * self.cols), (0, 1))]
        blocks = [
            (first + i * size, first + (i + 1) * size)
            for first, count, size in self.runs
            for i in range(count)
        ]
        if self.transposed:
            return [((s, s + 1), (0, self.rows), block) for s in range(self.stack) for block in blocks]
        return [((s, s + 1), block, (0, self.cols)) for s in range(self.stack) for block in blocks]

    def stored_shape(self, matrix: int) -> tuple[int, int]:
        """(rows, columns) of a matrix as the parameter stores it."""
        if self.flattened:
            return self.rows, self.cols
        _, (top, bottom), (left, right) = self.matrices[matrix]
        return bottom - top, right - left


def rectangle(box: Box, shape: Sequence[int], stacked: bool) -> Cut3:
    """A box of a tensor as ranges of (slice, row, column): 3-D if ``stacked``, else the first dimension by all others.

    A range of elements, whatever the shape, is a range of rows of one column.
    """
    if stacked:
        return box[0], box[1], box[2]
    if len(shape) < 2 or len(box) == 1:
        return (0, 1), box[0] if shape else (0, 1), (0, 1)
    inner = math.prod(shape[2:])
    left, right = box[1]
    return (0, 1), box[0], (left * inner, right * inner)


def flat(shape: Sequence[int], flatten: bool) -> bool:
    """Whether a parameter is one matrix, its first dimension by all others."""
    return len(shape) != 3 or flatten


def cuttable(shape: Sequence[int], flatten: bool) -> tuple[int, ...]:
    """The dimensions along which a matrix parameter may be sharded such that each part is a rectangle."""
    return (0, 1) if flat(shape, flatten) else (0, 1, 2)
