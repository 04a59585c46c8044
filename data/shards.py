"""Token shards: the `.bin` format of llm.c and modded-nanoGPT, and the manifest beside them.

A shard is a header of 256 little-endian int32 (magic, version, number of tokens, zeros) and then the tokens: magic
20240520, version 1, uint16; or magic 20240801, version 7, uint32, for vocabularies over 65,536.
"""

from __future__ import annotations

import hashlib
import mmap
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.files import read_json, sha256, write_atomically, write_json
from polargrad_dist.errors import DataError
from polargrad_dist.words import counted

HEADER_BYTES = 256 * 4
# The header counts them in an int32
MAX_SHARD_TOKENS = 2**31 - 1
MANIFEST = "manifest.json"
SAMPLED_BYTES = 4 * 2**30
_MAGIC: dict[np.dtype, tuple[int, int]] = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}
_DTYPE = {magic: dtype for dtype, magic in _MAGIC.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if every id below ``vocab_size`` fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


SHARD_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "tokens": (int,),
    "size": (int,),
    "sha256": (str, type(None)),
    "max_token": (int, type(None)),
    "documents": (int, type(None)),
    "text_bytes": (int, type(None)),
}
TOKENIZER_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "hash": (str,),
    "vocab_size": (int,),
    "end_of_text": (int,),
    "file": (str, type(None)),
}


def check_fields(raw: Any, kinds: dict[str, tuple[type, ...]]) -> None:
    """Raises ValueError if ``raw`` is not an object or a field has another type than given; a missing one may be null."""
    if not isinstance(raw, dict):
        raise ValueError(f"{raw!r:.60} is no object")
    for name, kind in kinds.items():
        if type(raw.get(name)) not in kind:
            raise ValueError(f"{name} is {raw.get(name)!r:.60}")
    if kinds and (unknown := raw.keys() - kinds.keys()):
        raise ValueError(f"{sorted(unknown)[0]!r:.60} is no field of it")


@dataclass(frozen=True)
class Shard:
    """One file of tokens and its description. A foreign shard has no sha256, max_token or text counts."""

    name: str
    tokens: int
    size: int
    sha256: str | None = None
    max_token: int | None = None
    documents: int | None = None
    text_bytes: int | None = None

    @classmethod
    def read(cls, raw: Any) -> Shard:
        """Reads a manifest's description of a shard. Raises ValueError if it is malformed or names another folder."""
        check_fields(raw, SHARD_FIELDS)
        shard = cls(**raw)
        if Path(shard.name).name != shard.name or shard.name in ("", ".", ".."):
            raise ValueError(f"{shard.name!r} is no file of its folder")
        return shard


def write_shard(
    path: Path, tokens: np.ndarray, *, documents: int | None = None, text_bytes: int | None = None
) -> Shard:
    """Writes tokens (n,) uint16 or uint32 as one shard, atomically. Raises DataError if the disk is full."""
    tokens = np.ascontiguousarray(tokens, dtype=tokens.dtype.newbyteorder("<"))
    if tokens.dtype not in _MAGIC:
        raise DataError(f"{path}: the tokens are {tokens.dtype}, expected uint16 or uint32")
    if not 0 < len(tokens) <= MAX_SHARD_TOKENS:
        raise DataError(f"{path}: {len(tokens):,} tokens, expected 1 to {MAX_SHARD_TOKENS:,}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = (*_MAGIC[tokens.dtype], len(tokens))
    checksum = write_atomically(path, header.data, tokens.data)
    size = HEADER_BYTES + tokens.nbytes
    return Shard(path.name, len(tokens), size, checksum, int(tokens.max()), documents, text_bytes)


def _header(path: Path) -> tuple[np.dtype, int]:
    """The token type and count in a shard's header; raises DataError if the file does not fit them."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): restore it, or prepare again") from error
    if size < HEADER_BYTES:
        what = (
            "is empty"
            if size == 0
            else f"holds {counted(size, 'byte')}, fewer than its header of {HEADER_BYTES}"
        )
        raise DataError(f"{path} {what}, expected a token shard: write it again")
    magic, version, count = (int(x) for x in np.frombuffer(raw, dtype="<i4", count=3))
    if (magic, version) not in _DTYPE:
        known = " or ".join(f"{m} version {v}" for m, v in _DTYPE)
        raise DataError(
            f"{path} starts with magic {magic} version {version}, expected {known}: write it again"
        )
    dtype = _DTYPE[magic, version]
    expected = HEADER_BYTES + count * dtype.itemsize
    if count <= 0:
        raise DataError(f"{path} declares {count} tokens, expected at least one: write it again")
    if size != expected:
        kind = "truncated" if size < expected else "longer than it says"
        raise DataError(
            f"{path} is {kind}: {size:,} bytes, expected {expected:,} for the {counted(count, 'token')} in its header: fetch "
            "or prepare it again"
        )
    return dtype, count


def open_shard(path: Path) -> np.ndarray:
    """The tokens (n,) uint16 or uint32 of a shard, memory-mapped and read-only.

    Raises DataError for an empty file, a wrong magic number, a size that does not match the header, or too many open files.
    """
    dtype, count = _header(path)
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(
            f"{path} cannot be mapped into memory ({error.strerror}), expected room for one more shard: raise the limit of "
            "open files (ulimit -n) or of mappings (vm.max_map_count)"
        ) from error
    return np.frombuffer(mapped, dtype=dtype, count=count, offset=HEADER_BYTES)


def foreign_shard(path: Path) -> Shard:
    """The description of a shard without a manifest."""
    dtype, count = _header(path)
    return Shard(str(path), count, HEADER_BYTES + count * dtype.itemsize)


def sampled_sha256(path: Path, blocks: int = 16, block: int = 2**16) -> str:
    """A checksum of a foreign shard's header and of blocks spread over it, to identify it without reading it whole."""
    size = path.stat().st_size
    checksum = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for index in range(blocks):
            file.seek(index * max(0, size - block) // (blocks - 1))
            checksum.update(file.read(block))
    return f"sampled:{checksum.hexdigest()}"


@dataclass(frozen=True)
class Manifest:
    """The content of a prepared folder; written last, so a folder with a manifest is complete."""

    inputs: dict[str, Any]
    tokenizer: dict[str, Any]
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    def save(self, folder: Path) -> None:
        body: dict[str, Any] = {"version": 1, "inputs": self.inputs, "tokenizer": self.tokenizer}
        for split, shards in (("train", self.train), ("validation", self.validation)):
            body[split] = {
                "tokens": sum(s.tokens for s in shards),
                "documents": sum(s.documents or 0 for s in shards),
                "text_bytes": sum(s.text_bytes or 0 for s in shards),
                "shards": [asdict(s) for s in shards],
            }
        write_json(folder / MANIFEST, body)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        raw = read_json(folder / MANIFEST)
        try:
            if raw["version"] != 1:
                raise DataError(
                    f"{folder / MANIFEST} has version {raw['version']!r}, expected 1: prepare again with this version"
                )
            inputs, tokenizer = raw["inputs"], raw["tokenizer"]
            check_fields(inputs, {})
            check_fields(tokenizer, TOKENIZER_FIELDS)
            if tokenizer.get("file") not in (None, "tokenizer.json"):
                raise ValueError(f"its tokenizer lies in {tokenizer['file']!r}")
            train, validation = (tuple(map(Shard.read, raw[k]["shards"])) for k in ("train", "validation"))
            if not train:
                raise ValueError("it names no training shard")
            return cls(inputs, tokenizer, train, validation)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{folder / MANIFEST} is damaged ({error!r}): delete {folder} and prepare again"
            ) from error


def verify_shards(
    folder: Path,
    shards: Sequence[Shard],
    mode: str,
    *,
    part: int = 0,
    parts: int = 1,
    budget: int = SAMPLED_BYTES,
) -> None:
    """Raises DataError naming the first damaged shard.

    Every header and size is checked. Contents (by the sha256 in the manifest) are checked for every ``parts``-th shard from
    ``part`` on: all of them with ``mode`` "full", a random selection of ``budget`` bytes with "auto", none with "sizes".
    """
    for shard in shards:
        path = folder / shard.name
        _header(path)
        if path.stat().st_size != shard.size:
            raise DataError(
                f"{path} holds {path.stat().st_size:,} bytes, expected {shard.size:,} by the manifest: delete its "
                "folder and prepare again"
            )
    if mode == "sizes":
        return
    mine = [s for s in shards[part::parts] if s.sha256 is not None]
    if mode == "auto" and sum(s.size for s in mine) > budget:
        random.SystemRandom().shuffle(mine)
        kept: list[Shard] = []
        total = 0
        for shard in mine:
            total += shard.size
            if kept and total > budget:
                break
            kept.append(shard)
        mine = kept
    for shard in mine:
        found = sha256(folder / shard.name)
        if found != shard.sha256:
            raise DataError(
                f"{folder / shard.name} is corrupt: its sha256 is {found[:16]}…, expected "
                f"{str(shard.sha256)[:16]}… by the manifest: delete its folder and prepare again"
            )
