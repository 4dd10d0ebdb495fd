"""Caches in an object store, beyond the contract that all keep: other readers, and a store that is not there."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tensorstore
import webdataset
import zarr
from s3fs import S3FileSystem
from zarr.storage import FsspecStore

from cache import open_cache
from cache.errors import CacheError, DamagedCache
from cache.layout import Layout
from cache.manifest import atomic_stream, atomic_write, read_manifest
from cache.objects import ObjectFile
from cache.patience import use_store
from cache.place import (
    OPTIONS,
    StoreUnreachable,
    files_below,
    free_bytes,
    is_there,
    matching,
    place_of,
    read_bytes,
    remove_tree,
)
from cache.verify import verify_cache
from tests.cache.conftest import Example
from tests.object_store import IMPATIENT, KEY, SECRET, ObjectStore


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A store of this test's own, to be stopped."""
    (tmp_path / "bucket").mkdir()
    own = ObjectStore.over(tmp_path / "bucket")
    for name, value in own.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # clients are kept, with the endpoint that they began with
    own.start()
    use_store(IMPATIENT)
    yield own
    own.stop()
    S3FileSystem.clear_instance_cache()


def test_zarr_python_and_tensorstore_read_it_there(object_store: ObjectStore, tmp_path: Path, example) -> None:
    wanted = example(groups=1)
    wanted.build(object_store.at(tmp_path / "cache"))
    url = object_store.url(tmp_path / "cache" / "data.zarr")
    options = OPTIONS["s3"] | {"asynchronous": True}
    arrays = zarr.open_group(FsspecStore.from_url(url, storage_options=options, read_only=True), mode="r")
    for view in range(2):
        np.testing.assert_array_equal(arrays[f"view_{view}/features"][:], wanted.stored_VNLD[view])
    kvstore = {
        "driver": "s3",
        "bucket": object_store.base.name,
        "path": f"{(tmp_path / 'cache').relative_to(object_store.base).as_posix()}/data.zarr/view_1/features/",
        "endpoint": object_store.endpoint,
        "aws_region": "us-east-1",
        "aws_credentials": {"type": "environment"},
    }
    opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result(timeout=60)
    np.testing.assert_array_equal(opened.read().result(timeout=60), wanted.stored_VNLD[1])


def test_tarfile_and_webdataset_read_it_there(object_store: ObjectStore, tmp_path: Path, example) -> None:
    made: Example = example()
    layout = Layout(made.layout.spec, 7, 3, "webdataset")
    wanted = Example(**{**vars(made), "layout": layout})
    wanted.build(object_store.at(tmp_path / "cache"))
    url = object_store.url(tmp_path / "cache" / "shards/view_0-000001.tar")
    with fsspec.open(url, "rb", **OPTIONS["s3"]) as file, tarfile.open(fileobj=file) as tar:
        assert len(tar.getnames()) == 3 * (1 + len(layout.arrays))
    with fsspec.open(url, "rb", **OPTIONS["s3"]) as file:
        samples = webdataset.tariterators.tar_file_expander([{"stream": file, "url": url}])
        values = [sample["data"] for sample in samples if sample.get("fname", "").endswith(".features.npy")]
    assert len(values) == 3


def test_a_store_that_goes_away_is_no_damage_and_comes_back(store: ObjectStore, tmp_path: Path, example) -> None:
    wanted = example()
    place = store.at(tmp_path / "bucket" / "cache")
    wanted.build(place)
    reader = open_cache(place)
    store.stop()
    for reaches in (lambda: reader.read([0, 4]), lambda: read_manifest(place), lambda: verify_cache(place)):
        with pytest.raises(StoreUnreachable, match=r"cannot be reached .* run again"):
            reaches()
    with pytest.raises(StoreUnreachable, match="cannot be reached"):
        wanted.build(store.at(tmp_path / "bucket" / "other"))
    for asks in (is_there, files_below, lambda folder: matching(folder, "*"), remove_tree):
        with pytest.raises(StoreUnreachable):
            asks(place / "data.zarr")
    store.start()
    np.testing.assert_array_equal(reader.read([0, 4]).features_BLD, wanted.stored_VNLD[0, [0, 4]])
    assert verify_cache(place) == []


def test_objects_that_go_or_shrink_are_damage(object_store: ObjectStore, tmp_path: Path, example) -> None:
    wanted = example()
    place = object_store.at(tmp_path / "cache")
    wanted.build(place)
    reader = open_cache(place)
    reader.read(range(7))
    shard = tmp_path / "cache" / "data.zarr/view_0/features/c/0/0/0"
    content = shard.read_bytes()
    os.truncate(shard, 40)
    with pytest.raises(DamagedCache, match="is cut short; run `make repair`"):
        reader.read([2])
    shard.unlink()
    with pytest.raises(DamagedCache, match="is missing; run `make repair`"):
        reader.read([2])
    shard.write_bytes(content)
    np.testing.assert_array_equal(reader.read([2]).features_BLD, wanted.stored_VNLD[0, [2]])


def test_a_bucket_that_is_not_there_is_told_from_damage(object_store: ObjectStore, example) -> None:
    nowhere = place_of("s3://no-such-bucket/cache")
    with pytest.raises(StoreUnreachable, match=r"cannot be written .*create the bucket first"):
        example().build(nowhere)
    with pytest.raises(StoreUnreachable, match="check the bucket's name"):
        ObjectFile(nowhere / "shard", 100).read_into(0, [np.empty(10, np.uint8)])
    assert not is_there(nowhere) and files_below(nowhere) == [] and matching(nowhere, "*") == []


def test_wrong_keys_are_told(object_store: ObjectStore, tmp_path: Path) -> None:
    from upath import UPath

    refused = UPath(object_store.url(tmp_path / "x"), key=KEY, secret=SECRET + "!", **OPTIONS["s3"])
    with pytest.raises(StoreUnreachable, match=r"is refused .*AWS_ACCESS_KEY_ID"):
        read_bytes(refused)


def test_no_part_of_an_object_is_ever_there(object_store: ObjectStore, tmp_path: Path) -> None:
    place = object_store.at(tmp_path / "x" / "shard")

    def parts():
        yield b"a" * 1000
        raise RuntimeError("the encoder stopped")

    with pytest.raises(RuntimeError, match="the encoder stopped"):
        atomic_stream(place, parts(), 2000)
    assert not is_there(place)
    atomic_write(place, b"old")
    with pytest.raises(RuntimeError):
        atomic_stream(place, parts(), 2000)
    assert read_bytes(place) == b"old" and free_bytes(place) == float("inf")


def test_a_store_that_keeps_less_than_it_was_sent_is_told(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = object_store.at(tmp_path / "x" / "short")
    plain = place.fs.put_file  # type: ignore[attr-defined]

    def short(source: str, target: str, **how: int) -> None:
        os.truncate(source, 3)
        plain(source, target, **how)

    monkeypatch.setattr(place.fs, "put_file", short)  # type: ignore[attr-defined]
    with pytest.raises(StoreUnreachable, match=r"has 3 bytes instead of the 6 that were sent.*run again"):
        atomic_write(place, b"abcdef")


def test_a_full_temporary_folder_is_told(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(CacheError, match=r"cannot write to .*gone on the way to .* set TMPDIR, and run again"):
        atomic_write(object_store.at(tmp_path / "x" / "any"), b"abcdef")


@pytest.mark.parametrize("protocol", ["s3", "s3a"])
def test_what_another_process_writes_after_a_listing_is_there(
    object_store: ObjectStore, tmp_path: Path, protocol: str
) -> None:
    """A worker's receipts, for instance: a client that keeps listings would deny them."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "first").write_bytes(b"1")
    place = place_of(object_store.url(tmp_path / "x").replace("s3:", f"{protocol}:"))
    assert [path.name for path in matching(place, "*")] == ["first"] and len(files_below(place)) == 1
    (tmp_path / "x" / "second").write_bytes(b"2")  # not by this client
    assert read_bytes(place / "second") == b"2" and is_there(place / "second")
    assert [path.name for path in matching(place, "*")] == ["first", "second"] and len(files_below(place)) == 2


def test_no_protocol_keeps_listings_and_all_names_of_a_store_have_its_settings(tmp_path: Path) -> None:
    assert place_of("s3a://bucket/x").fs.config_kwargs == place_of("s3://bucket/x").fs.config_kwargs  # type: ignore[attr-defined]
    for url in ("s3://bucket/x", "s3a://bucket/x", "memory://x"):
        assert not place_of(url).fs.dircache.use_listings_cache  # type: ignore[attr-defined]


def test_other_protocols_and_files(tmp_path: Path, example) -> None:
    wanted = example()
    wanted.build(place_of("memory://caches/cut-3"))
    found = open_cache("memory://caches/cut-3")
    np.testing.assert_array_equal(found.read([3]).features_BLD, wanted.stored_VNLD[0, [3]])
    assert verify_cache(place_of("memory://caches/cut-3")) == []
    assert place_of("file:" + f"//{tmp_path}") == tmp_path and place_of(tmp_path) is tmp_path
    with pytest.raises(CacheError, match=r"nonsense://x cannot be opened .*; see fsspec's list of protocols"):
        place_of("nonsense://x")
