"""Images behind URLs: the same list as of the same images on a disk, read by ranges through local copies."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cache.errors import CacheError
from cache.patience import repeated, use_store
from cache.place import StoreUnreachable
from stages.config import DataConfig
from stages.errors import DataError
from stages.images import ImageList, open_data, open_images
from stages.views import image_batch
from tests.faulty import THROUGH_PROXY, Fault, FaultyStore
from tests.object_store import ObjectStore


@pytest.fixture
def tars(tmp_path: Path, picture, pack) -> Path:
    """Three tars of two images, in their folder."""
    (tmp_path / "tars").mkdir()
    for part in range(3):
        samples = {}
        for key in ("z", "a"):
            number = 2 * part + (key == "a")
            samples |= {f"{key}{part}.cls": b"%d\n" % part, f"{key}{part}.png": picture(number)}
        pack(tmp_path / "tars" / f"train-{part:03d}.tar", samples)
    return tmp_path / "tars"


def alike(here: ImageList, there: ImageList) -> bool:
    """The same samples, and the same bytes."""
    read = [[images.read(entry) for entry in images.entries] for images in (here, there)]
    return here.digest == there.digest and here.keys == there.keys and read[0] == read[1]


def refusal(source: str, **options: object) -> str:
    with pytest.raises(DataError) as told:
        open_images(source, **options)  # type: ignore[arg-type]
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("pattern", ["train-{000..002}.tar", "train-*.tar", "train-00[02].tar", "train-001.tar", ""])
def test_tars_at_a_url_are_the_tars_on_disk(object_store: ObjectStore, tars: Path, pattern: str) -> None:
    local = open_images(str(tars / pattern))
    there = open_images(f"{object_store.url(tars)}/{pattern}")
    assert alike(local, there) and there.labels.tolist() == local.labels.tolist()
    assert there.entries[0].file == object_store.url(Path(local.entries[0].file))


def test_a_folder_of_images_at_a_url_is_the_folder_on_disk(
    object_store: ObjectStore, tmp_path: Path, picture, fill
) -> None:
    names = ("cat/1.png", "cat.b/2.png", "ant/x/3.png", "top.png", ".hidden/4.png", "cat/.5.png")
    folder = fill(tmp_path / "images", {name: picture(number) for number, name in enumerate(names)})
    fill(tmp_path / "images2", {"other.png": picture(9)})  # begins alike, and is none of it
    local, there = open_images(str(folder)), open_images(object_store.url(folder) + "/")
    assert alike(local, there) and local.labels.tolist() == there.labels.tolist()
    assert there.classes == ("ant", "cat", "cat.b") and len(there) == 4


def test_any_protocol_will_do(tars: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in tars.iterdir():
        memory.pipe(f"/tars/{path.name}", path.read_bytes())
    local = open_images(str(tars))
    for pattern in ("", "/train-*.tar", "/train-{000..002}.tar"):
        assert alike(local, open_images(f"memory://tars{pattern}"))
    assert alike(local, open_images("file:" + f"//{tars}"))
    with pytest.raises(CacheError, match=r"nonsense://x cannot be opened"):
        open_images("nonsense://x")


def test_the_list_is_made_once_and_again_when_an_object_changes(
    faulty: FaultyStore, tars: Path, tmp_path: Path, picture, pack
) -> None:
    kept, url = tmp_path / "index" / "train.json", faulty.store.url(tars) + "/train-*.tar"
    first = open_images(url, index_file=kept)
    faulty.seen.clear()
    assert open_images(url, index_file=kept).digest == first.digest and faulty.count("GET", ".tar") == 0
    pack(tars / "train-001.tar", {"z1.png": picture(77)})
    second = open_images(url, index_file=kept)
    assert second.digest != first.digest and second.keys == ("z0", "a0", "z1", "z2", "a2")
    (tars / "train-002.tar").unlink()
    assert open_images(url, index_file=kept).keys == ("z0", "a0", "z1")


def test_an_image_costs_one_range_and_then_nothing(faulty: FaultyStore, tars: Path, tmp_path: Path) -> None:
    kept, url = tmp_path / "index" / "train.json", faulty.store.url(tars) + "/train-*.tar"
    images = open_images(url, index_file=kept)
    faulty.seen.clear()
    wanted = [images.image(row).tobytes() for row in range(6)]
    assert faulty.seen == [], "copies were kept when the tars were read"
    shutil.rmtree(tmp_path / "index" / "copies")
    entry = images.entries[3]
    assert images.image(3).tobytes() == wanted[3]
    there = [asked for asked in faulty.seen if asked[0] == "GET"]
    assert [asked[2] for asked in there] == [f"bytes={entry.offset}-{entry.offset + entry.size - 1}"]
    assert images.image(3).tobytes() == wanted[3] and len(faulty.seen) == len(there)
    bare = open_images(url, index_file=kept, cache_gb=0)
    assert [image.tobytes() for image in bare.several(range(6))] == wanted
    assert faulty.count("GET", ".tar") - len(there) == 6, "without copies, a request for each"


def test_a_damaged_copy_is_fetched_again(faulty: FaultyStore, tars: Path, tmp_path: Path) -> None:
    images = open_images(faulty.store.url(tars), index_file=tmp_path / "index" / "train.json")
    wanted = images.image(0).tobytes()
    digest = images.entries[0].sha256
    copy = tmp_path / "index" / "copies" / digest[:2] / digest
    for damaged in (copy.read_bytes()[:-20], b"", copy.read_bytes()[:-1] + b"x"):
        copy.write_bytes(damaged)
        faulty.seen.clear()
        assert images.image(0).tobytes() == wanted and faulty.count("GET", ".tar") == 1


def test_copies_stay_within_their_bound_while_all_is_read(
    object_store: ObjectStore, tmp_path: Path, picture, pack
) -> None:
    (tmp_path / "tars").mkdir()
    files = {f"{row:02d}.png": picture(row) for row in range(30)}
    tar, size = pack(tmp_path / "tars" / "a.tar", files), max(map(len, files.values()))
    bound = 10 * size
    images = open_images(object_store.url(tar), index_file=tmp_path / "i" / "train.json", cache_gb=bound / 1e9)
    whole = [image.tobytes() for image in open_images(str(tar)).several(range(30))]
    for _ in range(2):
        assert [image.tobytes() for image in images.several(range(30))] == whole
        copies = [file.stat().st_size for file in (tmp_path / "i" / "copies").rglob("*") if file.is_file()]
        assert 5 * size < sum(copies) <= bound


def test_batches_are_the_same_wherever_images_lie(faulty: FaultyStore, tars: Path, tmp_path: Path) -> None:
    data = DataConfig(source=faulty.store.url(tars), val_source="sample:val", cache_gb=0)
    there, here = open_data(data, tmp_path / "i").train, open_images(str(tars))
    rows = [5, 0, 3, 3, 1]
    for mine, theirs in zip(*(image_batch(images, rows, 1, data, 8, 7) for images in (here, there)), strict=True):
        assert mine.tobytes() == theirs.tobytes()


FAULTS = (Fault("status"), Fault("status", status=500, code="InternalError"), Fault("cut"), Fault("short"))


def test_faults_that_go_away_leave_the_same_list_and_images(faulty: FaultyStore, tars: Path, tmp_path: Path) -> None:
    local, url = open_images(str(tars)), faulty.store.url(tars)
    for fault in FAULTS:
        before = sum(repeated().values())
        faulty.faults = [replace(fault, times=1, inside="train-001")]
        there = open_images(url)
        faulty.faults = [replace(fault, times=1, inside="train-002")]
        assert alike(local, there) and sum(repeated().values()) == before + 2


def test_faults_that_stay_are_one_line_and_never_an_image_left_out(faulty: FaultyStore, tars: Path) -> None:
    url = faulty.store.url(tars)
    images = open_images(url)
    for fault in FAULTS:
        faulty.faults = [replace(fault, inside="train-001")]
        for fails in (lambda: open_images(url, "skip"), lambda: images.image(2), lambda: list(images.several([0, 2]))):
            with pytest.raises(StoreUnreachable, match=r"train-001.tar cannot be reached \(.*\); nothing is lost"):
                fails()


def test_an_image_that_is_altered_on_its_way_is_fetched_again_and_then_named(
    faulty: FaultyStore, tars: Path, tmp_path: Path
) -> None:
    images = open_images(faulty.store.url(tars))
    wanted = images.image(2).tobytes()
    faulty.faults = [Fault("flip", times=1)]
    assert images.image(2).tobytes() == wanted
    faulty.faults = [Fault("flip")]
    with pytest.raises(DataError, match=r"z1 in s3://.*train-001.tar was changed since the images were listed"):
        images.image(2)


def test_slow_images_and_refused_keys_are_told(faulty: FaultyStore, tars: Path) -> None:
    images = open_images(faulty.store.url(tars))
    use_store(replace(THROUGH_PROXY, retries=0, timeout=1.0))
    faulty.faults = [Fault("slow", seconds=1.5)]
    with pytest.raises(StoreUnreachable, match="cannot be reached"):
        images.image(0)
    use_store(THROUGH_PROXY)
    faulty.faults = [Fault("status", status=403, code="ExpiredToken", message="The provided token has expired.")]
    with pytest.raises(StoreUnreachable, match=r"is refused \(The provided token has expired.\)"):
        images.image(0)



def test_what_is_wrong_with_the_source_is_named_by_its_url(
    faulty: FaultyStore, tars: Path, tmp_path: Path, picture, pack
) -> None:
    url = faulty.store.url(tars)
    assert f"no such file {url}/train-003.tar" in refusal(url + "/train-{002..004}.tar")
    assert "range is empty" in refusal(url + "/train-{002..001}.tar")
    assert f"no such file {url}/x-*.tar" in refusal(url + "/x-*.tar")
    assert "is no folder with images or tars" in refusal(faulty.store.url(tmp_path / "nowhere"))
    images = open_images(url)
    os.truncate(tars / "train-001.tar", 1024)
    assert f"{url}/train-001.tar is cut short" in refusal(url)
    with pytest.raises(CacheError, match=r"train-001.tar has 1024 bytes and .* were asked for"):
        images.image(3)
    pack(tars / "train-001.tar", {"notes.txt": b"text", "1.png": picture(1)})
    assert f"{url}/train-001.tar:notes is no readable image" in refusal(url)
    assert open_images(url, "skip").skipped[0][0] == f"{url}/train-001.tar:notes"
    (tars / "train-001.tar").unlink()
    with pytest.raises(DataError, match=r"train-001.tar is gone; restore it"):
        images.image(3)
    pack(tars / "b.tar.gz", {})
    assert "is no plain .tar" in refusal(url + "/b.tar.*")
