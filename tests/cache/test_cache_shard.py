from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from cache.errors import DamagedCache
from cache.shard import ShardReader, encode_shard


@given(chunks=st.lists(st.none() | st.binary(min_size=1, max_size=40), max_size=6), spare=st.integers(1, 3))
def test_chunks_round_trip(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes | None], spare: int) -> None:
    path = tmp_path_factory.mktemp("shard") / "0"
    path.write_bytes(encode_shard(chunks, len(chunks) + spare))
    reader = ShardReader(path, len(chunks) + spare)
    for number, chunk in enumerate([*chunks, *[None] * spare]):
        if chunk is None:
            with pytest.raises(DamagedCache, match=f"{path} lacks chunk {number}; run `make repair`"):
                reader.chunk(number)
        else:
            assert reader.chunk(number) == chunk


def test_size_is_chunks_and_index() -> None:
    assert len(encode_shard([b"abc", None, b"de"], 4)) == (3 + 4) + (2 + 4) + 4 * 16 + 4


def test_reads_what_zarr_python_writes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 4, 3)).astype("<f2")
    array = zarr.create_array(
        tmp_path / "a", shape=(5, 4, 3), dtype="<f2", shards=(2, 4, 3), chunks=(1, 2, 3), compressors=[Crc32cCodec()]
    )
    array[:] = values
    for row in range(5):
        reader = ShardReader(tmp_path / "a" / "c" / str(row // 2) / "0" / "0", 4)
        for half in range(2):
            chunk = np.frombuffer(reader.chunk(row % 2 * 2 + half), "<f2").reshape(2, 3)
            np.testing.assert_array_equal(chunk, values[row, half * 2 : half * 2 + 2])


@pytest.mark.parametrize("kept", [0, 1, 30, 67, 80])
def test_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    content = encode_shard([b"x" * 9], 4)
    assert len(content) == 81
    (tmp_path / "0").write_bytes(content[:kept])
    with pytest.raises(DamagedCache, match=f"{tmp_path}/0 (is empty|has a damaged index)"):
        ShardReader(tmp_path / "0", 4)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedCache, match=f"{tmp_path}/7 is missing; run `make repair`"):
        ShardReader(tmp_path / "7", 4)
