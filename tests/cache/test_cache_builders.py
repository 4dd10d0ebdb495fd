"""Two builders of one cache that nothing keeps apart, as in an object store, whose settings differ in what is in no
fingerprint: what is read of it afterwards is right or refused, never wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cache import open_cache
from cache.errors import CacheError, DamagedCache
from cache.layout import Shard
from cache.manifest import MANIFEST, read_manifest
from cache.place import is_there
from cache.verify import verify_cache
from cache.writer import create_store, finish, missing_shards, write_rows


class Builder:
    """One of them, which does one thing after the other when it is told to."""

    def __init__(self, example: Any, folder: Path, **layout: Any) -> None:
        self.example, self.folder = replace(example, layout=replace(example.layout, **layout)), folder
        self.layout, self.left = self.example.layout, list[Shard]()

    def start(self) -> None:
        wanted = self.example
        create_store(self.folder, self.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
        self.left = missing_shards(self.folder, self.layout)

    def write(self, most: int) -> None:
        for shard in self.left[:most]:
            block = self.example.block(shard)
            write_rows(self.folder, self.layout, shard.view, shard.first_row, block)
        del self.left[:most]

    def end(self) -> str:
        self.write(len(self.left))
        try:
            finish(self.folder, self.layout)
        except CacheError as error:
            return str(error)
        return ""


def read_all(example: Any, folder: Path) -> int:
    """How many rows are read, each as it should be; the others are refused."""
    reader, found = open_cache(folder), 0
    for view in range(2):
        for row in range(7):
            with suppress(DamagedCache):
                batch = reader.read([row], view)
                np.testing.assert_array_equal(batch.features_BLD[0], example.stored_VNLD[view, row].astype(np.float32))
                np.testing.assert_array_equal(batch.ids_BL[0], example.token_ids_VNL[view, row])
                assert batch.keys == (example.keys[row],)
                found += 1
    return found


OTHERS = {
    "shards": ({}, {"shard_rows": 2}),
    "shards of tars": ({"backend": "webdataset"}, {"backend": "webdataset", "shard_rows": 2}),
    "backend": ({}, {"backend": "webdataset"}),
    "compression": ({}, {"compression": "zstd"}),
}


@pytest.mark.parametrize("differ", OTHERS)
def test_what_builders_of_other_layouts_leave_is_right_or_refused(
    example: Callable[..., Any], tmp_path: Path, differ: str
) -> None:
    wanted, seen = example(), set[str]()
    for before, between in ((0, 0), (0, 2), (1, 1), (1, 3), (4, 2), (6, 0)):
        folder = tmp_path / f"{before}-{between}"
        one, other = (Builder(wanted, folder, **layout) for layout in OTHERS[differ])
        other.start()
        other.write(before)
        one.start()
        one.write(3)
        other.write(between)
        if said := one.end():
            assert re.search(r"lacks \d+ of 7 parts, first .*; run again, it resumes there", said)
            seen.add("lacks parts")
        else:
            rows = read_all(wanted, folder)
            assert (rows == 14) is (verify_cache(folder) == [])
            seen.add("whole" if rows == 14 else "refused")
        with suppress(FileNotFoundError):  # the first to finish has swept what is not of its backend
            other.end()
        if is_there(folder / MANIFEST):
            read_all(wanted, folder)
            if damages := verify_cache(folder):
                replace(wanted, layout=read_manifest(folder).layout).mend(folder, damages)
        one.start()  # alone
        assert one.end() == "" and verify_cache(folder) == [] and read_all(wanted, folder) == 14
    assert seen == {"lacks parts", "whole"} | ({"refused"} if "shards" in differ else set())


def test_a_cache_begun_while_another_is_lacks_nothing(
    tmp_path: Path, example, tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels and digests that are all zero are what zarr-python leaves out where the setting of the process, which the
    end of a build in another thread took back, says so."""
    wanted, create = example(), zarr.Group.create_array
    wanted = replace(wanted, labels_N=0 * wanted.labels_N, digests_N=0 * wanted.digests_N)

    def as_another_ends(self: zarr.Group, *args: Any, **settings: Any) -> zarr.Array:
        zarr.config.set({"array.write_empty_chunks": False})
        return create(self, *args, **settings)

    create_store(tmp_path / "alone", wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    monkeypatch.setattr(zarr.Group, "create_array", as_another_ends)
    with zarr.config.set({"array.write_empty_chunks": False}):
        create_store(tmp_path / "beside", wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    assert {"data.zarr/labels/c/0", "data.zarr/digests/c/0/0", "data.zarr/keys/c/0"} < tree(tmp_path / "alone").keys()
    assert tree(tmp_path / "beside") == tree(tmp_path / "alone")
