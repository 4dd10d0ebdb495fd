from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from cache.errors import DamagedCache
from cache.ranges import LocalFile, MappedFile, behind
from cache.shard import ShardReader, encode_shard


@given(chunks=st.lists(st.none() | st.binary(min_size=1, max_size=40), max_size=6), spare=st.integers(1, 3))
def test_chunks_round_trip(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes | None], spare: int) -> None:
    path = tmp_path_factory.mktemp("shard") / "0"
    path.write_bytes(b"".join(encode_shard(chunks, len(chunks) + spare)))
    reader = ShardReader(path, LocalFile(path), len(chunks) + spare)
    for number, chunk in enumerate([*chunks, *[None] * spare]):
        if chunk is None:
            with pytest.raises(DamagedCache, match=f"{path} lacks chunk {number}; run `make repair`"):
                reader.chunk(number)
        else:
            assert reader.chunk(number).tobytes() == chunk
            out = np.empty((1, len(chunk)), np.uint8)
            reader.read(number, out)
            assert out.tobytes() == chunk


def test_adjacent_chunks_are_read_at_once_and_what_is_wrong_with_them_is_named(tmp_path: Path) -> None:
    content = b"".join(encode_shard([b"aaa", b"bbb", None, b"ccc", b"dd"], 6))
    (tmp_path / "0").write_bytes(content)
    for kind in (LocalFile, MappedFile):
        reader = ShardReader(tmp_path / "0", kind(tmp_path / "0"), 6)
        out_NC = np.empty((2, 3), np.uint8)
        reader.read(0, out_NC)
        assert out_NC.tobytes() == b"aaabbb"
        for first, lacking in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 5)):
            with pytest.raises(DamagedCache, match=f"0 lacks chunk {lacking};"):
                reader.read(first, out_NC)
    (tmp_path / "0").write_bytes(content.replace(b"bbb", b"bxb"))
    with pytest.raises(DamagedCache, match="0 is altered in chunk 1;"):
        ShardReader(tmp_path / "0", LocalFile(tmp_path / "0"), 6).read(0, out_NC)


def test_size_is_chunks_and_index() -> None:
    assert len(b"".join(encode_shard([b"abc", None, b"de"], 4))) == (3 + 4) + (2 + 4) + 4 * 16 + 4


def test_reads_what_zarr_python_writes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 4, 3)).astype("<f2")
    array = zarr.create_array(
        tmp_path / "a", shape=(5, 4, 3), dtype="<f2", shards=(2, 4, 3), chunks=(1, 2, 3), compressors=[Crc32cCodec()]
    )
    array[:] = values
    for row in range(5):
        path = tmp_path / "a" / "c" / str(row // 2) / "0" / "0"
        reader = ShardReader(path, LocalFile(path), 4)
        for half in range(2):
            chunk = np.frombuffer(reader.chunk(row % 2 * 2 + half), "<f2").reshape(2, 3)
            np.testing.assert_array_equal(chunk, values[row, half * 2 : half * 2 + 2])


@pytest.mark.parametrize("kept", [0, 1, 30, 67, 80])
def test_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    content = b"".join(encode_shard([b"x" * 9], 4))
    assert len(content) == 81
    (tmp_path / "0").write_bytes(content[:kept])
    with pytest.raises(DamagedCache, match=f"{tmp_path}/0 (is empty|has a damaged index)"):
        ShardReader(tmp_path / "0", LocalFile(tmp_path / "0"), 4)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedCache, match=f"{tmp_path}/7 is missing; run `make repair`"):
        LocalFile(tmp_path / "7")


@pytest.mark.parametrize("kind", [LocalFile, MappedFile])
def test_a_file_cut_short_while_it_is_open_is_damage_and_no_crash(
    tmp_path: Path, kind: type[LocalFile] | type[MappedFile]
) -> None:
    """Touching what has been cut off a map would end the process by SIGBUS."""
    path = tmp_path / "0"
    path.write_bytes(b"".join(encode_shard([b"x" * 5000, b"y" * 5000], 2)))
    reader = ShardReader(path, kind(path), 2)
    os.truncate(path, 7000)
    out = np.empty((1, 5000), np.uint8)
    reader.read(0, out)
    assert out.tobytes() == b"x" * 5000
    with pytest.raises(DamagedCache, match=f"{path} is cut short; run `make repair`"):
        reader.read(1, out)


@given(sizes=st.lists(st.integers(0, 9), max_size=5), share=st.floats(0, 1))
def test_what_is_left_of_buffers_after_a_short_read(sizes: list[int], share: float) -> None:
    buffers = [np.zeros(size, np.uint8) for size in sizes]
    filled = round(share * sum(sizes))
    for rest in behind(buffers, filled):
        rest[:] = 1
    content = np.concatenate([*buffers, np.zeros(0, np.uint8)])
    assert not content[:filled].any() and content[filled:].all()
