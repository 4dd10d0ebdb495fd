"""Patches and targets against definitions written out by hand."""

from __future__ import annotations

import statistics

import pytest
import torch

from models.targets import feature_target, hog, normalize_images, normalize_pixels, patchify, pixel_target, unpatchify
from tests.models.slow import slow_hog

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_a_patch_lies_row_by_row_with_the_channels_last() -> None:
    size, patch = 8, 4
    # A pixel's value tells where it is: 100 * channel + 10 * row + column.
    image = torch.tensor([[[100 * c + 10 * y + x for x in range(size)] for y in range(size)] for c in range(3)])
    patches = patchify(image[None], patch)
    assert patches.shape == (1, 4, 48)
    for token in range(4):
        top, left = (token // 2) * patch, (token % 2) * patch
        want = [100 * c + 10 * (top + y) + left + x for y in range(patch) for x in range(patch) for c in range(3)]
        assert patches[0, token].tolist() == want


@pytest.mark.parametrize(("channels", "dtype"), [(3, torch.uint8), (1, torch.float32)])
def test_unpatchify_is_the_reverse(channels: int, dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (2, channels, 12, 12)).to(dtype)
    patches = patchify(images, 4)
    assert patches.dtype == dtype and torch.equal(unpatchify(patches, 4), images)


def test_pixels_are_normalised_with_the_unbiased_variance() -> None:
    pixels = torch.randn(2, 3, 12, dtype=torch.float64) * 5 + 2
    found = normalize_pixels(pixels)
    for row in range(2):
        for token in range(3):
            values = pixels[row, token].tolist()
            mean, deviation = statistics.fmean(values), (statistics.variance(values) + 1e-6) ** 0.5
            want = torch.tensor([(value - mean) / deviation for value in values], dtype=torch.float64)
            torch.testing.assert_close(found[row, token], want, rtol=1e-12, atol=1e-12)


def test_a_patch_of_one_colour_becomes_zero() -> None:
    assert torch.equal(normalize_pixels(torch.full((1, 1, 12), 0.5)), torch.zeros(1, 1, 12))


def test_images_are_normalised_per_channel() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    want = [(value - mean) / std for value, mean, std in zip((0.0, 0.2, 1.0), MEAN, STD, strict=True)]
    torch.testing.assert_close(normalize_images(images).flatten(), torch.tensor(want))


def test_the_pixel_target_is_that_of_the_normalised_image() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    want = normalize_pixels(patchify(normalize_images(images), 4))
    found = pixel_target(patchify(images, 4))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_the_feature_target_has_mean_0_and_biased_variance_1() -> None:
    features = torch.randn(2, 3, 10) * 4 - 1
    found = feature_target(features)
    for row in range(2):
        for token in range(3):
            values = features[row, token].tolist()
            mean, deviation = statistics.fmean(values), (statistics.pvariance(values) + 1e-6) ** 0.5
            want = torch.tensor([(value - mean) / deviation for value in values])
            torch.testing.assert_close(found[row, token], want, rtol=1e-5, atol=1e-5)


def test_the_feature_target_is_float32() -> None:
    assert feature_target(torch.randn(1, 2, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("num_bins", "cell"), [(9, 4), (9, 8), (6, 4)])
def test_hog_is_its_definition_channel_by_channel(num_bins: int, cell: int) -> None:
    """Cells at the border are left out: a mirrored gradient is 0 there, and a rounding decides the bin of its angle."""
    images = torch.randn(2, 3, 4 * cell, 4 * cell)
    found = hog(images, num_bins, cell)
    assert found.shape == (2, 16, 3 * num_bins)
    inside = [5, 6, 9, 10]
    for sample in range(2):
        for channel in range(3):
            want = torch.tensor(slow_hog(images[sample, channel].tolist(), num_bins, cell))
            own = found[sample, :, channel * num_bins : (channel + 1) * num_bins]
            torch.testing.assert_close(own[inside], want[inside], rtol=1e-5, atol=1e-6)


def test_hog_mirrors_the_image_at_its_border() -> None:
    """A ramp along the columns has gradient 0 in its first and last column, and the same vote everywhere else."""
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert hog(ramp, cell=1)[0, :, 4].reshape(8, 8).tolist() == [[0.0, *[1.0] * 6, 0.0]] * 8


def test_hog_is_blind_to_contrast_and_to_the_sign_of_an_edge() -> None:
    image = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(hog(image, cell=8), hog(3 * image + 2, cell=8), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hog(image, cell=8), hog(-image, cell=8), rtol=1e-4, atol=1e-5)
