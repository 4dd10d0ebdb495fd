"""Class and register tokens in a cache: an array of their own, checked like the others, read group by group."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from cache import open_cache
from cache.errors import DamagedCache, StaleCache, Unrepresentable
from cache.layout import Layout, Shard
from cache.manifest import check_spec, read_manifest
from cache.shard import ShardReader
from cache.size import array_bytes, cache_bytes
from cache.verify import verify_cache
from cache.writer import create_store, write_rows

PREFIX = 2


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_group_has_its_own_prefix(tmp_path: Path, example, groups: int) -> None:
    wanted = example(groups=groups, prefix=PREFIX)
    wanted.build(tmp_path)
    stored = wanted.prefix_VNSD.astype(np.float16)
    assert stored.shape == (2, 7, groups * PREFIX, 6)
    reader, rows = open_cache(tmp_path, verify=True), [6, 0, 3, 3]
    for view in range(2):
        found = zarr.open_group(tmp_path / "data.zarr", mode="r")[f"view_{view}/prefix"]
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found[:], stored[view])
        whole = reader.read(rows, view)
        assert whole.prefix_BSD.dtype == torch.float32
        np.testing.assert_array_equal(whole.prefix_BSD, stored[view, rows])
        for group in range(groups):
            own = slice(group * PREFIX, (group + 1) * PREFIX)
            np.testing.assert_array_equal(reader.read(rows, view, group).prefix_BSD, stored[view, rows, own])


def test_a_group_reads_its_own_prefix_only(tmp_path: Path, example, monkeypatch) -> None:
    example(prefix=PREFIX).build(tmp_path)
    reader = open_cache(tmp_path)
    plain, read = ShardReader.read, defaultdict(list)

    def counted(shard: ShardReader, first: int, out_NC: np.ndarray) -> None:
        plain(shard, first, out_NC)
        read[shard.path.relative_to(tmp_path).parts[2]].append((first, out_NC.nbytes))

    monkeypatch.setattr(ShardReader, "read", counted)
    reader.read([1, 5], view=1, group=3)
    assert read["prefix"] == [(1 * 4 + 3, PREFIX * 6 * 2), (2 * 4 + 3, PREFIX * 6 * 2)]


def test_without_prefix_tokens_nothing_changes_on_disk(tmp_path: Path, example) -> None:
    example().build(tmp_path)
    assert "prefix" not in (tmp_path / "manifest.json").read_text()
    assert not list(tmp_path.rglob("prefix"))
    assert open_cache(tmp_path).read([0]).prefix_BSD is None


def test_size_is_predicted_with_the_prefix(tmp_path: Path, example) -> None:
    wanted = example(50, 16, prefix=PREFIX)
    wanted.build(tmp_path)
    array = next(array for array in wanted.layout.arrays if array.name == "prefix")
    files = [path for path in (tmp_path / "data.zarr").rglob("view_*/prefix/c/**/*") if path.is_file()]
    assert array_bytes(wanted.layout, array) == sum(path.stat().st_size for path in files) > 2 * 50 * 8 * 6 * 2
    plain = Layout(replace(wanted.layout.spec, prefix=0), 50, 16)
    assert cache_bytes(wanted.layout) > cache_bytes(plain) + array_bytes(wanted.layout, array)


def test_damage_is_found_named_and_repaired(tmp_path: Path, example) -> None:
    wanted = example(prefix=PREFIX)
    wanted.build(tmp_path)
    file = tmp_path / "data.zarr/view_1/prefix/c/1/0/0"
    good = file.read_bytes()
    file.write_bytes(good[:3] + bytes([good[3] ^ 1]) + good[4:])
    with pytest.raises(DamagedCache, match=r"view_1/prefix/c/1/0/0 is altered in chunk 0"):
        open_cache(tmp_path).read([3], view=1)
    (damage,) = verify_cache(tmp_path)
    assert (damage.file, damage.rows, damage.view) == ("data.zarr/view_1/prefix/c/1/0/0", range(3, 6), 1)
    assert wanted.mend(tmp_path, [damage]) == [Shard(1, 3, 3)]
    assert file.read_bytes() == good and not verify_cache(tmp_path)


def test_a_cache_with_another_number_of_prefix_tokens_is_stale(tmp_path: Path, example) -> None:
    wanted = example(prefix=1)
    wanted.build(tmp_path)
    with pytest.raises(StaleCache, match="cache holds prefix=1, wanted prefix=0"):
        check_spec(read_manifest(tmp_path), replace(wanted.layout.spec, prefix=0))


@pytest.mark.parametrize(("value", "remedy"), [(1e5, "cut earlier"), (np.nan, "lower train.lr")])
def test_a_prefix_that_float16_cannot_hold_is_named(tmp_path: Path, example, value: float, remedy: str) -> None:
    wanted = example(prefix=PREFIX)
    wanted.prefix_VNSD[1, 4, 3, 2] = value
    create_store(tmp_path, wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    message = f"sample 'sämple/4' view 1 prefix token 1 of group 1 channel 2: feature {value:g} at cut 3"
    with pytest.raises(Unrepresentable, match=re.escape(message) + f".*{remedy}"):
        write_rows(tmp_path, wanted.layout, 1, 3, wanted.block(Shard(1, 3, 3)))
