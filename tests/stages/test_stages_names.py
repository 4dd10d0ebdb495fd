"""Names of images that cannot be keys: those that differ where a key has ended, and those that are no text."""

from __future__ import annotations

import os

import pytest

from stages import index
from stages.errors import DataError
from stages.images import open_images


def refusal(source: object, on_bad: str = "stop") -> str:
    with pytest.raises(DataError) as caught:
        open_images(str(source), on_bad)
    return str(caught.value)


def test_images_whose_names_differ_behind_the_first_dot_are_refused(tmp_path, picture, pack) -> None:
    """They would all be one sample, and all but the first be lost."""
    names = [f"x/photo.{number:03d}.JPG" for number in range(3)]
    path = pack(tmp_path / "a.tar", {name: picture(n, "JPEG") for n, name in enumerate(names)})
    for how in ("stop", "skip"):
        assert f"{path} has two images of key x/photo, {names[0]} and {names[1]}: " in refusal(path, on_bad=how)
    beside = {"a.png": picture(0), "a.seg.png": picture(1), "a.depth.png": picture(2), "b.rgb.png": picture(3)}
    images = open_images(str(pack(tmp_path / "b.tar", beside)))
    assert images.keys == ("a", "b") and [images.read(entry) for entry in images.entries] == [picture(0), picture(3)]


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_names_that_are_no_text_are_refused_before_anything_is_read(
    tmp_path, picture, fill, pack, monkeypatch, how
) -> None:
    """Keys are hashed and stored as UTF-8; a tar's names may be of any encoding."""
    fill(tmp_path / "images", {"a.png": picture(0)})
    name = os.fsencode(tmp_path / "images") + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(picture(1))
    read = []
    monkeypatch.setattr(index, "_read", lambda entry: read.append(entry))
    told = refusal(tmp_path / "images", on_bad=how)
    assert f"{os.fsdecode(name)!r} is no UTF-8; rename it" in told and told.encode()
    told = refusal(pack(tmp_path / "a.tar", {"caf\udce9.png": picture(0)}), on_bad=how)
    assert f"'caf\\udce9' in '{tmp_path}/a.tar' is no UTF-8; rename it" in told and told.encode()
    assert read == []


def test_a_tar_whose_name_is_no_text_is_refused_though_nothing_is_in_it(tmp_path, picture, pack) -> None:
    """The index names it, too."""
    pack(tmp_path / "a.tar", {"1.png": picture(0)})
    pack(tmp_path / os.fsdecode(b"caf\xe9.tar"), {})
    with pytest.raises(DataError, match="is no UTF-8; rename it"):
        open_images(str(tmp_path / "*.tar"), index_file=tmp_path / "index.json")
