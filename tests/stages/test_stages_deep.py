"""Images that are not eight bits of red, green and blue: taken as they are shown, or refused where they
would be cut."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages import index
from stages.errors import DataError
from stages.images import open_images

VALUES = np.array([[0, 128, 255, 256], [1000, 30000, 60000, 65535]])
CUT = "more than 8 bits a channel would be cut at 255; save it with 8"


def content_of(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize(
    ("dtype", "kind", "mode"),
    [
        (np.uint16, "PNG", "I;16"),
        (np.uint16, "TIFF", "I;16"),
        (np.uint16, "PPM", "I"),
        (np.int32, "TIFF", "I"),
        (np.float32, "TIFF", "F"),
    ],
)
def test_more_than_eight_bits_a_channel_are_refused_or_left_out(
    tmp_path: Path, picture, fill, dtype, kind, mode
) -> None:
    """Pillow makes RGB of them by cutting all above 255, so that most scans and X-rays are white."""
    deep = content_of(Image.fromarray(VALUES.astype(dtype)), kind)
    opened = Image.open(io.BytesIO(deep))
    assert opened.mode == mode and np.asarray(opened.convert("RGB"))[1].min() == 255, "what is refused here"
    fill(tmp_path, {"a.png": picture(), f"b.{kind.lower()}": deep})
    with pytest.raises(DataError) as caught:
        open_images(str(tmp_path))
    name = tmp_path / f"b.{kind.lower()}"
    assert str(caught.value) == (
        f"{name} is no readable image ({CUT}); remove it, or leave such files out with data.on_bad=skip"
    )
    images = open_images(str(tmp_path), "skip")
    assert images.keys == ("a.png",) and images.skipped == ((str(name), CUT),)


def test_images_that_torchvision_hands_out_are_looked_at_too() -> None:
    deep = Image.fromarray(VALUES.astype(np.uint16))
    assert index._inspect(index.Entry("a", 0, "a"), lambda entry: deep)[1] == CUT
    assert index._inspect(index.Entry("a", 0, "a"), lambda entry: Image.new("L", (2, 2)))[1] == ""


def test_all_other_kinds_of_pixels_are_taken_as_they_are_shown(tmp_path: Path, fill) -> None:
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    made = {
        "bits.png": (Image.new("1", (4, 2), 1), (255, 255, 255)),
        "cmyk.tiff": (Image.new("CMYK", (4, 2), (0, 255, 255, 0)), (255, 0, 0)),
        "grey.png": (Image.new("L", (4, 2), 7), (7, 7, 7)),
        "grey-alpha.png": (Image.new("LA", (4, 2), (7, 0)), (7, 7, 7)),
        "palette.png": (palette, (10, 20, 30)),
        "rgb.png": (Image.new("RGB", (4, 2), (1, 2, 3)), (1, 2, 3)),
        "see-through.png": (Image.new("RGBA", (4, 2), (1, 2, 3, 0)), (1, 2, 3)),
    }
    fill(tmp_path, {name: content_of(image, name.split(".")[1].upper()) for name, (image, _) in made.items()})
    images = open_images(str(tmp_path))
    assert images.keys == tuple(sorted(made))
    for row, name in enumerate(images.keys):
        assert images.image(row).mode == "RGB" and images.image(row).getcolors() == [(8, made[name][1])], name


def test_a_camera_s_turn_is_not_applied(tmp_path: Path, fill) -> None:
    """Orientation 6 would be shown turned by a quarter: pixels are taken as they are stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    fill(tmp_path, {"a.jpg": content_of(Image.new("RGB", (8, 4)), "JPEG", exif=exif)})
    images = open_images(str(tmp_path))
    assert Image.open(tmp_path / "a.jpg").getexif()[0x0112] == 6 and images.image(0).size == (8, 4)
