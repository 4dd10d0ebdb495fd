"""Sources of images: what is found, in which order, what is refused and how, and when an index is used again."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.spec import digest
from stages import index, named
from stages.config import DataConfig
from stages.errors import DataError
from stages.images import SAMPLE, ImageList, open_data, open_images, spread


@pytest.fixture
def folder(tmp_path, picture, fill) -> Path:
    files = {"dog/1.png": 1, "cat/b.png": 2, "cat/a.jpg": 3, "dog/old/2.png": 4, "0.png": 5}
    contents = {name: picture(n, "JPEG" if name.endswith("jpg") else "PNG") for name, n in files.items()}
    return fill(tmp_path / "images", contents | {".thumbs/x.png": b"hidden"})


def refusal(source: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        open_images(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_class_folders_give_labels_and_deeper_folders_belong_to_their_class(folder) -> None:
    images = open_images(str(folder))
    assert images.keys == ("0.png", "cat/a.jpg", "cat/b.png", "dog/1.png", "dog/old/2.png")
    assert images.labels.tolist() == [-1, 0, 0, 1, 1] and images.labels.dtype == np.int64
    assert images.classes == ("cat", "dog") and images.skipped == ()


def test_a_folder_without_classes_has_no_labels(tmp_path, picture, fill) -> None:
    images = open_images(str(fill(tmp_path, {"b.png": picture(1), "a.bmp": picture(2, "BMP")})))
    assert (images.keys, images.labels.tolist(), images.classes) == (("a.bmp", "b.png"), [-1, -1], ())


def test_linked_class_folders_are_followed(tmp_path, picture, fill) -> None:
    fill(tmp_path / "elsewhere", {"1.png": picture()})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat").symlink_to(tmp_path / "elsewhere")
    assert open_images(str(tmp_path / "images")).keys == ("cat/1.png",)


def test_images_are_decoded_to_rgb(tmp_path, picture, fill) -> None:
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (5, 4), (1, 2, 3, 0)).save(tmp_path / "see-through.png")
    images = open_images(str(fill(tmp_path, {"tiny.jpg": picture(1, "JPEG", (3, 2))})))
    assert [images.image(row).mode for row in range(3)] == ["RGB"] * 3
    assert [images.image(row).size for row in range(3)] == [(5, 4), (5, 4), (3, 2)]
    assert np.asarray(images.image(0)).max() == 7 and images.image(1).getpixel((0, 0)) == (1, 2, 3)


def test_a_text_file_stops_or_is_left_out_and_recorded(folder) -> None:
    (folder / "cat" / "notes.txt").write_text("these are cats")
    message = refusal(folder)
    assert str(folder / "cat" / "notes.txt") in message and "data.on_bad=skip" in message
    images = open_images(str(folder), "skip")
    assert len(images) == 5 and "cat/notes.txt" not in images.keys
    assert images.skipped == ((str(folder / "cat" / "notes.txt"), "not an image format that Pillow knows"),)


@pytest.mark.parametrize("name", ["cat/a.jpg", "cat/b.png"])
def test_a_truncated_image_is_found_before_training(folder, name) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) * 2 // 3])
    assert name in refusal(folder) and "truncated" in refusal(folder)
    images = open_images(str(folder), "skip")
    assert len(images) == 4 and [file for file, _ in images.skipped] == [str(folder / name)]


def test_nothing_but_bad_files_is_refused_even_when_they_are_skipped(tmp_path, fill) -> None:
    fill(tmp_path, {"a.png": b"", "b.png": b"text"})
    message = refusal(tmp_path, on_bad="skip")
    assert "no readable image" in message and "2 were left out" in message and "a.png" in message


def test_an_image_that_goes_bad_later_is_named(folder) -> None:
    images = open_images(str(folder))
    (folder / "0.png").write_bytes(b"gone bad")
    with pytest.raises(DataError, match=r"0\.png in .* was changed since the images were listed; restore it"):
        images.image(0)
    (folder / "0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png in .* can no longer be read"):
        images.image(0)


def test_wrong_path_and_empty_folder_are_refused(tmp_path) -> None:
    message = refusal(tmp_path / "nowhere" / "deeper")
    assert str(tmp_path / "nowhere" / "deeper") in message and f"{tmp_path} exists" in message
    assert "empty folder" in refusal(tmp_path) and str(tmp_path) in refusal(tmp_path)


# --- tars -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tars(tmp_path, picture, pack) -> Path:
    for part in range(3):
        samples = {}
        for key in ("z", "a"):
            samples |= {f"{key}{part}.cls": b"%d\n" % part, f"{key}{part}.png": picture(part)}
        pack(tmp_path / f"train-{part:03d}.tar", samples)
    return tmp_path


@pytest.mark.parametrize("pattern", ["train-{000..002}.tar", "train-*.tar", "."])
def test_tars_are_read_in_their_own_order(tars, pattern, picture) -> None:
    images = open_images(str(tars / pattern))
    assert images.keys == ("z0", "a0", "z1", "a1", "z2", "a2")
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.read(images.entries[2]) == picture(1)
    assert sorted(path.name for path in tars.iterdir()) == [f"train-00{n}.tar" for n in range(3)], "nothing is unpacked"


def test_one_tar_by_its_path(tars) -> None:
    assert open_images(str(tars / "train-001.tar")).keys == ("z1", "a1")


def test_braces_name_the_tar_that_is_missing(tars) -> None:
    assert f"no such file or folder {tars / 'train-003.tar'}" in refusal(tars / "train-{002..004}.tar")
    assert "range is empty" in refusal(tars / "train-{002..001}.tar")


def test_keys_keep_their_folder_and_end_at_the_first_dot(tmp_path, picture, pack) -> None:
    path = pack(tmp_path / "a.tar", {"x/1.JPG": picture(0, "JPEG"), "y/1.png": picture(1), "y/1.cls": b"4"})
    images = open_images(str(path))
    assert (images.keys, images.labels.tolist()) == (("x/1", "y/1"), [-1, 4])


def test_a_tar_member_that_is_no_image_stops_or_is_left_out(tmp_path, picture, pack) -> None:
    whole = picture(0)
    path = pack(tmp_path / "a.tar", {"notes.txt": b"text", "1.png": whole, "2.png": whole[:-40], "3.cls": b"1"})
    assert f"{path}:notes is no readable image" in refusal(path)
    images = open_images(str(path), "skip")
    assert images.keys == ("1",)
    assert [file for file, _ in images.skipped] == [f"{path}:notes", f"{path}:2", f"{path}:3"]


def test_duplicate_keys_are_refused(tmp_path, picture, pack) -> None:
    for name in ("a", "b"):
        pack(tmp_path / f"{name}.tar", {"7.png": picture()})
    message = refusal(tmp_path / "*.tar")
    assert "key 7 twice" in message and str(tmp_path / "a.tar") in message and str(tmp_path / "b.tar") in message
    assert "two images of key 7" in refusal(pack(tmp_path / "c.tar", {"7.png": picture(), "7.jpg": picture()}))


def test_a_label_that_is_no_number_is_refused(tmp_path, picture, pack) -> None:
    path = pack(tmp_path / "a.tar", {"1.png": picture(), "1.cls": b"cat"})
    assert "1.cls" in refusal(path) and "'cat'" in refusal(path)


def test_compressed_tars_are_refused(tars) -> None:
    packed = gzip.compress((tars / "train-000.tar").read_bytes())
    for name in ("x.tar.gz", "x.tar"):
        (tars / name).write_bytes(packed)
        assert str(tars / name) in refusal(tars / name) and "uncompressed" in refusal(tars / name)


@pytest.mark.parametrize("members", [1, 1.5, 4])
def test_a_tar_cut_short_is_refused(tmp_path, picture, pack, members) -> None:
    """Between two members, inside one, and before the end: tarfile itself misses the first and the last."""
    path = pack(tmp_path / "a.tar", {f"{n}.png": picture(n, size=(4, 4)) for n in range(4)})
    assert len(open_images(str(path))) == 4
    path.write_bytes(path.read_bytes()[: int(members * 1024)])
    assert f"{path} is cut short" in refusal(path)


def test_an_empty_tar_has_no_images(tmp_path, pack) -> None:
    assert "has no images" in refusal(pack(tmp_path / "a.tar", {}))


# --- names and URLs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(monkeypatch, tmp_path) -> Path:
    """A torchvision data set as it lies on disk after a download, of four random images per part."""
    from torchvision import datasets

    root = tmp_path / "root"
    base = root / datasets.CIFAR10.base_folder
    base.mkdir(parents=True)
    sums = {}
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (4, 3072), np.uint8)
        content = pickle.dumps({"data": pixels, "labels": [3, 1, 4, 1], "label_names": list("abcdefghij")})
        (base / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"filename": "batches.meta", "md5": sums["batches.meta"]}
    )
    monkeypatch.setattr(named, "TORCHVISION_ROOT", root)
    named.data_set.cache_clear()
    yield base
    named.data_set.cache_clear()


def test_torchvision_sets_are_read_where_they_lie(cifar, tmp_path) -> None:
    train, test = open_images("cifar10", index_file=tmp_path / "i.json"), open_images("cifar10:test")
    assert train.keys == tuple(f"cifar10/{row:06d}" for row in range(4)) and train.labels.tolist() == [3, 1, 4, 1]
    assert train.image(2).size == (32, 32) and train.digest != test.digest
    assert not set(train.keys) & set(test.keys)
    named.data_set.cache_clear()
    again = open_images("cifar10", index_file=tmp_path / "i.json")
    assert again.entries == train.entries and again.image(3).tobytes() == train.image(3).tobytes()


def test_a_part_that_torchvision_lacks_is_refused(cifar) -> None:
    assert "no part 'val'" in refusal("cifar10:val")


def test_a_torchvision_set_without_network_is_refused_in_one_line(cifar, monkeypatch) -> None:
    from torchvision import datasets

    def no_network(self):
        raise OSError("<urlopen error\n unreachable>")

    monkeypatch.setattr(datasets.CIFAR10, "download", no_network)
    message = refusal("cifar10")
    assert "could not be downloaded (<urlopen error unreachable>)" in message and "DATA=" in message


# --- digest and index -------------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_keys_labels_and_contents(folder, tmp_path) -> None:
    images = open_images(str(folder))
    shutil.copytree(folder, tmp_path / "other" / "place")
    assert open_images(str(tmp_path / "other" / "place")).digest == images.digest
    assert images.digest == digest([[e.key, e.label, e.sha256] for e in images.entries])
    assert images.only([1, 0]).digest != images.only([0, 1]).digest
    (folder / "cat").rename(folder / "zebra")
    assert open_images(str(folder)).digest != images.digest


def counted(monkeypatch) -> list[str]:
    """The keys that an index pass reads, from now on."""
    seen: list[str] = []
    inspect = index._inspect
    monkeypatch.setattr(index, "_inspect", lambda entry, read: (seen.append(entry.key), inspect(entry, read))[1])
    return seen


def test_an_index_is_used_again_until_a_file_changes(folder, tmp_path, monkeypatch, picture) -> None:
    kept = tmp_path / "made" / "train.json"
    first = open_images(str(folder), "skip", kept)
    seen = counted(monkeypatch)
    second = open_images(str(folder), "skip", kept)
    assert seen == [] and second == first and second.digest == first.digest

    os.utime(folder / "0.png")
    same = open_images(str(folder), "skip", kept)
    assert len(seen) == 5 and same.digest == first.digest, "touched, not changed: looked at again, found the same"

    edited = picture(99, "BMP")
    (folder / "0.png").write_bytes(edited)
    before = open_images(str(folder), "skip", kept)
    (folder / "0.png").write_bytes(edited[:-1] + bytes([edited[-1] ^ 1]))
    after = open_images(str(folder), "skip", kept)
    assert len(edited) == (folder / "0.png").stat().st_size and after.digest != before.digest

    (folder / "dog" / "1.png").unlink()
    assert len(open_images(str(folder), "skip", kept)) == 4


def test_an_index_made_otherwise_or_damaged_is_made_again(folder, tmp_path, monkeypatch) -> None:
    kept = tmp_path / "train.json"
    (folder / "notes.txt").write_text("text")
    assert len(open_images(str(folder), "skip", kept)) == 5
    assert "notes.txt" in refusal(folder, on_bad="stop", index_file=kept)
    seen = counted(monkeypatch)
    kept.write_text(kept.read_text()[:-30])
    assert len(open_images(str(folder), "skip", kept)) == 5 and len(seen) == 6
    assert len(open_images(str(folder), "skip", kept).skipped) == 1 and len(seen) == 6


def test_an_index_of_tars_notices_a_tar_that_changed(tars, tmp_path, monkeypatch, pack, picture) -> None:
    kept, source = tmp_path / "train.json", str(tars / "train-*.tar")
    first = open_images(source, index_file=kept)
    seen = counted(monkeypatch)
    assert open_images(source, index_file=kept).digest == first.digest and seen == []
    path = tars / "train-001.tar"
    stamp = path.stat()
    pack(path, {"z1.cls": b"1", "z1.png": picture(1), "a1.cls": b"2", "a1.png": picture(1)})
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert path.stat().st_size == stamp.st_size
    assert open_images(source, index_file=kept).digest != first.digest and len(seen) == 6


def test_a_list_travels_to_another_process(tars) -> None:
    images = open_images(str(tars))
    other = pickle.loads(pickle.dumps(images))
    assert other.digest == images.digest and other.image(3).tobytes() == images.image(3).tobytes()


# --- training and evaluation ------------------------------------------------------------------------------------------


def many(folder: Path, fill, picture, count: int) -> Path:
    return fill(folder, {f"{row:04d}.bmp": picture(row, "BMP", (2, 2)) for row in range(count)})


def test_a_tenth_is_held_out_and_stays_held_out(tmp_path, picture, fill) -> None:
    few = open_data(DataConfig(source=str(many(tmp_path / "few", fill, picture, 500))))
    more = open_data(DataConfig(source=str(many(tmp_path / "more", fill, picture, 1000))))
    assert len(few.train) + len(few.val) == 500 and not set(few.train.keys) & set(few.val.keys)
    assert 70 <= len(more.val) <= 130
    assert set(few.val.keys) < set(more.val.keys) and set(few.train.keys) < set(more.train.keys)
    assert few.val.keys[:3] == tuple(key for key in more.val.keys if key in few.val.keys)[:3]


def test_too_few_images_to_hold_out_a_tenth_are_refused(tmp_path, picture, fill) -> None:
    with pytest.raises(DataError, match=r"1 images, too few .*DATA_VAL"):
        open_data(DataConfig(source=str(many(tmp_path, fill, picture, 1))))


def test_evaluation_images_have_the_training_classes_numbers(folder, tmp_path, picture, fill) -> None:
    val = fill(tmp_path / "val", {"dog/9.png": picture(11)})
    data = open_data(DataConfig(source=str(folder), val_source=str(val)))
    assert data.val.labels.tolist() == [1] and len(data.train) == 5
    fill(tmp_path / "val", {"emu/1.png": picture(12)})
    with pytest.raises(DataError, match="class 'emu', which the training images lack"):
        open_data(DataConfig(source=str(folder), val_source=str(val)))


def test_a_limit_keeps_all_classes() -> None:
    data = open_data(DataConfig(limit=100))
    whole = open_images("sample")
    assert data.train.keys == tuple(whole.keys[row] for row in range(0, 2000, 20)) and len(data.val) == 500
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 0).tolist() == spread(3, 3).tolist() == spread(3, 9).tolist() == [0, 1, 2]


# --- the sample -------------------------------------------------------------------------------------------------------


def test_the_sample_is_balanced_small_and_apart(tmp_path) -> None:
    data = open_data(DataConfig(), tmp_path)
    assert np.bincount(data.train.labels).tolist() == [200] * 10
    assert np.bincount(data.val.labels).tolist() == [50] * 10
    hashes = [{entry.sha256 for entry in images.entries} for images in (data.train, data.val)]
    assert len(hashes[0]) == 2000 and len(hashes[1]) == 500 and not hashes[0] & hashes[1]
    assert not set(data.train.keys) & set(data.val.keys)
    assert {data.train.image(row).size for row in range(0, 2000, 100)} == {(32, 32)}
    tars = sorted(SAMPLE.glob("*.tar"))
    assert [path.name for path in tars] == ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert sum(path.stat().st_size for path in tars) <= 12e6
    assert [len(open_images(str(path))) for path in tars] == [1000, 1000, 500]


def test_the_sample_is_found_from_anywhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_images("sample:val"), ImageList) and len(open_images("sample:val")) == 500
