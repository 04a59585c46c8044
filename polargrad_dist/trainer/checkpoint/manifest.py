"""The content of a checkpoint folder: one manifest.json, its checksum, and one file of raw tensor bytes per rank.

The manifest is JSON and the rank files are raw bytes, so that reading a checkpoint, even a hostile one, cannot execute
code. Every piece of a tensor has its own CRC-32, so that damage is located down to the tensor (it misses one random
change in 4 billion and costs less than half of SHA-256). Knows files and checksums, but no process group.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from polargrad_dist.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
_NAME = re.compile(r"step-(\d{8,})")
_RANK_FILE = re.compile(r"rank-\d{5,}\.bin")
_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
# Small enough to stay in the cache between copying and hashing.
BLOCK = 1 << 20

T = TypeVar("T")
R = TypeVar("R")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest step first, valid or not."""
    if not folder.is_dir():
        return []
    found = [
        (step, path) for path in folder.iterdir() if (step := step_of(path)) is not None and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def misplaced(path: Path, manifest: Manifest, run: str | None) -> str | None:
    """Why a checkpoint does not belong in its folder: copied, renamed, or of another run than ``run`` (None: any)."""
    named = step_of(path)
    if named is not None and named != manifest.step:
        return f"its manifest is of step {manifest.step}: it was renamed or copied over another"
    if run is not None and manifest.run != run:
        return f"it is of run {manifest.run}, not of {run}, which the file run_id names"
    return None


@dataclass(frozen=True)
class Piece:
    """A box of one tensor: ``bytes`` bytes, row-major, from ``start`` in ``file``."""

    file: str
    start: int
    bytes: int
    crc32: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """Everything except the tensors' bytes. ``identity`` describes model, tokenizer and data; ``run`` is the run's id."""

    step: int
    world_size: int
    tensors: dict[str, SavedTensor]
    objects: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    validation_loss: float | None = None
    saved_at: str = ""
    origin: str | None = None
    run: str | None = None

    @property
    def files(self) -> dict[str, int]:
        """File name to its size in bytes."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            for piece in tensor.pieces:
                sizes[piece.file] = max(sizes.get(piece.file, 0), piece.start + piece.bytes)
        return dict(sorted(sizes.items()))

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def write(self, folder: Path) -> None:
        """Writes manifest.json and its checksum, and returns once both and the folder are synced to disk."""
        body = dict(vars(self), format=FORMAT)
        body["tensors"] = {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": tensor.shape,
                "pieces": [list(vars(piece).values()) for piece in tensor.pieces],
            }
            for name, tensor in sorted(self.tensors.items())
        }
        text = json.dumps(body, separators=(",", ":")).encode()
        write_durably(folder / MANIFEST, text)
        # In the format of coreutils, for `sha256sum -c manifest.sha256`.
        write_durably(folder / CHECKSUM, f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode())
        sync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks the manifest alone; raises CheckpointError naming the file and what is wrong."""
        text, checksum = _read_file(folder / MANIFEST), _read_file(folder / CHECKSUM)
        if checksum != f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode():
            raise CheckpointError(
                f"{folder / MANIFEST} does not match its checksum in {CHECKSUM}: one is damaged"
            )
        try:
            body = json.loads(text)
            if body.pop("format") != FORMAT:
                raise ValueError(f"this version reads format {FORMAT}")
            manifest = cls(**body | {"tensors": {n: _tensor(n, t) for n, t in body["tensors"].items()}})
            if not isinstance(manifest.step, int) or not isinstance(manifest.world_size, int):
                raise ValueError("step and world_size must be integers")
            if not all(isinstance(part, dict) for part in (manifest.objects, manifest.identity)):
                raise ValueError("objects and identity must be objects")
            return manifest
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder / MANIFEST} is not a checkpoint manifest: {error}") from None


def _tensor(name: str, body: dict[str, Any]) -> SavedTensor:
    dtype, shape = _DTYPES[body["dtype"]], tuple(body["shape"])
    pieces = tuple(
        Piece(file, start, size, crc32, tuple(offset), tuple(part))
        for file, start, size, crc32, offset, part in body["pieces"]
    )
    for piece in pieces:
        # The name is joined to a path: nothing but a plain rank file inside the folder may pass.
        if not _RANK_FILE.fullmatch(piece.file):
            raise ValueError(f"{name} is in {piece.file!r}, which is not a rank file")
        numbers = (piece.start, piece.bytes, piece.crc32, *piece.offset, *piece.shape, *shape)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name} has an offset or size that is not a natural number")
        box = zip(piece.offset, piece.shape, shape, strict=True)
        if (
            any(o + s > whole for o, s, whole in box)
            or piece.bytes != math.prod(piece.shape) * dtype.itemsize
        ):
            raise ValueError(f"{name} has a piece that does not fit its shape {shape}")
    if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
        raise ValueError(f"the pieces of {name} do not add up to its shape {shape}")
    return SavedTensor(dtype, shape, pieces)


def damage(
    folder: Path, manifest: Manifest, *, share: tuple[int, int] = (0, 1), threads: int = 4
) -> list[str]:
    """Problems of the rank files: a line per missing or short file or damaged piece; empty if there are none.

    ``share=(i, n)`` reads only the i-th of n parts of the pieces, so that n ranks verify together.
    """
    problems = []
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {size}")
    if problems:
        return problems
    pieces = [(name, piece) for name, tensor in manifest.tensors.items() for piece in tensor.pieces]
    pieces.sort(key=lambda item: (item[1].file, item[1].start))
    part, parts = share
    mine = pieces[len(pieces) * part // parts : len(pieces) * (part + 1) // parts]

    def check(item: tuple[str, Piece]) -> str | None:
        name, piece = item
        try:
            return None if read_piece(folder, piece) else f"{piece.file} is damaged at {name}"
        except OSError as error:
            return f"{piece.file} cannot be read at {name}: {error.strerror}"

    return [problem for problem in in_threads(threads, check, mine) if problem]


def verify(folder: Path, *, threads: int = 4) -> Manifest:
    """Checks every byte; returns the manifest, or raises CheckpointError naming what is damaged."""
    manifest = Manifest.read(folder)
    if problems := damage(folder, manifest, threads=threads):
        raise CheckpointError(f"{folder} is damaged: {some(problems)}")
    return manifest


def read_piece(folder: Path, piece: Piece, into: memoryview | None = None, check: bool = True) -> bool:
    """Reads a piece block by block, into memory if given; returns whether its bytes match the checksum.

    Without ``check`` only their number is compared.
    """
    scratch = memoryview(bytearray(min(BLOCK, piece.bytes)))
    crc, done = 0, 0
    with open(folder / piece.file, "rb", buffering=0) as file:
        file.seek(piece.start)
        while done < piece.bytes:
            block = scratch[: piece.bytes - done] if into is None else into[done : done + BLOCK]
            if not (read := file.readinto(block)):
                return False
            crc, done = zlib.crc32(block[:read], crc) if check else crc, done + read
    return crc == piece.crc32 or not check


def differences(saved: Any, current: Any, name: str) -> Iterator[str]:
    """Describes where two JSON values differ, depth first."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            if key not in saved or key not in current:
                where = "this run" if key in current else "the checkpoint"
                value = current[key] if key in current else saved[key]
                yield f"{name}.{key} is {_short(value)} in {where} and absent from the other"
            else:
                yield from differences(saved[key], current[key], f"{name}.{key}")
    elif isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        for i, (a, b) in enumerate(zip(saved, current, strict=True)):
            yield from differences(a, b, f"{name}[{i}]")
    elif saved != current:
        yield f"{name} is {_short(saved)} in the checkpoint and {_short(current)} in this run"


def in_threads(threads: int, fn: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``[fn(i) for i in items]`` on several threads: hashing and file access release the interpreter."""
    if threads == 1:
        return [fn(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(fn, items))


def write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes created and renamed entries of a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: not a whole checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def some(items: list[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, list) else f"a list of {len(value)}"
    return text if len(text) <= 60 else text[:57] + "..."
