"""Views: deterministic crops of an image. What is cut, and in which order tokens are stored, is a pure function of
(seed, view, sample key), so that a cache, a live step and a resumed run see the same pixels. Free of torch.

Shapes: B batch, C channels, S side of a view in pixels, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image

from models.spec import canonical_json, derive_seed
from stages.config import DataConfig
from stages.images import ImageList

VIEW_VERSION = 1
"""Bumped when a view's pixels change for a reason that no setting tells."""

AUGMENT_VERSION = 1
"""The same for what RandAugment makes of a view."""

Augment = Callable[[np.ndarray, int, str], np.ndarray]
"""What is done to a cut view: (pixels (S, S, 3) uint8, view, sample key) -> pixels of that shape, a pure function."""

EVALUATION_SHARE = 0.875
"""Share of the shorter side that the centre view of evaluation shows."""


@dataclass(frozen=True)
class Crop:
    """A rectangle of the original image, in its pixels; flip is 1 for a mirrored view, else 0."""

    top: float
    left: float
    height: float
    width: float
    flip: float


def view_transform_id(data: DataConfig, size: int, rand_augment: float = 0.0) -> str:
    """Names everything that decides a view's pixels; rand_augment is RandAugment's magnitude."""
    settings = {"scale": data.crop_scale, "ratio": data.crop_ratio, "flip": data.flip, "size": size}
    crop = f"random-resized-crop bicubic v{VIEW_VERSION} {canonical_json(settings)}"
    return f"{crop} rand-augment v{AUGMENT_VERSION} magnitude {rand_augment:g}" if rand_augment else crop


def crop_params(seed: int, view: int, key: str, height: int, width: int, data: DataConfig) -> Crop:
    """RandomResizedCrop's law: area and ratio drawn until the rectangle fits, ten times at most, then a centre crop.

    Source: torchvision's `RandomResizedCrop.get_params`; ratios are drawn log-uniformly, width over height.
    """
    draws = uniform(1 + 10 * 4, seed, "crop", view, key)
    flip = float(draws[0] < data.flip)
    (smallest, largest), (low, high) = data.crop_scale, (math.log(ratio) for ratio in data.crop_ratio)
    for share, shape, down, right in draws[1:].reshape(10, 4):
        area = height * width * (smallest + (largest - smallest) * share)
        ratio = math.exp(low + (high - low) * shape)
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
            return Crop(float(top), float(left), float(h), float(w), flip)
    ratio = min(max(width / height, data.crop_ratio[0]), data.crop_ratio[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return Crop(float((height - h) // 2), float((width - w) // 2), float(h), float(w), flip)


def apply_crop(image: Image.Image, crop: Crop, size: int) -> np.ndarray:
    """(S, S, 3) uint8: the rectangle resized bicubically, mirrored if asked."""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return pixels[:, ::-1] if crop.flip else pixels


def centre_view(image: Image.Image, size: int) -> np.ndarray:
    """(S, S, 3) uint8 for evaluation: the centre square, the whole of it where the image is smaller than the view."""
    width, height = image.size
    side = min(width, height) * (EVALUATION_SHARE if min(width, height) > size else 1.0)
    left, top = (width - side) / 2, (height - side) / 2
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


def image_batch(
    images: ImageList,
    rows: Sequence[int] | np.ndarray,
    view: int,
    data: DataConfig,
    size: int,
    seed: int,
    augment: Augment | None = None,
    into: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One view of some rows: uint8 (B, 3, S, S), in `into` where that is given, and the crops, float32 (B, 5)."""
    pixels = np.empty((len(rows), 3, size, size), np.uint8) if into is None else into
    crops = np.empty((len(rows), 5), np.float32)
    for place, (row, image) in enumerate(zip(rows, images.several(rows), strict=True)):
        crop = crop_params(seed, view, images.keys[row], image.height, image.width, data)
        cut = apply_crop(image, crop, size)
        cut = augment(cut, view, images.keys[row]) if augment else cut
        pixels[place] = cut.transpose(2, 0, 1)
        crops[place] = astuple(crop)
    return pixels, crops


def centre_batch(images: ImageList, rows: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """The evaluation view of some rows: uint8 (B, 3, S, S)."""
    return np.stack([centre_view(image, size).transpose(2, 0, 1) for image in images.several(rows)])


def token_orders(
    seed: int, view: int, keys: Sequence[str], num_tokens: int, groups: int, block: int = 1
) -> np.ndarray:
    """(B, L) int64: the order in which a view's tokens are stored, group after group; raster order for one group.

    With `block` above 1 squares of block x block tokens stay together, so that groups are block-wise masks.
    """
    if groups == 1:
        return np.tile(np.arange(num_tokens), (len(keys), 1))
    draws = np.stack([uniform(num_tokens, seed, "groups", view, key) for key in keys])
    if block > 1:
        side = math.isqrt(num_tokens)
        place = np.arange(side) // block
        square = (place[:, None] * (place[-1] + 1) + place).ravel()
        _, first = np.unique(square, return_index=True)
        rank = draws[:, first].argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        draws += rank[:, square]
    return np.argsort(draws, axis=1, kind="stable")


def uniform(count: int, *parts: str | int) -> np.ndarray:
    """Numbers in [0, 1). From raw bits, which are the same in every numpy; its distributions may change."""
    return (np.random.PCG64(derive_seed(*parts)).random_raw(count) >> 11) * 2.0**-53
