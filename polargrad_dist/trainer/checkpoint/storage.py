"""Storage under torch.distributed.checkpoint (DCP): its planners decide which rank writes or reads which slice of
which tensor, and these classes write and read the bytes. DCP's own file storage keeps its metadata in a pickle and has
no checksums; here the metadata is the JSON manifest, and every piece is checked.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import zlib
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from polargrad_dist.errors import CheckpointError
from polargrad_dist.trainer.checkpoint.manifest import (
    BLOCK,
    Manifest,
    Piece,
    SavedTensor,
    in_threads,
    read_piece,
    some,
)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class HostCopies:
    """Copies in host memory whose buffers are reused by the next save; pinned if the tensors are on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def of(self, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | CheckpointError:
        """A copy of this rank's part of each tensor.

        An error is returned, so that it reaches the other ranks in the transaction, which they are about to enter.
        """
        copies, on_device = {}, False
        try:
            for name, source in ((name, local(t)) for name, t in named.items()):
                copy = self._buffers.get(name)
                if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                    copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                copies[name] = copy.copy_(source, non_blocking=True)
                on_device |= source.device.type != "cpu"
            if on_device:
                torch.accelerator.synchronize()
        except (RuntimeError, MemoryError) as error:
            return CheckpointError(f"cannot copy to host memory: {error}")
        self._buffers = copies
        return copies

    def clear(self) -> None:
        self._buffers.clear()


class Copies(DefaultSavePlanner):
    """Plans with the shapes and shardings of the live tensors, but writes ``data``: their local parts, or copies."""

    def __init__(self, data: dict[str, torch.Tensor] | CheckpointError) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.data = data

    def create_local_plan(self) -> SavePlan:
        if isinstance(self.data, CheckpointError):
            raise self.data
        return super().create_local_plan()

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        # For the type checker: without data there is no plan
        assert isinstance(self.data, dict)
        return self.data[index.fqn]


class Writer(StorageWriter):
    """Writes one file per rank into a new folder; rank 0 calls ``commit`` once all bytes are on disk.

    DCP gathers the errors that are raised here, and raises them on all ranks.
    """

    def __init__(self, folder: Path, threads: int, commit: Callable[[dict[str, SavedTensor]], None]) -> None:
        self.folder, self.threads, self.commit = folder, threads, commit

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.folder.mkdir(parents=True)
        return [dataclasses.replace(p, storage_data=f"rank-{rank:05d}.bin") for rank, p in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        path = self.folder / plan.storage_data
        starts = [0, *accumulate(_bytes(item) for item in plan.items)]

        def write(work: tuple[WriteItem, int]) -> WriteResult:
            item, start = work
            data = as_bytes(planner.resolve_data(item).to("cpu").contiguous())  # type: ignore[union-attr]
            crc, done = 0, 0
            while done < len(data):
                block = data[done : done + BLOCK]
                written = os.pwrite(file, block, start + done)
                crc, done = zlib.crc32(block[:written], crc), done + written
            chunk = _chunk(item)
            piece = Piece(path.name, start, len(data), crc, tuple(chunk.offsets), tuple(chunk.sizes))
            return WriteResult(item.index, len(data), piece)

        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                results = in_threads(self.threads, write, zip(plan.items, starts, strict=False))
                os.fsync(file)
            finally:
                os.close(file)
            return results
        except OSError as error:
            hint = " (all ranks must see one file system)" if error.errno == errno.ENOENT else ""
            raise CheckpointError(f"cannot write {path}: {error.strerror}{hint}") from error

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pieces: dict[str, list[Piece]] = defaultdict(list)
        for result in (result for of_rank in results for result in of_rank):
            pieces[result.index.fqn].append(result.storage_data)
        tensors = {}
        for name, saved in metadata.state_dict_metadata.items():
            # For the type checker, as above
            assert isinstance(saved, TensorStorageMetadata)
            parts = sorted(pieces[name], key=lambda piece: piece.offset)
            tensors[name] = SavedTensor(saved.properties.dtype, tuple(saved.size), tuple(parts))
        self.commit(tensors)


class StrictLoad(DefaultLoadPlanner):
    """Before anything is read, raises an error that lists names and shapes that the checkpoint does not have."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.saved = manifest.tensors

    def create_local_plan(self) -> LoadPlan:
        missing = [name for name in self.state_dict if name not in self.saved]
        if missing:
            raise CheckpointError(f"it has no {some(missing)}: it is of another model or optimizer")
        shapes = [
            f"{name} {self.saved[name].shape}, not {tuple(tensor.shape)}"
            for name, tensor in self.state_dict.items()
            if self.saved[name].shape != tuple(tensor.shape)
        ]
        if shapes:
            raise CheckpointError(f"it has {some(shapes)}: it is of another model")
        kinds = [
            f"{name} of {self.saved[name].dtype}, not {tensor.dtype}"
            for name, tensor in self.state_dict.items()
            if self.saved[name].dtype.is_floating_point != tensor.dtype.is_floating_point
        ]
        if kinds:
            raise CheckpointError(f"it has {some(kinds)}: it is of another model or optimizer")
        return super().create_local_plan()


def _overflowed(source: torch.Tensor, target: torch.Tensor) -> bool:
    return bool((torch.isfinite(source) & ~torch.isfinite(target)).any())


class Reader(StorageReader):
    """Reads whole pieces and copies the requested slices; a piece that fills its target is read in place.

    ``check`` compares each piece with its checksum.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int, check: bool) -> None:
        self.folder, self.manifest, self.threads, self.check = folder, manifest, threads, check

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        def describe(tensor: SavedTensor) -> TensorStorageMetadata:
            chunks = [ChunkStorageMetadata(torch.Size(p.offset), torch.Size(p.shape)) for p in tensor.pieces]
            return TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)

        return Metadata({name: describe(tensor) for name, tensor in self.manifest.tensors.items()})

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.pieces = {
            (name, piece.offset): piece
            for name, tensor in self.manifest.tensors.items()
            for piece in tensor.pieces
            if piece.bytes
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[item.storage_index.fqn, tuple(item.storage_index.offset or ())].append(item)

        def read(work: tuple[tuple[str, tuple[int, ...]], list[ReadItem]]) -> None:
            key, items = work
            # No elements, no bytes
            if key not in self.pieces:
                return
            piece, dtype = self.pieces[key], self.manifest.tensors[key[0]].dtype
            targets = [planner.resolve_tensor(item) for item in items]
            if len(items) == 1 and _same_layout(targets[0], dtype, piece):
                self._read(key[0], piece, as_bytes(targets[0]))
                return
            whole = torch.empty(piece.bytes, dtype=torch.uint8)
            self._read(key[0], piece, as_bytes(whole))
            whole = whole.view(dtype).view(piece.shape)
            for item, target in zip(items, targets, strict=True):
                source = whole
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    source = source.narrow(dim, start, length)
                target.copy_(source)
                if dtype != target.dtype and target.is_floating_point() and _overflowed(source, target):
                    raise CheckpointError(
                        f"{key[0]} was saved in {dtype} and has values that {target.dtype} cannot hold: load it into {dtype}"
                    )

        in_threads(self.threads, read, wanted.items())
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, name: str, piece: Piece, into: memoryview) -> None:
        try:
            whole = read_piece(self.folder, piece, into, self.check)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.folder / piece.file}: {error.strerror}") from error
        if not whole:
            raise CheckpointError(f"{piece.file} is damaged at {name}")


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    # For the type checker: these planners see nothing but tensors
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(_chunk(item).sizes) * item.tensor_data.properties.dtype.itemsize


def _same_layout(target: torch.Tensor, dtype: torch.dtype, piece: Piece) -> bool:
    return (
        target.device.type == "cpu"
        and target.dtype == dtype
        and tuple(target.shape) == piece.shape
        and target.is_contiguous()
    )
