"""Caches that take over what a finished cache beside them has of the same samples and views: the rest alone is
computed, and the result is what building it from nothing gives."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from cache import open_cache
from cache.errors import CacheError
from cache.layout import Layout
from cache.manifest import read_manifest
from cache.size import cache_bytes
from cache.verify import verify_cache
from models.config import ModelConfig
from models.vit import Encoder, build_encoder, frozen_hash
from stages import encode
from stages.config import DataConfig
from stages.encode import EncodeJob, build
from stages.images import ImageList, open_images
from stages.mend import mend
from tests.encoding import encode_job, tiny_spec

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=4, heads=2)
NAMES = [f"{name}.png" for name in ("a", "c", "e", "g", "i", "k", "m")]


def folder_of(root: Path, names: Sequence[str], edited: Sequence[str] = ()) -> DataConfig:
    """A folder of images, each a pure function of its name; of those edited another one; beside it one to score."""
    root.mkdir(parents=True)
    val = root.with_name(f"{root.name}-val")
    val.mkdir()
    Image.new("RGB", (24, 24)).save(val / "v.png")
    for name in names:
        seed = sum(name.encode()) + 1000 * (name in edited)
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(root / name)
    return DataConfig(source=str(root), val_source=str(val))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(MODEL, seed=3).eval()


@pytest.fixture(scope="module")
def weights(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(encoder.vit.state_dict(), path)
    return path


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples went through the frozen blocks, call by call."""
    plain, seen = encode.frozen_forward, []

    def counted(model: Encoder, job: EncodeJob, part: encode.Part) -> Any:
        seen.append(len(part.keys))
        return plain(model, job, part)

    monkeypatch.setattr(encode, "frozen_forward", counted)
    return seen


@pytest.fixture
def make(encoder: Encoder, weights: Path) -> Callable[..., Path]:
    """make(folder, data, ...) builds a cache, in shards of 3 rows and batches of 1, or mends `damages` of it."""

    def made(folder: Path, data: DataConfig, cut: int = 2, parent: Path | None = None, **changes: Any) -> Path:
        images: ImageList = open_images(data.source)
        held = read_manifest(parent) if parent else None
        backend, told = changes.pop("backend", "zarr"), changes.pop("told", [])
        damages = changes.pop("damages", ())
        settled = {"groups": 2, "pixels": True, "parent": held.fingerprint if held else ""}
        spec = tiny_spec(images, data, frozen_hash(encoder.vit.state_dict(), cut), cut, **(settled | changes))
        layout = Layout(spec, len(images), shard_rows=3, backend=backend)
        index = str(folder.parent / f"index-{folder.name}")
        job = encode_job(folder, layout, MODEL, data, weights, batch=1, parent=parent, index_folder=index)

        def serial(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
            return map(function, tasks)

        encode.training_images.cache_clear()
        monkey = encode.training_images
        encode.training_images = lambda *_: images  # type: ignore[assignment] # a tenth is not held out here
        try:
            list(mend(job, images, damages, serial) if damages else build(job, images, serial, told.append))
        finally:
            encode.training_images = monkey
        assert verify_cache(folder) == []
        return folder

    return made


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def alike(grown: Path, fresh: Path) -> bool:
    """Whether two caches are equal, file by file, but that the first does not know the batches of some shards."""
    found, known = read_manifest(grown), read_manifest(fresh)
    shards = (replace(e, batch=e.batch or k.batch) for e, k in zip(found.shards, known.shards, strict=True))
    one, other = (files(folder) | {"manifest.json": b""} for folder in (grown, fresh))
    return one == other and replace(found, shards=tuple(shards)) == known


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_new_edited_and_removed_images_cost_what_is_new(
    tmp_path: Path, make: Callable[..., Path], forwards: list[int], backend: str, codec: str
) -> None:
    """Nine images: b is new and sorts in between, z is new at the end, e was edited, k is gone."""
    how = {"backend": backend, "codec": codec, "block": 8 if codec == "int8" else 0}
    make(tmp_path / "root" / "cut-2-old", folder_of(tmp_path / "old", NAMES), **how)
    names = sorted({*NAMES, "b.png", "z.png", "h.png"} - {"k.png"})
    grown = folder_of(tmp_path / "new", names, edited=["e.png"])
    forwards.clear()
    told: list[str] = []
    found = make(tmp_path / "root" / "cut-2-new", grown, told=told, **how)
    assert sum(forwards) == 2 * 4, "two views of b, e, h and z"
    donor = tmp_path / "root" / "cut-2-old"
    assert told == [f"10 of 18 rows are taken over from {donor} or there already, 8 are computed"]
    forwards.clear()
    fresh = make(tmp_path / "elsewhere" / "cut-2-new", grown, **how)
    assert sum(forwards) == 2 * 9
    assert alike(found, fresh)


def test_views_are_added_and_taken_away(tmp_path: Path, make: Callable[..., Path], forwards: list[int]) -> None:
    data = folder_of(tmp_path / "data", NAMES)
    two = make(tmp_path / "root" / "two", data)
    forwards.clear()
    four = make(tmp_path / "root" / "four", data, views=4)
    assert sum(forwards) == 2 * 7
    assert files(four) == files(make(tmp_path / "elsewhere" / "four", data, views=4))
    shared = "data.zarr/view_1/features/c/0/0/0"
    assert os.stat(two / shared).st_ino == os.stat(four / shared).st_ino, "linked, not copied"
    forwards.clear()
    make(tmp_path / "root" / "three", data, views=3)
    assert forwards == []


def test_the_oldest_view_is_replaced_in_its_slot(
    tmp_path: Path, make: Callable[..., Path], forwards: list[int]
) -> None:
    data = folder_of(tmp_path / "data", NAMES)
    make(tmp_path / "root" / "0", data)
    forwards.clear()
    turned = make(tmp_path / "root" / "1", data, first_view=1)
    assert sum(forwards) == 7
    three = open_cache(make(tmp_path / "elsewhere" / "all", data, views=3))
    for slot, view in ((0, 2), (1, 1)):
        assert read_manifest(turned).spec.view_at(slot) == view
        here, there = open_cache(turned).read(range(7), slot), three.read(range(7), view)
        np.testing.assert_array_equal(here.features_BLD, there.features_BLD)


def test_only_what_is_new_must_fit_the_disk(
    tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    """A turn of a ring of three views writes one of them; the others are linked and take nothing."""
    data = folder_of(tmp_path / "data", NAMES)
    first = make(tmp_path / "root" / "0", data, views=3)
    view = cache_bytes(read_manifest(first).layout) // 3
    usage = namedtuple("usage", "total used free")
    free = [view - 1]
    monkeypatch.setattr("cache.place.shutil.disk_usage", lambda path: usage(0, 0, free[0]))
    forwards.clear()
    with pytest.raises(CacheError, match=r"needs 0\.0 GB more, its disk has 0\.0 GB"):
        make(tmp_path / "root" / "1", data, views=3, first_view=1)
    assert forwards == []
    free[0] = view
    make(tmp_path / "root" / "1", data, views=3, first_view=1)
    assert sum(forwards) == 7
    free[0] = 0
    make(tmp_path / "root" / "1", data, views=3, first_view=1)  # it is there


def test_a_second_cut_takes_over_though_its_parent_is_another(
    tmp_path: Path, make: Callable[..., Path], forwards: list[int]
) -> None:
    old, new = folder_of(tmp_path / "old", NAMES), folder_of(tmp_path / "new", [*NAMES, "z.png"])
    root = tmp_path / "root"
    make(root / "late-old", old, 3, parent=make(root / "early-old", old))
    forwards.clear()
    late = make(root / "late-new", new, 3, parent=make(root / "early-new", new))
    assert sum(forwards) == 2 * 2 + 2 * 2 * 8, "two views of z, at both cuts; of all 8 to measure, from both sides"
    other = tmp_path / "elsewhere"
    fresh = make(other / "late-new", new, 3, parent=make(other / "early-new", new))
    assert alike(late, fresh)
    forwards.clear()
    make(root / "late-images", new, 3)  # from images: other numbers, since nothing was rounded at cut 2
    assert sum(forwards) == 2 * 8


@pytest.mark.parametrize("changed", [{"seed": 6}, {"codec": "bfloat16"}, {"groups": 4}, {"pixels": False}])
def test_a_cache_of_another_making_gives_nothing(
    tmp_path: Path, make: Callable[..., Path], forwards: list[int], changed: dict[str, Any]
) -> None:
    data = folder_of(tmp_path / "data", NAMES)
    make(tmp_path / "root" / "a", data)
    forwards.clear()
    make(tmp_path / "root" / "b", data, **changed)
    assert sum(forwards) == 2 * 7


def test_damage_is_not_inherited(tmp_path: Path, make: Callable[..., Path], forwards: list[int]) -> None:
    """A flipped byte in a shard that would be linked: that shard is computed."""
    data = folder_of(tmp_path / "data", NAMES)
    two = make(tmp_path / "root" / "two", data)
    bad = two / "data.zarr/view_1/features/c/1/0/0"
    content = bytearray(bad.read_bytes())
    content[100] ^= 4
    bad.write_bytes(content)
    forwards.clear()
    four = make(tmp_path / "root" / "four", data, views=4)
    assert sum(forwards) == 2 * 7 + 3
    assert files(four) == files(make(tmp_path / "elsewhere" / "four", data, views=4))


def test_mending_one_cache_leaves_those_that_share_its_files_alone(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    data = folder_of(tmp_path / "data", NAMES)
    two = make(tmp_path / "root" / "two", data)
    four = make(tmp_path / "root" / "four", data, views=4)
    want = files(four)
    shard = "data.zarr/view_0/features/c/0/0/0"
    (two / shard).unlink()
    make(two, data, damages=verify_cache(two))
    assert files(four) == want


def test_a_file_that_the_donor_has_lost_is_computed(
    tmp_path: Path, make: Callable[..., Path], forwards: list[int]
) -> None:
    data = folder_of(tmp_path / "data", NAMES)
    two = make(tmp_path / "root" / "two", data)
    (two / "data.zarr/view_1/features/c/1/0/0").unlink()
    forwards.clear()
    four = make(tmp_path / "root" / "four", data, views=4)
    assert sum(forwards) == 2 * 7 + 3
    assert files(four) == files(make(tmp_path / "elsewhere" / "four", data, views=4))


def test_a_donor_that_is_removed_while_new_rows_are_computed_costs_the_rest(
    tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = folder_of(tmp_path / "new", [*NAMES, "z.png"])
    donor = make(tmp_path / "root" / "old", folder_of(tmp_path / "data", NAMES))
    plain = encode.encode_rows

    def while_gc_runs(*given: Any) -> Any:
        shutil.rmtree(donor, ignore_errors=True)
        return plain(*given)

    monkeypatch.setattr(encode, "encode_rows", while_gc_runs)
    found = make(tmp_path / "root" / "new", longer)
    assert not donor.exists() and alike(found, make(tmp_path / "elsewhere" / "new", longer))
