"""A cache is made of what its spec names: every input is compared with its hash when it is read and once more before
the cache is finished. And what is mended is what was there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache import open_cache
from cache.backends import files_of as files_of_backend
from cache.errors import StaleCache
from cache.layout import Layout, Shard
from cache.manifest import atomic_write, read_manifest, seal
from cache.verify import verify_cache
from models.config import ModelConfig
from models.vit import Encoder, build_encoder, frozen_hash
from stages import encode, index
from stages.config import DataConfig
from stages.encode import EncodeJob, build, frozen_encoder, training_images
from stages.errors import DataError
from stages.images import ImageList, open_data, open_images
from stages.mend import mend
from tests.cache.conftest import files_of
from tests.encoding import encode_job, tiny_spec

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=3, heads=2)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(MODEL, seed=3).eval()


@pytest.fixture
def source(tmp_path: Path, picture, fill) -> Path:
    """17 images, and one to evaluate on."""
    fill(tmp_path / "val", {"v.png": picture(50)})
    return fill(tmp_path / "images", {f"{row:02d}.png": picture(row, size=(20, 20)) for row in range(17)})


def data_of(source: Path) -> DataConfig:
    return DataConfig(source=str(source), val_source=str(source.with_name("val")))


@pytest.fixture
def images(source: Path, tmp_path: Path) -> ImageList:
    return open_data(data_of(source), tmp_path / "index").train


@pytest.fixture
def job(tmp_path: Path, source: Path, images: ImageList, encoder: Encoder) -> EncodeJob:
    return job_over(tmp_path, source, images, encoder)


def job_over(tmp_path: Path, source: Path, images: ImageList, encoder: Encoder) -> EncodeJob:
    """A cache of two views at cut 1."""
    weights = tmp_path / "model.safetensors"
    save_file(encoder.vit.state_dict(), weights)
    data, blocks = data_of(source), frozen_hash(encoder.vit.state_dict(), 1)
    spec = tiny_spec(images, data, blocks, 1, depth=3, pixels=True, view_transform="crop")
    return encode_job(tmp_path / "cache", Layout(spec, len(images), shard_rows=6), MODEL, data, weights, batch=4)


def child_of(job: EncodeJob, encoder: Encoder, name: str = "child") -> EncodeJob:
    """The cache of the next cut."""
    weights = frozen_hash(encoder.vit.state_dict(), 2)
    spec = replace(job.layout.spec, cut=2, weights=weights, parent=read_manifest(job.folder).fingerprint)
    layout = replace(job.layout, spec=spec)
    folder = str(Path(job.folder).with_name(name))
    return replace(job, folder=folder, layout=layout, parent=job.folder, parent_cut=1)


def put_back(path: Path, content: bytes) -> None:
    """Other bytes, of the same size, under the old times and the old inode."""
    stat = path.stat()
    assert len(content) == stat.st_size
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and path.stat().st_ino == stat.st_ino


def altered(path: Path) -> bytes:
    content = path.read_bytes()
    return content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]


# --- images -----------------------------------------------------------------------------------------------------------


def test_an_edit_in_place_with_its_times_put_back_is_noticed(tmp_path: Path, picture, fill) -> None:
    source, kept = fill(tmp_path / "images", {"a.bmp": picture(1, "BMP"), "b.bmp": picture(2, "BMP")}), tmp_path / "i"
    first = open_images(str(source), index_file=kept)
    put_back(source / "a.bmp", altered(source / "a.bmp"))
    second = open_images(str(source), index_file=kept)
    assert second.digest != first.digest and second.entries[1] == first.entries[1]


def test_an_edit_at_once_after_listing_is_noticed(tmp_path: Path, picture, fill) -> None:
    """Within one tick of the clock that stamps files, times stay as they are: the index is older than that."""
    for number in range(20):
        source = fill(tmp_path / str(number), {"a.bmp": picture(number, "BMP")})
        kept = tmp_path / f"{number}.json"
        first = open_images(str(source), index_file=kept)
        put_back(source / "a.bmp", altered(source / "a.bmp"))
        assert open_images(str(source), index_file=kept).digest != first.digest


def test_a_replaced_file_is_noticed_whatever_its_times(tmp_path: Path, picture, fill) -> None:
    source, kept = fill(tmp_path / "images", {"a.bmp": picture(1, "BMP")}), tmp_path / "i"
    os.utime(source / "a.bmp", (2**33, 2**33))  # from the future
    first = open_images(str(source), index_file=kept)
    fill(tmp_path, {"other.bmp": picture(2, "BMP")})
    os.utime(tmp_path / "other.bmp", (2**33, 2**33))
    (tmp_path / "other.bmp").replace(source / "a.bmp")
    assert open_images(str(source), index_file=kept).digest != first.digest


def test_an_image_that_changes_while_it_is_listed_stops_the_listing(tmp_path: Path, picture, fill, monkeypatch) -> None:
    source = fill(tmp_path / "images", {"a.bmp": picture(1, "BMP"), "b.bmp": picture(2, "BMP")})
    inspect = index._inspect

    def edit_behind(entry, read):
        found = inspect(entry, read)
        if entry.key == "a.bmp":
            put_back(source / "a.bmp", altered(source / "a.bmp"))
        return found

    monkeypatch.setattr(index, "_inspect", edit_behind)
    with pytest.raises(DataError, match=r"a\.bmp was changed while it was read; run again when nothing writes to"):
        open_images(str(source), index_file=tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_an_image_edited_during_a_build_stops_it_by_name(job: EncodeJob, images: ImageList) -> None:
    building = build(job, images, map)
    next(building)
    victim = Path(images.entries[-1].file)
    good = victim.read_bytes()
    put_back(victim, altered(victim))
    with pytest.raises(DataError, match=f"{victim.name} in .* was changed since the images were listed; restore it"):
        list(building)
    put_back(victim, good)
    assert next(build(job, images, map)) == (3, 6), "what was made is kept"


def as_packed(picture: Callable[..., bytes], names: str = "abc", edited: str = "", label: int = 1) -> dict[str, bytes]:
    """Images by their names, that of `edited` another one, and their labels, that of b to be chosen."""
    contents = {name: picture(ord(name) + 100 * (name == edited), size=(20, 20)) for name in names}
    labels = {name: label if name == "b" else 0 for name in names}
    return {file: made for n in names for file, made in ((f"{n}.png", contents[n]), (f"{n}.cls", b"%d" % labels[n]))}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"edited": "b"}, "b in {} was changed"),
        ({"names": "abcd"}, "d in {} was added"),
        ({"names": "ac"}, "b in {} was removed"),
        ({"label": 2}, "b in {} was relabelled"),
        ({"names": "acb"}, "c in {} was put elsewhere in the order"),
        ({"names": "acbd", "label": 2}, "d in {} was added"),
    ],
    ids=["changed", "added", "removed", "relabelled", "reordered", "all at once"],
)
def test_images_that_change_after_they_were_read_are_named_before_the_cache_is_finished(
    tmp_path: Path, encoder: Encoder, picture, fill, pack, change: dict[str, Any], told: str
) -> None:
    fill(tmp_path / "val", {"v.png": picture(50)})
    source = pack(tmp_path / "a.tar", as_packed(picture))
    images = open_data(data_of(source), tmp_path / "index").train
    building = build(job_over(tmp_path, source, images, encoder), images, map)
    for _ in range(2):
        next(building)
    pack(source, as_packed(picture, **change))
    with pytest.raises(StaleCache, match=f"^{told.format(source)} while the cache was built; undo that, or run again"):
        next(building)
    assert not (tmp_path / "cache" / "manifest.json").exists()


# --- weights and parents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", [False, True], ids=["in a new folder", "over a cache of another version"])
def test_weights_that_change_during_a_build_are_named(job: EncodeJob, images: ImageList, over: bool) -> None:
    if over:
        atomic_write(Path(job.folder) / "manifest.json", seal({"format": 2}))
    building = build(job, images, map)
    for _ in range(6):
        next(building)
    save_file(build_encoder(MODEL, seed=4).vit.state_dict(), job.weights)
    with pytest.raises(StaleCache, match=rf"{job.weights} has weights=\w{{8}}… up to cut 1, the cache wants"):
        next(building)


def test_a_parent_that_is_built_anew_during_a_build_is_named(job: EncodeJob, images, encoder: Encoder) -> None:
    list(build(job, images, map))
    child = child_of(job, encoder)
    building = build(child, images, map)
    for _ in range(6):
        next(building)
    from cache.manifest import write_manifest

    manifest = read_manifest(job.folder)
    write_manifest(job.folder, replace(manifest, accumulated_error=0.5))
    with pytest.raises(StaleCache, match=f"{job.folder} was built anew while it was read; run again"):
        next(building)
    write_manifest(job.folder, manifest)
    assert list(build(child, images, map)) == [] and verify_cache(Path(child.folder)) == []


def test_the_model_is_built_once_a_worker(job: EncodeJob, images: ImageList, monkeypatch) -> None:
    made = []
    plain = encode.build_encoder
    monkeypatch.setattr(encode, "build_encoder", lambda *args, **more: (made.append(1), plain(*args, **more))[1])
    frozen_encoder.cache_clear()
    training_images.cache_clear()
    assert len(list(build(job, images, map))) == 6 and len(made) == 1


# --- repair -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_a_cache_is_mended_as_it_was_built_whatever_the_settings_say_today(
    job: EncodeJob, images: ImageList, backend: str
) -> None:
    job = replace(job, layout=replace(job.layout, backend=backend))
    list(build(job, images, map))
    folder = Path(job.folder)
    whole = files_of(folder)
    assert {e.batch for e in read_manifest(folder).shards if e.moments} == {4}
    today = replace(
        job, batch=3, layout=Layout(job.layout.spec, len(images), 7, "zarr", "zstd" if backend == "zarr" else "")
    )
    bad = [job.layout.files(Shard(0, 6, 6))[0], job.layout.files(Shard(1, 0, 6))[-1]]
    (folder / bad[0]).unlink()
    (folder / bad[1]).write_bytes(altered(folder / bad[1]))
    static = next(name for name in whole if "labels" in name)
    (folder / static).write_bytes(b"")
    good = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    damages = verify_cache(folder)
    assert {damage.file for damage in damages} == {*bad, static}
    ran: list[Shard] = []
    batches: list[int] = []

    def counted(function, tasks):
        for task in tasks:
            batches.append(task[0].batch)
            ran.append(function(task))
            yield ran[-1]

    assert list(mend(today, images, damages, counted)) == [(1, 2), (2, 2)]
    assert ran == [Shard(0, 6, 6), Shard(1, 0, 6)] and batches == [4, 4]
    assert files_of(folder) == whole
    again = {name for shard in ran for name in job.layout.files(shard)} | {static}
    kept = {path: time for path, time in good.items() if path.relative_to(folder).as_posix() not in again}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_repair_that_is_stopped_is_found_and_goes_on(job: EncodeJob, images: ImageList) -> None:
    list(build(job, images, map))
    folder = Path(job.folder)
    whole = files_of(folder)
    for shard in (Shard(0, 0, 6), Shard(1, 6, 6)):
        (folder / job.layout.files(shard)[0]).unlink()
    stopped = mend(job, images, verify_cache(folder), map)
    next(stopped)
    stopped.close()
    left = verify_cache(folder)
    assert [damage.file for damage in left] == [job.layout.files(Shard(1, 6, 6))[0]]
    list(mend(job, images, left, map))
    assert files_of(folder) == whole


def test_a_shard_that_another_machine_computes_otherwise_is_taken_into_the_manifest(
    job: EncodeJob, images: ImageList, encoder: Encoder, monkeypatch
) -> None:
    """The last bits of a product differ between processors: the mended cache is whole and says what it holds."""
    list(build(job, images, map))
    folder, before = Path(job.folder), read_manifest(job.folder)
    (folder / job.layout.files(Shard(0, 0, 6))[0]).unlink()
    plain = encode.frozen_forward

    def elsewhere(*args) -> tuple[torch.Tensor, torch.Tensor]:
        features, prefix = plain(*args)
        return features * np.float32(1 + 2**-9), prefix

    monkeypatch.setattr(encode, "frozen_forward", elsewhere)
    told: list[str] = []
    list(mend(job, images, verify_cache(folder), map, told.append))
    after = read_manifest(folder)
    assert verify_cache(folder) == [] and after != before
    assert len(told) == 1 and told[0].startswith(f"{folder}: what was mended is not to the bit what was there")
    changed = [e.name for e, old in zip(after.shards, before.shards, strict=True) if e != old]
    assert set(changed) <= set(job.layout.files(Shard(0, 0, 6))) and changed and after.stats[1] == before.stats[1]
    assert after.stats[0].std > before.stats[0].std


@pytest.mark.parametrize("beside", [True, False], ids=["bits depend on the batch", "they do not"])
def test_a_repair_of_a_grown_cache_says_so_where_its_batches_give_other_bits(
    job: EncodeJob, images: ImageList, source: Path, encoder: Encoder, picture, fill, monkeypatch, beside: bool
) -> None:
    """Of 18 images in shards of 6 the last is new: alone in its batch, its shard was computed in no batches of 4."""
    plain = encode.frozen_forward

    def forward(model: Encoder, job: EncodeJob, part: encode.Part) -> tuple[torch.Tensor, torch.Tensor]:
        features, prefix = plain(model, job, part)
        return features * (1 + beside * len(part.keys) * 2**-9), prefix

    monkeypatch.setattr(encode, "frozen_forward", forward)
    list(build(job, images, map))
    fill(source, {"99.png": picture(99, size=(20, 20))})
    folder, grown = source.with_name("grown"), open_data(data_of(source), source.with_name("index")).train
    job = replace(job_over(source.parent, source, grown, encoder), folder=str(folder))
    list(build(job, grown, map))

    def batches() -> list[int]:
        return [entry.batch for entry in read_manifest(folder).shards if entry.moments]

    assert batches() == [4, 4, 0, 4, 4, 0], "two shards of each view are linked"
    whole, told = files_of(folder), list[str]()
    for shard in (Shard(0, 12, 6), Shard(0, 0, 6)):
        (folder / job.layout.files(shard)[0]).unlink()
    list(mend(job, grown, verify_cache(folder), map, told.append))
    assert verify_cache(folder) == [] and batches() == [4, 4, 4, 4, 4, 0], "now it is known"
    changed = {name for name, content in files_of(folder).items() if whole[name] != content}
    assert changed <= {"manifest.json", *job.layout.files(Shard(0, 12, 6))} and len(told) == beside
    assert (job.layout.files(Shard(0, 12, 6))[0] in changed) == beside
    whole = files_of(folder)
    (folder / job.layout.files(Shard(0, 12, 6))[0]).unlink()
    list(mend(job, grown, verify_cache(folder), map, told.append))
    assert files_of(folder) == whole and len(told) == beside


@pytest.mark.parametrize(("backend", "name"), [("zarr", "data.zarr/keys/zarr.json"), ("webdataset", "index/keys.json")])
def test_metadata_that_is_written_otherwise_today_is_taken_into_the_manifest(
    job: EncodeJob, images: ImageList, backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library of another version spaces its JSON otherwise: what is mended is read, and what is sound stays."""
    job = replace(job, layout=replace(job.layout, backend=backend))
    list(build(job, images, map))
    folder, before, whole = Path(job.folder), read_manifest(job.folder), files_of(Path(job.folder))
    writer = files_of_backend(backend)
    plain = writer.static_files

    def spaced(*args) -> dict[str, bytes]:
        return {name: content + b"\n" * name.endswith(".json") for name, content in plain(*args).items()}

    monkeypatch.setattr(writer, "static_files", spaced)
    (folder / name).write_bytes(b"{")
    assert list(mend(job, images, verify_cache(folder), map)) == []
    assert verify_cache(folder) == [] and open_cache(folder, verify=True).keys[16] == "16.png"
    after = files_of(folder)
    assert {file for file in whole if whole[file] != after[file]} == {name, "manifest.json"}
    assert after[name] == whole[name] + b"\n" and not (folder / "receipts").exists()
    old, new = ({entry.name: entry for entry in found.shards} for found in (before, read_manifest(folder)))
    assert {file for file in old if old[file] != new[file]} == {name}


def test_metadata_that_nobody_writes_any_more_has_a_remedy(job: EncodeJob, images: ImageList, monkeypatch) -> None:
    list(build(job, images, map))
    folder = Path(job.folder)
    writer = files_of_backend("zarr")
    plain = writer.static_files

    def moved(*args) -> dict[str, bytes]:
        return {name.replace("keys/c/0", "keys/0"): content for name, content in plain(*args).items()}

    monkeypatch.setattr(writer, "static_files", moved)
    (folder / "data.zarr/keys/c/0").unlink()
    before = files_of(folder)
    with pytest.raises(StaleCache, match=f"no longer writes {folder}/data.zarr/keys/c/0; remove {folder}, and build"):
        list(mend(job, images, verify_cache(folder), map))
    assert files_of(folder) == before
