import errno
import mmap
import struct
from dataclasses import replace

import numpy as np
import pytest

from data.shards import foreign_shard, open_shard, sampled_sha256, token_dtype, verify_shards, write_shard
from polargrad_dist.errors import DataError


def published(magic: int, version: int, tokens: list[int], code: str) -> bytes:
    """A shard as llm.c and modded-nanoGPT write it, spelt out byte by byte."""
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}{code}", *tokens)


@pytest.mark.parametrize(
    ("vocab_size", "tokens", "expected"),
    [
        (50257, [50256, 0, 1, 65535], (20240520, 1, "H")),
        (65536, [65535], (20240520, 1, "H")),
        (65537, [65536, 7], (20240801, 7, "I")),
        (151646, [151643, 0, 2**31], (20240801, 7, "I")),
    ],
)
def test_shards_are_written_and_read_as_published(tmp_path, vocab_size, tokens, expected):
    magic, version, code = expected
    raw = published(magic, version, tokens, code)
    shard = write_shard(tmp_path / "ours.bin", np.array(tokens, token_dtype(vocab_size)))
    assert (tmp_path / "ours.bin").read_bytes() == raw
    assert (shard.tokens, shard.size, shard.max_token) == (len(tokens), len(raw), max(tokens))
    (tmp_path / "theirs.bin").write_bytes(raw)
    assert open_shard(tmp_path / "theirs.bin").tolist() == tokens
    assert foreign_shard(tmp_path / "theirs.bin").tokens == len(tokens)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "is empty"),
        (lambda raw: raw[:100], "holds 100 bytes, fewer than its header of 1024"),
        (
            lambda raw: raw[:-1],
            r"is truncated: 1,031 bytes, expected 1,032 for the 4 tokens in its header",
        ),
        (lambda raw: raw + b"\0", "is longer than it says"),
        (lambda raw: struct.pack("<i", 20240521) + raw[4:], "magic 20240521 version 1"),
        (lambda raw: raw[:4] + struct.pack("<i", 7) + raw[8:], "magic 20240520 version 7"),
        (lambda raw: raw[:8] + struct.pack("<i", 0) + raw[12:1024], "declares 0 tokens"),
    ],
)
def test_a_file_that_is_no_whole_shard_is_named_with_what_is_wrong(tmp_path, damage, message):
    path = tmp_path / "some.bin"
    path.write_bytes(damage(published(20240520, 1, [1, 2, 3, 4], "H")))
    with pytest.raises(DataError, match=message) as error:
        open_shard(path)
    assert str(path) in str(error.value)


def test_a_shard_for_which_there_is_no_room_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    shard = write_shard(tmp_path / "a.bin", np.arange(9, dtype=np.uint16))
    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(DataError, match=r"a\.bin cannot be mapped into memory \(Too many open files\)"):
        open_shard(tmp_path / shard.name)


def shards_of(tmp_path, count=3):
    return [
        write_shard(tmp_path / f"{i}.bin", np.arange(1000 * i, 1000 * i + 500, dtype=np.uint16))
        for i in range(count)
    ]


@pytest.mark.parametrize("position", [1024, 1500, 2023])
def test_one_flipped_bit_is_found_by_checksum_and_its_shard_named(tmp_path, position):
    shards = shards_of(tmp_path)
    verify_shards(tmp_path, shards, "full")
    raw = bytearray((tmp_path / "1.bin").read_bytes())
    raw[position] ^= 4
    (tmp_path / "1.bin").write_bytes(raw)
    for mode in ("full", "auto"):
        with pytest.raises(DataError, match=r"1\.bin is corrupt"):
            verify_shards(tmp_path, shards, mode)
    verify_shards(tmp_path, shards, "sizes")


def test_ranks_share_the_checksums_and_all_of_them_see_sizes(tmp_path):
    shards = shards_of(tmp_path)
    raw = bytearray((tmp_path / "1.bin").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "1.bin").write_bytes(raw)
    verify_shards(tmp_path, shards, "full", part=0, parts=2)
    with pytest.raises(DataError, match="corrupt"):
        verify_shards(tmp_path, shards, "full", part=1, parts=2)
    with pytest.raises(DataError, match=r"2\.bin holds 2,024 bytes, expected 2,026 by the manifest"):
        verify_shards(tmp_path, [*shards[:2], replace(shards[2], size=2026)], "sizes", part=0, parts=2)


def test_a_sample_of_shards_finds_damage_sooner_or_later(tmp_path):
    shards = shards_of(tmp_path)
    raw = bytearray((tmp_path / "2.bin").read_bytes())
    raw[1600] ^= 1
    (tmp_path / "2.bin").write_bytes(raw)
    found = 0
    for _ in range(40):
        try:
            verify_shards(tmp_path, shards, "auto", budget=2500)
        except DataError:
            found += 1
    # A third of the time: a damaged shard is not always in the sample
    assert 0 < found < 40


def test_foreign_shards_are_told_apart_by_blocks_all_over_them(tmp_path):
    tokens = np.zeros(2_000_000, np.uint16)
    write_shard(tmp_path / "a.bin", tokens)
    first = sampled_sha256(tmp_path / "a.bin")
    assert sampled_sha256(tmp_path / "a.bin") == first
    for place in (0, -1):
        other = tokens.copy()
        other[place] = 1
        write_shard(tmp_path / "b.bin", other)
        assert sampled_sha256(tmp_path / "b.bin") != first
