"""Where a parameter lives: a rectangle of replicas x shards ranks, and this rank's place on it.

DDP is W x 1, FSDP2 1 x W, HSDP R x S, a single process 1 x 1; the optimizer's step is written once, for the rectangle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from polargrad_dist.distributed.plan import chunk
from polargrad_dist.errors import ConfigError


@dataclass(frozen=True)
class Grid:
    """``replicate`` joins the ranks that hold the same shard, ``sharding`` those that share one replica.

    Either is None where that is this rank alone.
    """

    replicas: int = 1
    shards: int = 1
    replica: int = 0
    shard: int = 0
    replicate: dist.ProcessGroup | None = None
    sharding: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    rows_mesh: DeviceMesh | None = None

    @property
    def world(self) -> int:
        return self.replicas * self.shards

    @property
    def rank(self) -> int:
        """This rank's number on the rectangle, as plans count owners."""
        return self.replica * self.shards + self.shard

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The groups of more than one rank; a reduction over each in turn is a reduction over the rectangle."""
        return [g for g in (self.sharding, self.replicate) if g is not None]

    def my_rows(self, local_rows: int) -> tuple[int, int]:
        """Which of the rows stored here this rank works out, where replicas share a row-sharded matrix."""
        return chunk(local_rows, self.replicas, self.replica)

    def shard_state(self, local: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A state of this rank's shard of a ``shape`` parameter, as the DTensor of its replica where it is one."""
        if self.mesh is None or self.shards == 1:
            return local
        mesh = self.mesh if self.mesh.ndim == 1 else self.mesh[self.mesh.mesh_dim_names[-1]]  # type: ignore[index]
        return _dtensor(local, mesh, [Shard(0)], shape)

    def rows_state(self, local: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A state of the rows of `my_rows`, as a DTensor whose rows are cut by shard and then by replica."""
        if self.rows_mesh is None:
            return local
        return _dtensor(local, self.rows_mesh, [Shard(0)] * self.rows_mesh.ndim, shape)


def _dtensor(local: torch.Tensor, mesh: DeviceMesh, placements: list, shape: torch.Size) -> DTensor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=shape, stride=tuple(strides[-len(shape) :])
    )


class Grids:
    """Finds, and shares between parameters, the grid of each: by its DTensor mesh, else by the default group."""

    def __init__(self, process_group: dist.ProcessGroup | None):
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self.process_group = process_group
        self._known: dict[object, Grid] = {}

    def of(self, name: str, p: torch.Tensor) -> Grid:
        """The grid of one parameter; refuses placements that the optimizer cannot step with ``ConfigError``."""
        if not isinstance(p, DTensor):
            return self._remember(("plain", p.device.type), lambda: self._replicated(p.device.type))
        mesh, placements = p.device_mesh, tuple(p.placements)
        match placements:
            case (Shard(dim=0),) | (Replicate(),) | (Replicate(), Shard(dim=0)):
                return self._remember((mesh, placements), lambda: self._of_mesh(mesh, placements))
        raise ConfigError(
            f"{name} is placed as {placements} on a {mesh.ndim}-D mesh, expected Shard(0) (FSDP2), Replicate, or "
            "(Replicate, Shard(0)) (HSDP): shard it with fully_shard on a 1-D or a (replicate, shard) mesh"
        )

    def _remember(self, key: object, make) -> Grid:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _replicated(self, device_type: str) -> Grid:
        group = self.process_group
        world = dist.get_world_size(group) if group is not None else 1
        if world == 1:
            return Grid()
        assert group is not None
        rows = DeviceMesh.from_group(group, device_type)
        return Grid(replicas=world, replica=dist.get_rank(group), replicate=group, rows_mesh=rows)

    def _of_mesh(self, mesh: DeviceMesh, placements: tuple) -> Grid:
        sizes, here = list(mesh.shape), mesh.get_coordinate()
        assert here is not None  # a rank outside the mesh holds no such parameter
        groups = [mesh.get_group(dim) if sizes[dim] > 1 else None for dim in range(mesh.ndim)]
        if mesh.ndim == 2:
            names = mesh.mesh_dim_names
            if names is None:
                raise ConfigError(
                    f"the {tuple(sizes)} mesh has no dimension names, expected ('replicate', 'shard')"
                )
            both = [mesh.get_group(1), mesh.get_group(0)]
            rows = DeviceMesh.from_group(
                both, mesh.device_type, mesh=mesh.mesh.T.contiguous(), mesh_dim_names=("rows", "copies")
            )
            return Grid(
                replicas=sizes[0],
                shards=sizes[1],
                replica=here[0],
                shard=here[1],
                replicate=groups[0],
                sharding=groups[1],
                mesh=mesh,
                rows_mesh=rows,
            )
        if isinstance(placements[0], Shard):
            return Grid(shards=sizes[0], shard=here[0], sharding=groups[0], mesh=mesh, rows_mesh=mesh)
        return Grid(replicas=sizes[0], replica=here[0], replicate=groups[0], mesh=mesh, rows_mesh=mesh)
