"""One contract for every way of keeping features: what one guarantees the others guarantee."""

from __future__ import annotations

import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorstore
import torch
import webdataset
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from cache import open_cache
from cache.errors import CacheError, DamagedCache, StaleCache, TooCoarse, Unrepresentable
from cache.layout import Shard
from cache.manifest import check_spec, read_manifest, seal, unseal
from cache.size import array_bytes, cache_bytes
from cache.tar import escape_key, unescape_key
from cache.verify import verify_cache
from cache.writer import ChainError, ErrorLimit, create_store, finish, missing_shards, write_rows


class Kept(NamedTuple):
    codec: str
    block: int
    keepbits: int
    compression: str
    backend: str = "zarr"
    store: str = ""


KINDS = [
    Kept("float16", 0, 0, ""),
    Kept("float16", 0, 4, ""),
    Kept("float16", 0, 0, "zstd"),
    Kept("bfloat16", 0, 0, ""),
    Kept("bfloat16", 0, 3, "lz4"),
    Kept("int8", 4, 0, ""),
    Kept("int8", 8, 0, "zstd"),
    Kept("float16", 0, 0, "", "webdataset"),
    Kept("bfloat16", 0, 3, "", "webdataset"),
    Kept("int8", 4, 0, "", "webdataset"),
    Kept("int8", 4, 0, "", "zarr", "s3"),
    Kept("float16", 0, 0, "", "webdataset", "s3"),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kept: "-".join(str(part) for part in kept if part))
def wanted(request, example):
    kept = request.param
    made = example(width=8, prefix=2, codec=kept.codec, block=kept.block, keepbits=kept.keepbits)
    at = request.getfixturevalue("object_store").at if kept.store else made.at
    return replace(made, at=at, layout=replace(made.layout, backend=kept.backend, compression=kept.compression))


@pytest.fixture(scope="module")
def whole(wanted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    wanted.build(folder)
    return folder


def slow_rounding(values: np.ndarray, spec) -> np.ndarray:
    """What shall be read back, value by value in float64."""
    if spec.codec == "int8":
        blocks = values.astype(np.float64).reshape(*values.shape[:-1], -1, spec.block)
        peaks = np.abs(blocks).max(-1, keepdims=True) / 127
        scale = peaks.astype(np.float16)
        scale = np.where(scale.astype(np.float64) < peaks, np.nextafter(scale, np.float16(np.inf)), scale)
        return (np.round(blocks / scale.astype(np.float64)) * scale.astype(np.float64)).reshape(values.shape)
    bits = {"float16": 10, "bfloat16": 7}[spec.codec]
    for kept in (bits, spec.keepbits or bits):
        step = 2.0 ** (np.floor(np.log2(np.abs(values, dtype=np.float64))) - kept)
        values = np.round(values / step) * step
    return values


def test_round_trip_in_any_order(whole: Path, wanted) -> None:
    reader, rows, spec = open_cache(wanted.at(whole), verify=True), [6, 0, 3, 3], wanted.layout.spec
    for view in range(2):
        read = slow_rounding(wanted.features_VNLD[view], spec)
        for group in (None, 0, 3):
            tokens = slice(None) if group is None else slice(group * 4, group * 4 + 4)
            prefix = slice(None) if group is None else slice(group * 2, group * 2 + 2)
            batch = reader.read(rows, view, group)
            assert batch.features_BLD.dtype == batch.prefix_BSD.dtype == torch.float32
            np.testing.assert_allclose(batch.features_BLD, read[rows, tokens], rtol=1e-6)
            np.testing.assert_allclose(batch.prefix_BSD, wanted.prefix_VNSD[view, rows, prefix], rtol=2**-8, atol=1e-6)
            np.testing.assert_array_equal(batch.ids_BL, wanted.token_ids_VNL[view, rows, tokens])
            np.testing.assert_array_equal(batch.pixels_BLP, wanted.pixels_VNLP[view, rows])
            np.testing.assert_array_equal(batch.labels_B, wanted.labels_N[rows])
            assert batch.keys == tuple(wanted.keys[row] for row in rows)
        np.testing.assert_array_equal(reader.crops(rows, view), wanted.crop_VN5[view, rows])


def test_the_manifest_states_the_measured_error(whole: Path, wanted) -> None:
    manifest, reader = read_manifest(wanted.at(whole)), open_cache(wanted.at(whole))
    assert len(manifest.errors) == 2
    for view, error in enumerate(manifest.errors):
        given_ = wanted.features_VNLD[view].astype(np.float64)
        difference = reader.read(range(7), view).features_BLD.numpy() - given_
        assert error.relative_rmse == pytest.approx(np.sqrt((difference**2).sum() / (given_**2).sum()), rel=1e-6)
        assert error.max_abs == pytest.approx(np.abs(difference).max(), rel=1e-6) and error.max_abs > 0
    assert manifest.accumulated_error == max(error.relative_rmse for error in manifest.errors)


def test_the_error_of_a_chain_is_what_was_measured_of_it_and_refused_above_the_bound(
    tmp_path: Path, whole: Path, wanted, tree
) -> None:
    own = read_manifest(wanted.at(whole)).accumulated_error
    layout, shards = wanted.layout, wanted.layout.shards
    create_store(wanted.at(tmp_path), layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    for shard in shards:
        write_rows(wanted.at(tmp_path), layout, shard.view, shard.first_row, wanted.block(shard), ErrorLimit(0.5))
    with pytest.raises(TooCoarse, match=rf"loses {own:.4f} .* at cut 3, .* cache.max_error = 1e-09"):
        finish(wanted.at(tmp_path), layout, ErrorLimit(1e-9))
    chain = ChainError(0.25, 5)
    with pytest.raises(TooCoarse, match=r"at cut 3, .* 0.2500 .* 5 samples.* cache.max_error = 0.24; use cache.codec"):
        ErrorLimit(0.24).check_chain(chain, layout.spec)
    ErrorLimit(0.25).check_chain(chain, layout.spec)
    with pytest.raises(TooCoarse, match="differs by nan"):
        ErrorLimit(0.25).check_chain(ChainError(float("nan"), 5), layout.spec)
    found = finish(wanted.at(tmp_path), layout, ErrorLimit(0.5), chain_error=chain)
    assert (found.accumulated_error, found.error_samples) == (0.25, 5) and found == read_manifest(wanted.at(tmp_path))
    create_store(wanted.at(tmp_path / "b"), layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    before = tree(tmp_path / "b")
    with pytest.raises(TooCoarse, match=r"cache.max_error = 1e-09"):
        write_rows(wanted.at(tmp_path / "b"), layout, 0, 0, wanted.block(shards[0]), ErrorLimit(1e-9))
    assert tree(tmp_path / "b") == before, "not even a part of the shard is left"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), place=st.integers(0, 2**20), mask=st.integers(1, 255))
def test_any_altered_byte_is_found(whole: Path, wanted, data: st.DataObject, place: int, mask: int) -> None:
    if wanted.at(whole) != whole and mask % 12:  # a twelfth of them where every file is a request
        return
    path = data.draw(st.sampled_from(sorted(path for path in whole.rglob("*") if path.is_file())))
    content = path.read_bytes()
    altered = bytearray(content)
    altered[place % len(content)] ^= mask
    path.write_bytes(altered)
    try:
        assert [damage.file for damage in verify_cache(wanted.at(whole))] == [path.relative_to(whole).as_posix()]
        with pytest.raises(DamagedCache, match=f"{re.escape(str(wanted.at(path)))} .*; run `make repair`"):
            reader = open_cache(wanted.at(whole))
            for view in range(2):
                reader.read(range(7), view)
                reader.crops(range(7), view)
                reader.stored("moments", np.arange(7), view)
    finally:
        path.write_bytes(content)


def test_shards_that_were_exchanged_are_never_read(tmp_path: Path, whole: Path, wanted) -> None:
    """Whole files of equal size, each chunk with a checksum that holds: only the manifest knows which lies where."""
    here, there = (wanted.layout.files(Shard(view, 0, 3)) for view in (0, 1))
    for number, names in enumerate([*zip(here, there, strict=True), None]):
        folder = shutil.copytree(whole, tmp_path / f"{number}" / "cache")
        for name, other in [names] if names else zip(here, there, strict=True):
            (folder / name).rename(folder / "aside")
            (folder / other).rename(folder / name)
            (folder / "aside").rename(folder / other)
        reader = open_cache(wanted.at(folder))
        name = f"({'|'.join(names or here + there)})"
        for view in (0, 1):
            with pytest.raises(DamagedCache, match=f"{re.escape(str(wanted.at(folder)))}/{name} .*; run `make repair`"):
                for array in wanted.layout.arrays:
                    reader.stored(array.name, np.arange(3), view)
            assert reader.read([3, 6], view).keys == (wanted.keys[3], wanted.keys[6])


def test_a_manifest_that_does_not_know_the_last_checksums_is_read(tmp_path: Path, whole: Path, wanted) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    values = unseal((folder / "manifest.json").read_bytes())
    known = [entry.pop("last_crc") for entry in values["shards"]]
    assert all(known) is False and any(known) is (wanted.layout.backend == "zarr")
    (folder / "manifest.json").write_bytes(seal(values))
    assert read_manifest(wanted.at(folder)) == read_manifest(wanted.at(whole))
    one, other = (open_cache(wanted.at(place)).read(range(7), 1).features_BLD for place in (folder, whole))
    np.testing.assert_array_equal(one, other)


def test_a_missing_or_truncated_file_is_named_and_repaired_to_the_bit(
    tmp_path: Path, whole: Path, wanted, tree
) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    for number, name in enumerate(wanted.layout.files(Shard(1, 3, 3))):
        if number % 2:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    damages = verify_cache(wanted.at(folder))
    assert {damage.file for damage in damages} == set(wanted.layout.files(Shard(1, 3, 3)))
    assert {(damage.rows, damage.view) for damage in damages} == {(range(3, 6), 1)}
    reader = open_cache(wanted.at(folder))
    reader.read([0, 1, 2, 6], view=1)
    with pytest.raises(DamagedCache, match="run `make repair`"):
        reader.read([4], view=1)
    assert wanted.mend(folder, damages) == [Shard(1, 3, 3)] and tree(folder) == tree(whole)


def test_a_build_goes_on_at_the_first_missing_shard(tmp_path: Path, whole: Path, wanted, tree) -> None:
    create_store(wanted.at(tmp_path), wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    for shard in wanted.layout.shards[:4]:
        write_rows(wanted.at(tmp_path), wanted.layout, shard.view, shard.first_row, wanted.block(shard))
    with pytest.raises(CacheError, match="lacks 2 of 7 parts, first view_1-000000003"):
        finish(wanted.at(tmp_path), wanted.layout)
    other = {"backend": "zarr", "compression": "" if wanted.layout.compression else "lz4"}
    assert missing_shards(wanted.at(tmp_path), replace(wanted.layout, **other)) == list(wanted.layout.shards)
    _, built = wanted.build(tmp_path)
    assert built == list(wanted.layout.shards[4:]) and tree(tmp_path) == tree(whole)


def test_another_fingerprint_is_refused_by_the_field(whole: Path, wanted) -> None:
    for field, value in {"codec": "other", "block": 2, "keepbits": 9, "seed": 5}.items():
        spec = replace(wanted.layout.spec, **{field: value})
        assert spec.fingerprint != wanted.layout.spec.fingerprint
        with pytest.raises(StaleCache, match=f"cache holds {field}=.*, wanted {field}={value}; run `make explain`"):
            check_spec(read_manifest(wanted.at(whole)), spec)


def test_another_versions_manifest_is_stale_and_built_over(tmp_path: Path, whole: Path, wanted, tree) -> None:
    from cache.manifest import atomic_write

    folder = shutil.copytree(whole, tmp_path / "cache")
    atomic_write(wanted.at(folder) / "manifest.json", seal({**read_manifest(wanted.at(folder)).to_dict(), "format": 1}))
    with pytest.raises(StaleCache, match="has format 1, this version reads 3 and 4"):
        open_cache(wanted.at(folder))
    _, built = wanted.build(folder)
    assert built == list(wanted.layout.shards) and tree(folder) == tree(whole)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 3.4e38])
def test_what_cannot_be_held_is_named(tmp_path: Path, wanted, value: float) -> None:
    if wanted.layout.spec.codec == "bfloat16" and np.isfinite(value):
        value = float(np.float32(3.4028e38))
    shard = wanted.layout.shards[4]
    block = wanted.block(shard)
    features = block.features_NLD.copy()
    features[1, 9, 6] = value
    place = f"token {wanted.token_ids_VNL[1, 4, 9]} channel 6"
    if size := wanted.layout.spec.block:
        place += rf" \(block {6 // size} of {8 // size}\)"
    create_store(wanted.at(tmp_path), wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    with pytest.raises(Unrepresentable, match=f"sample 'sämple/4' view 1 {place}: feature .* at cut 3 does not fit"):
        write_rows(wanted.at(tmp_path), wanted.layout, 1, 3, replace(block, features_NLD=features))
    assert shard in missing_shards(wanted.at(tmp_path), wanted.layout)


def test_zarr_python_and_tensorstore_read_the_stored_values(whole: Path, wanted) -> None:
    if wanted.layout.backend != "zarr":
        return
    spec, reader = wanted.layout.spec, open_cache(wanted.at(whole))
    for view in range(2):
        arrays = zarr.open_group(whole / "data.zarr", mode="r")[f"view_{view}"]
        assert set(arrays) == {array.name for array in wanted.layout.arrays}
        for array in wanted.layout.arrays:
            store = {"driver": "file", "path": str(whole / f"data.zarr/view_{view}/{array.name}")}
            opened = tensorstore.open({"driver": "zarr3", "kvstore": store}).result(timeout=60)
            np.testing.assert_array_equal(opened.read().result(timeout=60), arrays[array.name][:])
        values = arrays["features"][:]
        assert values.dtype == {"float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}[spec.codec]
        if spec.codec == "bfloat16":
            assert arrays["features"].attrs["dtype"] == "bfloat16"
            values = (values.astype(np.uint32) << 16).view(np.float32)
        if spec.codec == "int8":
            assert arrays["features"].attrs["block"] == spec.block
            values = values * arrays["scale"][:].astype(np.float32).repeat(spec.block, -1)
        np.testing.assert_array_equal(values.astype(np.float32), reader.read(range(7), view).features_BLD)


def test_sizes_are_predicted(whole: Path, wanted) -> None:
    if wanted.layout.backend == "webdataset":
        total = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        assert cache_bytes(wanted.layout) == pytest.approx(total, rel=0.25)  # metadata of a tiny cache are a large part
        return
    for array in wanted.layout.arrays:
        files = [whole / wanted.layout.file(array, shard.view, shard.first_row) for shard in wanted.layout.shards]
        found, predicted = sum(path.stat().st_size for path in files), array_bytes(wanted.layout, array)
        assert found <= predicted if array.compression else found == predicted


def test_tarfile_and_webdataset_read_the_stored_values(whole: Path, wanted) -> None:
    if wanted.layout.backend != "webdataset":
        return
    reader, spec = open_cache(wanted.at(whole)), wanted.layout.spec
    for shard in wanted.layout.shards:
        path = whole / wanted.layout.files(shard)[0]
        rows = range(shard.first_row, shard.first_row + shard.rows)
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
        assert [unescape_key(sample["__key__"]) for sample in samples] == [wanted.keys[row] for row in rows]
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == len(rows) * (1 + len(wanted.layout.arrays))
        for row, sample in zip(rows, samples, strict=True):
            assert sample["cls"] == wanted.labels_N[row]
            np.testing.assert_array_equal(sample["token_ids.npy"], wanted.token_ids_VNL[shard.view, row])
            np.testing.assert_array_equal(sample["pixels.npy"], wanted.pixels_VNLP[shard.view, row])
            np.testing.assert_array_equal(sample["crop.npy"], wanted.crop_VN5[shard.view, row])
            values = sample["features.npy"]
            if spec.codec == "bfloat16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            if spec.codec == "int8":
                values = values * sample["scale.npy"].astype(np.float32).repeat(spec.block, -1)
            found = reader.read([row], shard.view).features_BLD[0]
            np.testing.assert_array_equal(values.astype(np.float32), found)


def test_an_unfinished_cache_of_the_other_backend_leaves_nothing(tmp_path: Path, whole: Path, wanted, tree) -> None:
    backend = "webdataset" if wanted.layout.backend == "zarr" else "zarr"
    other = replace(wanted.layout, backend=backend, compression="")
    create_store(wanted.at(tmp_path), other, wanted.labels_N, wanted.keys, wanted.digests_N)
    write_rows(wanted.at(tmp_path), other, 0, 0, wanted.block(wanted.layout.shards[0]))
    _, built = wanted.build(tmp_path)
    assert built == list(wanted.layout.shards) and tree(tmp_path) == tree(whole)


@given(key=st.text(max_size=12) | st.text("._/%a", max_size=6), other=st.text("._/%a", max_size=4))
def test_keys_survive_as_names_of_members(key: str, other: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:  # a lone surrogate is no text that a file could hold
        return
    name = escape_key(key)
    assert unescape_key(name) == key and (key == other or escape_key(other) != name)
    assert base_plus_ext(f"{name}.features.npy") == (name, "features.npy")
    assert "." not in name and not name.startswith(("/", "__")) and not name.endswith("/") and "//" not in name


def test_odd_and_long_keys_are_read_by_webdataset(tmp_path: Path, example) -> None:
    keys = ("a/b.c.jpg", "../up", "__x__/y", "/top//z/", "", "%2E", "long/" + "n" * 300)
    made = example(codec="int8", block=2)
    made = replace(made, keys=keys, layout=replace(made.layout, backend="webdataset"))
    made.build(tmp_path)
    assert open_cache(tmp_path).read(range(7)).keys == keys
    found = []
    for number in range(3):
        path = str(tmp_path / f"shards/view_0-{number:06d}.tar")
        found += [unescape_key(sample["__key__"]) for sample in webdataset.WebDataset(path, shardshuffle=False)]
    assert tuple(found) == keys
