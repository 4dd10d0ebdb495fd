"""The index of images on disk: believed to the byte or made again, and made again where an image is not as it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.manifest import unseal
from stages import index
from stages.errors import DataError
from stages.images import ImageList, open_images


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, picture, fill) -> tuple[str, Path, bytes, ImageList]:
    """A folder of images in two classes, the file of its index, what that holds, and the images."""
    place = tmp_path_factory.mktemp("kept")
    source = str(fill(place / "images", {f"{'ab'[row % 2]}/{row}.png": picture(row) for row in range(4)}))
    images = open_images(source, index_file=place / "train.json")
    return source, place / "train.json", (place / "train.json").read_bytes(), images


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_index_with_any_byte_altered_is_made_again(
    kept: tuple[str, Path, bytes, ImageList], data: st.DataObject
) -> None:
    source, file, whole, images = kept
    place, bits = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    file.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
    found = open_images(source, index_file=file)
    assert (found.entries, found.classes, found.skipped) == (images.entries, images.classes, images.skipped)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"{}", b"\xff\xfe"])
def test_what_is_no_index_is_made_again(kept: tuple[str, Path, bytes, ImageList], content: bytes) -> None:
    source, file, whole, images = kept
    file.write_bytes(content)
    assert open_images(source, index_file=file).entries == images.entries and file.read_bytes() == whole


def test_an_index_of_an_earlier_version_is_made_again(kept: tuple[str, Path, bytes, ImageList]) -> None:
    """Version 2 was plain JSON, of which a digit may have been altered since."""
    source, file, whole, images = kept
    values = unseal(whole) | {"version": 2}
    values["entries"][0]["label"] += 1
    file.write_text(json.dumps(values))
    assert open_images(source, index_file=file).entries == images.entries and file.read_bytes() == whole


def test_an_image_that_differs_from_its_index_is_taken_as_it_is_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture, fill
) -> None:
    """Also where no stamp shows it: stores that tell no versions, other decoders of torchvision's images, bad disks."""
    source, file = fill(tmp_path / "images", {"a.bmp": picture(1, "BMP"), "b.bmp": picture(2, "BMP")}), tmp_path / "i"
    monkeypatch.setattr(index, "stamp_of", lambda path: (path.stat().st_size, 0, 0, 0))
    images = open_images(str(source), index_file=file)
    fill(source, {"a.bmp": picture(3, "BMP")})
    assert open_images(str(source), index_file=file).digest == images.digest, "nothing shows the edit"
    with pytest.raises(DataError, match=r"a\.bmp in .* was changed .*; restore it, or run again, which takes it as it"):
        images.image(0)
    again = open_images(str(source), index_file=file)
    assert again.digest == open_images(str(source)).digest != images.digest and again.image(0).size == (12, 9)
