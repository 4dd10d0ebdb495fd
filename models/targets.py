"""What heads are asked for: pixels of a patch, normalised, histograms of oriented gradients, or features, normalised. A
patch of 16 x 16 x 3 has 768 values and so has ViT-B's token, hence the names: `pixels` end in P, features in D.

Shapes: B batch, C channels, H and W pixels, L tokens, P values of a patch in the order (row, column, channel), D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, layer_norm, normalize, pad

from models.config import IMAGENET_MEAN, IMAGENET_STD, RGB

HOG_BINS = 9
SOBEL = (1.0, 0.0, -1.0, 2.0, 0.0, -2.0, 1.0, 0.0, -1.0)
TargetKey = tuple[str, float]
"""Kind and scale of a target."""
Targets = Mapping[TargetKey, Tensor]
"""Targets; those of pixels are uint8, and normalised by `as_scored` where they are compared with a prediction."""


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 numbers on a device. Kept there, and sent from page-locked memory: the host waits for no GPU. In a step
    that is compiled they become a part of it."""
    return torch.tensor(values, device=device) if torch.compiler.is_compiling() else _kept(values, device)


@lru_cache(maxsize=64)
def _kept(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first, training can use them
        here = torch.tensor(values)
        return (here.pin_memory() if device.type == "cuda" else here).to(device, non_blocking=True)


def patchify(images_BCHW: Tensor, patch: int) -> Tensor:
    """(B, L, P): an image's patches in raster order. Source: `patchify` in facebookresearch/mae."""
    batch, channels, height, width = images_BCHW.shape
    rows, columns = height // patch, width // patch
    grid = images_BCHW.reshape(batch, channels, rows, patch, columns, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(pixels_BLP: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) from the patches of square images; the reverse of `patchify`."""
    batch, tokens, values = pixels_BLP.shape
    side = round(tokens**0.5)
    grid = pixels_BLP.reshape(batch, side, side, patch, patch, values // patch**2)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, side * patch, side * patch)


def normalize_pixels(pixels_BLP: Tensor) -> Tensor:
    """Every patch to mean 0 and unbiased variance 1: (x - mean) / sqrt(var + 1e-6). Source: MAE's norm_pix_loss."""
    centred = pixels_BLP - pixels_BLP.mean(dim=-1, keepdim=True)
    # torch.var over so short an axis takes five times as long.
    variance = centred.square().sum(dim=-1, keepdim=True) / (pixels_BLP.shape[-1] - 1)
    return centred / (variance + 1e-6).sqrt()


def normalize_images(images_BCHW: Tensor, mean: RGB = IMAGENET_MEAN, std: RGB = IMAGENET_STD) -> Tensor:
    """uint8 RGB images as float32 of a mean and standard deviation: ImageNet's for targets, whatever the encoder's."""
    mean_C11, std_C11 = (constant(v, images_BCHW.device).reshape(3, 1, 1) for v in (mean, std))
    return (images_BCHW.float() / 255 - mean_C11) / std_C11


def pixel_target(pixels_BLP: Tensor) -> Tensor:
    """The target that uint8 pixels make: normalised as images are, then patch by patch."""
    repeats = pixels_BLP.shape[-1] // 3
    mean, std = (constant(v, pixels_BLP.device).repeat(repeats) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return normalize_pixels((pixels_BLP.float() / 255 - mean) / std)


def pixels_of(normalised_BLP: Tensor, pixels_BLP: Tensor) -> Tensor:
    """uint8 (B, L, P): normalised patches as they look, given back the mean and contrast of the original patch.

    The reverse of `pixel_target`. A prediction shows the shape that it found, in the light of the original: what
    people are misled by in pictures of normalised pixels (facebookresearch/mae, issue 190).
    """
    repeats = pixels_BLP.shape[-1] // 3
    mean, std = (constant(v, pixels_BLP.device).repeat(repeats) for v in (IMAGENET_MEAN, IMAGENET_STD))
    plain = (pixels_BLP.float() / 255 - mean) / std
    centre, variance = plain.mean(dim=-1, keepdim=True), plain.var(dim=-1, keepdim=True, unbiased=True)
    shown = (normalised_BLP.float() * (variance + 1e-6).sqrt() + centre) * std + mean
    return (shown * 255).round().clamp(0, 255).to(torch.uint8)


def hog(images_BCHW: Tensor, num_bins: int = 9, cell: int = 16) -> Tensor:
    """(B, cells, C * num_bins) float32: histograms of oriented gradients, channel by channel, cells in raster order.

    Sobel gradients with reflect padding, unsigned orientation in hard bins, average over a cell of `cell` pixels, L2
    norm over the bins of one channel. Source: `HOGLayer` in Haoqing-Wang/LocalMIM, ViT/models_mim.py.
    """
    batch, channels, height, width = images_BCHW.shape
    planes = pad(images_BCHW.float().reshape(batch * channels, 1, height, width), (1, 1, 1, 1), mode="reflect")
    sobel = constant(SOBEL, planes.device).reshape(3, 3)
    gradient = conv2d(planes, torch.stack([sobel, sobel.T]).unsqueeze(1))
    # Opposite directions are half a turn, num_bins bins, apart: modulo num_bins makes the orientation unsigned.
    angle = torch.atan2(gradient[:, :1], gradient[:, 1:]) / math.pi * num_bins
    votes = torch.zeros(batch * channels, num_bins, height, width, device=planes.device)
    # gradient.norm(dim=1) is the same and took two thirds of the whole function: it is slow over an axis of two.
    votes.scatter_(1, angle.floor().long() % num_bins, torch.hypot(gradient[:, :1], gradient[:, 1:]))
    cells = normalize(avg_pool2d(votes, cell), dim=1).flatten(2)
    return cells.reshape(batch, channels * num_bins, -1).transpose(1, 2)


def image_values(kind: str, scale: float, patch: int) -> int:
    """Values of one place of an image target at a scale of the token grid, over which a head's grid is finer."""
    return 3 * HOG_BINS if kind == "hog" else 3 * round(patch / scale) ** 2


@torch.no_grad()
def image_target(images_BCHW: Tensor, kind: str, scale: float, patch: int) -> Tensor:
    """The target that uint8 images make of cells of `patch` / `scale` pixels: `pixels`, uint8, or `hog`, float32.

    At scales of 1 and above (B, L, scale² * T): the finer places of a token lie together, since a head makes them from
    that token. At scale 0.5 (B, L / 4, T). Source: Haoqing-Wang/LocalMIM, ViT/models_mim.py.
    """
    cell = round(patch / scale)
    if kind == "hog":
        with torch.autocast(images_BCHW.device.type, enabled=False):  # bins of bfloat16 gradients are other bins
            values = hog(normalize_images(images_BCHW), HOG_BINS, cell)
    else:
        values = patchify(images_BCHW, cell)
    for _ in range(round(math.log2(scale)) if scale > 1 else 0):
        values = by_token(values)
    return values


def as_scored(target_BST: Tensor, key: TargetKey) -> Tensor:
    """What a prediction is compared with: pixels normalised cell by cell, all else as it is."""
    kind, scale = key
    if kind != "pixels":
        return target_BST
    batch, tokens, values = target_BST.shape
    cells = round(max(scale, 1)) ** 2
    return pixel_target(target_BST.reshape(batch, tokens * cells, values // cells)).reshape(target_BST.shape)


def by_token(values_BLT: Tensor) -> Tensor:
    """Values of a grid twice as fine together with their 2 x 2 neighbours: (B, L / 4, 4 * T).

    Twice in turn it gives the order in which two transposed convolutions of stride 2 make the places of a token.
    """
    batch, places, values = values_BLT.shape
    side = round(places**0.5) // 2
    grid = values_BLT.reshape(batch, side, 2, side, 2, values)
    return grid.transpose(2, 3).reshape(batch, side * side, 4 * values)


def target_std(target_BLD: Tensor) -> Tensor:
    """(): how much a target varies over tokens, mean over channels of the standard deviation; 1 at most when
    layer-normalised, 0 when all tokens are alike. data2vec watches the same number (`min_target_var`)."""
    return target_BLD.flatten(0, 1).std(dim=0, correction=0).mean()


def feature_target(features_BLD: Tensor) -> Tensor:
    """The target that features make: each token to mean 0 and variance 1 (LayerNorm without affine, eps 1e-6)."""
    return layer_norm(features_BLD.float(), features_BLD.shape[-1:], eps=1e-6)
