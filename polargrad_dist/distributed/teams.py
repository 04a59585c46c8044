"""The ranks that store a parameter, as process groups and device meshes: read from a DTensor, or from the default group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from polargrad_dist.distributed.layout import Layout
from polargrad_dist.distributed.plan import index_of
from polargrad_dist.distributed.transport import group_of_its_ranks
from polargrad_dist.errors import ConfigError


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, as a view."""
    return x.to_local() if isinstance(x, DTensor) else x


@dataclass(frozen=True)
class Placing:
    """A parameter's placement on a mesh: `Layout`'s sizes and cuts, the global rank of each place, and the mesh."""

    sizes: tuple[int, ...] = ()
    cuts: tuple[int | None, ...] = ()
    ranks: tuple[int, ...] = (0,)
    mesh: DeviceMesh | None = field(default=None, compare=False)
    dims: tuple[int, ...] = field(default=(), compare=False)


def placing(name: str, p: torch.Tensor, group: dist.ProcessGroup | None) -> Placing:
    """The placement of ``p``: a DTensor's own; any other tensor is copied on the ranks of ``group``.

    Raises ``ConfigError`` for placements that cannot be stepped.
    """
    if not isinstance(p, DTensor):
        if group is None or group.size() == 1:
            return Placing(ranks=(dist.get_rank() if dist.is_available() and dist.is_initialized() else 0,))
        return Placing((group.size(),), (None,), tuple(dist.get_process_group_ranks(group)))
    mesh, placements = p.device_mesh, tuple(p.placements)
    dims = [dim for dim, size in enumerate(mesh.shape) if size > 1]
    for dim in dims:
        _check(name, placements, dim, mesh)
    # DTensor applies strided shards last: FSDP2 shards what tensor parallelism, a later mesh dimension, has sharded.
    dims.sort(
        key=lambda dim: (isinstance(placements[dim], Replicate), isinstance(placements[dim], _StridedShard))
    )
    cuts = tuple(_cut(placements[dim], p.ndim) for dim in dims)
    ordered = mesh.mesh.permute(*dims, *(d for d in range(mesh.ndim) if d not in dims)).flatten()
    found = Placing(tuple(mesh.shape[dim] for dim in dims), cuts, tuple(ordered.tolist()), mesh, tuple(dims))
    if mesh.get_coordinate() is not None:
        box = Layout(tuple(p.shape), found.sizes, cuts).stored[index_of(found.ranks)[dist.get_rank()]]
        expected = tuple(last - first for first, last in box)
        if expected != tuple(p.to_local().shape):
            raise ConfigError(
                f"{name} stores {tuple(p.to_local().shape)} here, expected {expected} for its placements {placements}: shard "
                "it with fully_shard or parallelize_module"
            )
    return found


def _cut(placement: Placement, ndim: int) -> int | None:
    return None if isinstance(placement, Replicate) else placement.dim % ndim  # type: ignore[attr-defined]


def _check(name: str, placements: tuple[Placement, ...], dim: int, mesh: DeviceMesh) -> None:
    here = placements[dim]
    if isinstance(here, Replicate) or (isinstance(here, Shard | _StridedShard) and here.dim in (0, 1)):
        if not isinstance(here, _StridedShard):
            return
        later = [placements[d] for d in range(dim + 1, mesh.ndim) if mesh.shape[d] > 1]
        factor = 1
        for d in range(dim + 1, mesh.ndim):
            if isinstance(placements[d], Shard) and placements[d].dim == here.dim:  # type: ignore[attr-defined]
                factor *= mesh.shape[d]
        if factor == here.split_factor and not any(isinstance(other, _StridedShard) for other in later):
            return
    raise ConfigError(
        f"{name} is placed as {placements} on a {mesh.ndim}-D mesh, expected Replicate, Shard(0) or Shard(1) in each mesh "
        "dimension: shard it with fully_shard or parallelize_module"
    )


@dataclass(eq=False)
class Team:
    """The ranks that store a parameter; ``place`` is this rank's place in the layout.

    ``group`` has all of them, ``copies`` those that store the same elements; None if that is this rank alone.
    """

    found: Placing
    place: int
    group: dist.ProcessGroup | None
    copies: dist.ProcessGroup | None
    device_type: str

    @cached_property
    def order(self) -> list[int]:
        """The place of each rank of ``group``."""
        assert self.group is not None
        places = index_of(self.found.ranks)
        return [places[rank] for rank in dist.get_process_group_ranks(self.group)]

    @cached_property
    def copy_order(self) -> list[int]:
        """The place of each rank of ``copies``."""
        assert self.copies is not None
        places = index_of(self.found.ranks)
        return [places[rank] for rank in dist.get_process_group_ranks(self.copies)]

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The mesh with its dimensions in the order of the layout, on which optimizer shards are plain ``Shard``."""
        found = self.found
        if found.mesh is None:
            assert self.group is not None
            return DeviceMesh.from_group(self.group, self.device_type)
        if found.dims == tuple(range(found.mesh.ndim)):
            return found.mesh
        groups = [found.mesh.get_group(dim) for dim in found.dims]
        if len(groups) == 1:
            return DeviceMesh.from_group(groups[0], self.device_type)
        ranks = torch.tensor(found.ranks, device="cpu").view(found.sizes)
        names = tuple(f"cut{i}" for i in range(len(groups)))
        return DeviceMesh.from_group(groups, self.device_type, mesh=ranks, mesh_dim_names=names)

    def state(
        self, here: torch.Tensor, layout: Layout, p: torch.Tensor, extra: Sequence[int] = ()
    ) -> torch.Tensor:
        """This rank's part of a state, as a DTensor over the optimizer shards of ``p``; a plain tensor if all of it is here.

        ``extra`` are dimensions of the state in addition to those of the parameter.
        """
        if layout.world == 1 or (
            layout.copies == layout.world and layout.cut is None and not isinstance(p, DTensor)
        ):
            return here
        shape = (*layout.shape, *extra)
        if layout.copies == 1 or layout.cut is None:
            assert isinstance(p, DTensor)
            return dtensor(here, p.device_mesh, p.placements, shape)
        return dtensor(here, self.mesh, [Shard(cut) for cut in layout.state_cuts if cut is not None], shape)

    def stacked(self, here: torch.Tensor, count: int) -> torch.Tensor:
        """A stack of ``count`` entries, of which each rank keeps its part, as a DTensor sharded along the first dimension."""
        if self.group is None:
            return here
        mesh = DeviceMesh.from_group(self.group, self.device_type)
        return dtensor(here, mesh, [Shard(0)], (count, *here.shape[1:]))


def dtensor(here: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Any], shape: Sequence[int]) -> DTensor:
    """A DTensor of a global shape from this rank's part, without a collective."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    out = DTensor.from_local(
        # A DTensor made from a view into a larger buffer cannot be deep-copied: torch takes its offset for an address.
        here.as_strided(here.shape, here.stride(), 0),
        mesh,
        list(placements),
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(strides[: len(shape)]),
    )
    out._local_tensor = here
    return out


class Groups:
    """Process groups by their ranks: existing ones, or new ones, which all their ranks must request in one order."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def learn(self, found: Placing, given: dist.ProcessGroup | None) -> None:
        """Registers the groups of a parameter's mesh."""
        if given is not None:
            self._known.setdefault(tuple(sorted(dist.get_process_group_ranks(given))), given)
        if dist.is_available() and dist.is_initialized() and dist.group.WORLD is not None:
            self._known.setdefault(tuple(range(dist.get_world_size())), dist.group.WORLD)
        if found.mesh is not None and found.mesh.get_coordinate() is not None:
            for dim in found.dims:
                group = found.mesh.get_group(dim)
                self._known.setdefault(tuple(sorted(dist.get_process_group_ranks(group))), group)

    def of(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """The group of these ranks; None for a single rank."""
        key = tuple(sorted(ranks))
        if len(key) == 1:
            return None
        if key not in self._known:
            self._known[key] = group_of_its_ranks(list(key))
        return self._known[key]


def widest(found: Sequence[Placing], given: dist.ProcessGroup | None) -> tuple[int, ...]:
    """The ranks that must agree: those of the widest mesh if it contains all others, else all ranks."""
    sets = {frozenset(placing.ranks) for placing in found}
    if given is not None:
        sets.add(frozenset(dist.get_process_group_ranks(given)))
    union = frozenset().union(*sets)
    if union in sets:
        return tuple(sorted(union))
    return tuple(range(dist.get_world_size()))
