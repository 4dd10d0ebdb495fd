from __future__ import annotations

import gc
import math
import os
import pickle
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from cache import open_cache
from cache.errors import CacheError, DamagedCache, MissingCache
from cache.manifest import read_manifest
from cache.ranges import LocalFile
from cache.reader import MEMORY, open_shard
from cache.shard import ShardReader
from cache.store import CacheReader

MODES = pytest.mark.parametrize(("groups", "pixels"), [(1, False), (2, True), (4, True)])


@MODES
def test_plain_zarr_reads_everything_back(tmp_path: Path, example, groups: int, pixels: bool) -> None:
    wanted = example(groups=groups, pixels=pixels)
    wanted.build(tmp_path)
    root = zarr.open_group(tmp_path / "data.zarr", mode="r")
    assert root.metadata.zarr_format == 3
    np.testing.assert_array_equal(root["labels"][:], wanted.labels_N)
    assert tuple(root["keys"][:]) == wanted.keys
    for view in range(2):
        arrays = root[f"view_{view}"]
        more = {"token_ids", "pixels"} if groups > 1 else set()
        assert set(arrays) == {"features", "crop", "moments"} | more
        features = arrays["features"]
        assert (features.dtype, features.shape) == (np.float16, (7, 16, 6))
        assert (features.shards, features.chunks) == ((3, 16, 6), (1, 16 // groups, 6))
        np.testing.assert_array_equal(features[:], wanted.stored_VNLD[view])
        np.testing.assert_array_equal(arrays["crop"][:], wanted.crop_VN5[view])
        if groups > 1:
            assert arrays["token_ids"].dtype == np.uint8
            np.testing.assert_array_equal(arrays["token_ids"][:], wanted.token_ids_VNL[view])
            np.testing.assert_array_equal(arrays["pixels"][:], wanted.pixels_VNLP[view])


@MODES
def test_reader_returns_the_rows_asked_for(tmp_path: Path, example, groups: int, pixels: bool) -> None:
    wanted = example(groups=groups, pixels=pixels)
    wanted.build(tmp_path)
    reader = open_cache(tmp_path, verify=True)
    assert isinstance(reader, CacheReader) and len(reader) == 7
    rows, size = [6, 0, 3, 3], 16 // groups
    for view in range(2):
        for group in (None, *range(groups)):
            batch = reader.read(rows, view=view, group=group)
            tokens = slice(None) if group is None else slice(group * size, (group + 1) * size)
            assert batch.features_BLD.dtype == torch.float32 and batch.ids_BL.dtype == torch.int64
            np.testing.assert_array_equal(batch.features_BLD, wanted.stored_VNLD[view, rows, tokens])
            np.testing.assert_array_equal(batch.ids_BL, wanted.token_ids_VNL[view, rows, tokens])
            np.testing.assert_array_equal(batch.labels_B, wanted.labels_N[rows])
            assert batch.keys == tuple(wanted.keys[row] for row in rows)
            if pixels:
                assert batch.pixels_BLP is not None
                np.testing.assert_array_equal(batch.pixels_BLP, wanted.pixels_VNLP[view, rows])
            else:
                assert batch.pixels_BLP is None
        np.testing.assert_array_equal(reader.crops(rows, view), wanted.crop_VN5[view, rows])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_group_reads_its_own_chunks_only(tmp_path: Path, example, monkeypatch, groups: int) -> None:
    example(groups=groups).build(tmp_path)
    reader = open_cache(tmp_path)
    plain, read = ShardReader.read, defaultdict(list)

    def counted(shard: ShardReader, first: int, out_NC: np.ndarray) -> None:
        plain(shard, first, out_NC)
        read[shard.path.relative_to(tmp_path).parts[2]].append((first, out_NC.nbytes))

    monkeypatch.setattr(ShardReader, "read", counted)
    reader.read([1, 5], view=1, group=groups - 1)
    last = [1 * groups + groups - 1, 2 * groups + groups - 1]
    assert read["features"] == [(number, 16 // groups * 6 * 2) for number in last]
    assert read["token_ids"] == ([(number, 16 // groups) for number in last] if groups > 1 else [])
    assert read["pixels"] == [(1, 16 * 48), (2, 16 * 48)]
    assert "crop" not in read


def test_a_group_reads_the_bytes_of_its_group(tmp_path: Path, example, monkeypatch) -> None:
    """Counted where they leave the disk."""
    example(groups=4, pixels=False, width=96).build(tmp_path)
    reader = open_cache(tmp_path, memory=0)
    reader.read(range(7))  # opens the shards
    plain, read = LocalFile.read_into, []

    def counted(file: LocalFile, offset: int, buffers: Sequence[np.ndarray]) -> None:
        plain(file, offset, buffers)
        read.append(sum(buffer.nbytes for buffer in buffers))

    monkeypatch.setattr(LocalFile, "read_into", counted)
    reader.read([1, 5, 6], group=0)
    features, ids, checksum = 4 * 96 * 2, 4, 4
    assert sum(read) == 3 * (features + checksum + ids + checksum)


def test_more_than_256_tokens_have_wider_ids(tmp_path: Path, example) -> None:
    wanted = example(num_samples=1, shard_rows=1, image_size=72, views=1, pixels=False)
    wanted.build(tmp_path)
    assert wanted.token_ids_VNL.max() == 323
    np.testing.assert_array_equal(open_cache(tmp_path).read([0]).ids_BL, wanted.token_ids_VNL[0])


def test_manifest_describes_the_cache(tmp_path: Path, example) -> None:
    wanted = example()
    manifest, _ = wanted.build(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert (manifest.num_samples, manifest.num_tokens, manifest.width, manifest.views) == (7, 16, 6, 2)
    assert manifest.fingerprint == wanted.layout.spec.fingerprint and manifest.complete
    assert {entry.name for entry in manifest.shards} | {"manifest.json"} == {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    rows = [(entry.first_row, entry.rows) for entry in manifest.shards if "/view_1/features/c" in entry.name]
    assert rows == [(0, 3), (3, 3), (6, 1)]
    for stats, stored in zip(manifest.stats, wanted.stored_VNLD.astype(np.float64), strict=True):
        assert math.isclose(stats.mean, stored.mean(), rel_tol=1e-6)
        assert math.isclose(stats.std, stored.std(), rel_tol=1e-6)
        assert stats.max_abs == np.abs(stored).max()


def test_shared_between_threads_and_pickled(tmp_path: Path, example, monkeypatch) -> None:
    # So that threads also close each other's shards.
    monkeypatch.setattr("cache.reader.open_shard", lru_cache(2)(open_shard.__wrapped__))
    wanted = example(num_samples=40, shard_rows=4)
    wanted.build(tmp_path)
    reader = pickle.loads(pickle.dumps(open_cache(tmp_path)))

    def agrees(seed: int) -> bool:
        random = np.random.default_rng(seed)
        rows, view, group = random.integers(0, 40, 9), int(random.integers(2)), int(random.integers(4))
        batch = reader.read(rows, view, group)
        stored = wanted.stored_VNLD[view][rows, group * 4 : group * 4 + 4]
        return np.array_equal(batch.features_BLD, stored) and batch.keys == tuple(wanted.keys[row] for row in rows)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(agrees, range(200)))


def open_below(folder: Path) -> int:
    """Descriptors of this process that are of files in a folder; a mapped file has one."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the folder of descriptors itself
            found += os.readlink(link).startswith(f"{folder}/")
    return found


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
@pytest.mark.parametrize("memory", [0, MEMORY])
def test_open_shards_are_bounded_for_all_readers_and_closed_with_their_reader(
    tmp_path: Path, example, monkeypatch, backend: str, memory: int
) -> None:
    wanted = example(num_samples=12, shard_rows=1, views=1)
    wanted = replace(wanted, layout=replace(wanted.layout, backend=backend))
    monkeypatch.setattr("cache.reader.open_shard", lru_cache(20)(open_shard.__wrapped__))
    wanted.build(tmp_path)
    readers = [open_cache(tmp_path, memory=memory) for _ in range(3)]
    gc.collect()
    gc.disable()  # what a cycle holds would stay open until some day
    try:
        for reader in (*readers, *readers):
            np.testing.assert_array_equal(reader.read(range(12)).features_BLD, wanted.stored_VNLD[0])
            assert 0 < open_below(tmp_path) <= 20
        del reader, readers[0]
        assert readers[0].read([3]).keys == ("sämple/3",) and 0 < open_below(tmp_path) <= 20
        del readers
        assert open_below(tmp_path) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"rows": [0, 7]}, r"row 7 is not in the cache at .*; it has rows 0\.\.6"),
        ({"rows": [-1]}, r"row -1 is not in .*; it has rows 0\.\.6"),
        ({"rows": [0], "view": 2}, r"view 2 is not in .*; it has views 0\.\.1"),
        ({"rows": [0], "group": 4}, r"group 4 is not in .*; it has groups 0\.\.3"),
    ],
)
def test_out_of_range_is_refused(tmp_path: Path, example, request_: dict, message: str) -> None:
    example().build(tmp_path)
    with pytest.raises(CacheError, match=message):
        open_cache(tmp_path).read(**request_)


def test_a_deleted_or_shortened_shard_is_never_zeros(tmp_path: Path, example) -> None:
    example().build(tmp_path)
    shard = tmp_path / "data.zarr/view_1/features/c/1/0/0"
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + content[101:])  # the index is whole, the file is not
    with pytest.raises(DamagedCache, match=f"{shard} has {len(content) - 1} bytes instead of {len(content)}"):
        open_cache(tmp_path).read([4], view=1)
    shard.unlink()
    with pytest.raises(DamagedCache, match=f"{shard} is missing; run `make repair`"):
        open_cache(tmp_path).read([4], view=1)
    assert open_cache(tmp_path).read([2, 6], view=1).features_BLD.shape == (2, 16, 6)
    with pytest.raises(DamagedCache, match=f"{shard} is missing"):
        open_cache(tmp_path, verify=True)


def test_tokens_must_split_into_groups(example) -> None:
    with pytest.raises(CacheError, match="25 tokens do not split into 4 equal groups"):
        example(image_size=20)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingCache, match=f"the cache at {tmp_path}/none does not exist"):
        open_cache(tmp_path / "none")
    with pytest.raises(MissingCache, match=f"the cache at {tmp_path} is unfinished"):
        open_cache(tmp_path)
