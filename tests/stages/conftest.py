"""Small images on disk, in folders and in tars."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.images import ImageList, open_images


def encoded(number: int = 0, kind: str = "PNG", size: tuple[int, int] = (12, 9)) -> bytes:
    """A file's content: noise, another for each number."""
    width, height = size
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def in_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def in_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """picture(number=0, kind="PNG", size=(12, 9)) -> content of an image file."""
    return encoded


@pytest.fixture(scope="session")
def fill() -> Callable[[Path, Mapping[str, bytes]], Path]:
    """fill(folder, {name: content}) -> folder."""
    return in_folder


@pytest.fixture(scope="session")
def pack() -> Callable[[Path, Mapping[str, bytes]], Path]:
    """pack(path of a tar, {name: content}) -> path."""
    return in_tar


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    """60 images of 16 x 16, label 0 reddish, 1 bluish: what any encoder tells apart."""
    noise, files = np.random.default_rng(0), {}
    for row in range(60):
        pixels = noise.integers(0, 60, (16, 16, 3), np.uint8)
        pixels[:, :, 2 * (row % 2)] += 180
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        files |= {f"{row:02d}.png": content.getvalue(), f"{row:02d}.cls": b"%d" % (row % 2)}
    return open_images(str(in_tar(tmp_path_factory.mktemp("colours") / "a.tar", files)))
