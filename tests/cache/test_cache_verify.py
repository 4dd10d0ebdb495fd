from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import open_cache
from cache.errors import CacheError, DamagedCache, MissingCache
from cache.layout import Shard
from cache.verify import Damage, drop_manifest, remove_cache, verify_cache
from cache.writer import create_store, missing_shards


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, example) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    example().build(folder)
    return folder


def flip(path: Path, place: int, mask: int) -> bytes:
    """Alters one byte; returns the old content."""
    content = path.read_bytes()
    altered = bytearray(content)
    altered[place % len(content)] ^= mask
    path.write_bytes(altered)
    return content


def read_everything(folder: Path) -> None:
    reader = open_cache(folder)
    for view in range(2):
        reader.read(range(7), view)
        reader.crops(range(7), view)
        reader.stored("moments", np.arange(7), view)


def test_a_whole_cache_has_no_damage(whole: Path) -> None:
    assert verify_cache(whole) == []
    read_everything(whole)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), place=st.integers(0, 2**20), mask=st.integers(1, 255))
def test_any_altered_byte_is_found(whole: Path, data: st.DataObject, place: int, mask: int) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in whole.rglob("*") if path.is_file())))
    name = path.relative_to(whole).as_posix()
    content = flip(path, place, mask)
    try:
        assert [damage.file for damage in verify_cache(whole)] == [name]
        with pytest.raises(DamagedCache, match=f"{re.escape(str(path))} .*; run `make repair`"):
            read_everything(whole)
    finally:
        path.write_bytes(content)


def test_damage_stays_where_it_is(tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    path = folder / "data.zarr/view_0/features/c/1/0/0"
    chunk = 4 * 6 * 2 + 4
    flip(path, (1 * 4 + 2) * chunk, 1)  # row 4, group 2
    reader = open_cache(folder)
    for group in (0, 1, 3):
        reader.read([3, 4, 5], group=group)
    reader.read([3, 5], group=2)
    reader.read(range(7), view=1)
    with pytest.raises(DamagedCache, match=f"{path} is altered in chunk 6"):
        reader.read([4], group=2)


def test_reports_say_what_and_which_rows(tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    store = folder / "data.zarr"
    size = (store / "view_0/pixels/c/0/0/0").stat().st_size
    with (store / "view_0/pixels/c/0/0/0").open("ab") as file:
        file.write(b"x")
    (store / "view_1/features/c/2/0/0").unlink()
    flip(store / "keys/c/0", 6, 4)
    assert verify_cache(folder) == [
        Damage("data.zarr/keys/c/0", "is altered"),
        Damage("data.zarr/view_0/pixels/c/0/0/0", f"has {size + 1} bytes instead of {size}", range(0, 3), 0),
        Damage("data.zarr/view_1/features/c/2/0/0", "is missing", range(6, 7), 1),
    ]


def test_exchanged_shards_are_found(tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    first, second = (folder / f"data.zarr/view_{view}/features/c/0/0/0" for view in (0, 1))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert [damage.view for damage in verify_cache(folder)] == [0, 1]


def test_repair_rebuilds_only_what_is_bad(tmp_path: Path, whole: Path, example, tree) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    store = folder / "data.zarr"
    flip(store / "view_0/token_ids/c/1/0", 3, 128)
    (store / "view_1/crop/c/2/0").unlink()
    assert example().mend(folder, verify_cache(folder)) == [Shard(0, 3, 3), Shard(1, 6, 1)]
    assert tree(folder) == tree(whole)


def test_a_damaged_manifest_rebuilds_everything(tmp_path: Path, whole: Path, example, tree) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    flip(folder / "manifest.json", 100, 1)
    damages = verify_cache(folder)
    assert [damage.file for damage in damages] == ["manifest.json"]
    with pytest.raises(DamagedCache, match="run `make repair`"):
        example().build(folder)
    drop_manifest(folder)
    with pytest.raises(MissingCache, match="is unfinished"):
        open_cache(folder)
    _, built = example().build(folder)
    assert len(built) == 6 and tree(folder) == tree(whole)


def test_remove(tmp_path: Path, whole: Path, example) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    remove_cache(folder)
    assert not folder.exists()
    wanted = example()
    create_store(folder, wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    assert len(missing_shards(folder, wanted.layout)) == 6
    remove_cache(folder)
    assert not folder.exists()
    (tmp_path / "photos").mkdir()
    with pytest.raises(CacheError, match="photos is no cache; nothing was removed"):
        remove_cache(tmp_path / "photos")
    assert (tmp_path / "photos").is_dir()
