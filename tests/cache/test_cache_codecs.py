"""What codecs do to single values, by hand and against independent implementations."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numcodecs import BitRound

from cache.codecs import CODECS, Filter, codec_problem, parse_filter
from cache.errors import CacheError
from cache.rounding import Moments, Rounded, Unfit, moments, restore, round_features

FINITE = st.floats(-60000, 60000, width=32)


def test_float16_is_what_torch_and_numpy_round_to() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32) * 100
    rounded = round_features(values, "float16")
    assert rounded.values_NLD.dtype == np.float16 and rounded.scale_NLK is None
    np.testing.assert_array_equal(rounded.values_NLD, values.astype(np.float16))
    np.testing.assert_array_equal(restore(rounded.values_NLD, "float16"), values.astype(np.float16).astype(np.float32))


def test_bfloat16_is_the_upper_half_of_a_float32() -> None:
    values = np.array([1.0, -2.0, 1.00390625, 1.01171875, 3e38, 1e-40], np.float32).reshape(1, 1, 6)
    rounded = round_features(values, "bfloat16")
    assert rounded.values_NLD.dtype == np.uint16
    # 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6: ties to even.
    assert rounded.values_NLD[0, 0, :4].tolist() == [0x3F80, 0xC000, 0x3F80, 0x3F82]
    upper = (rounded.values_NLD.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(restore(rounded.values_NLD, "bfloat16"), upper)


def test_int8_by_hand() -> None:
    values = np.array([127.0, -63.4, 0.5, 1.5, 0, 0, 0, 0], np.float32).reshape(1, 1, 8)
    rounded = round_features(values, "int8", block=4)
    assert rounded.scale_NLK is not None
    assert rounded.scale_NLK.tolist() == [[[1.0, 0.0]]]
    assert rounded.values_NLD.tolist() == [[[127, -63, 0, 2, 0, 0, 0, 0]]]  # ties to even
    assert restore(rounded.values_NLD, "int8", rounded.scale_NLK).tolist() == [[[127, -63, 0, 2, 0, 0, 0, 0]]]


@given(
    values=arrays(np.float32, (2, 3, 8), elements=st.one_of(FINITE, st.floats(-(2.0**-20), 2.0**-20, width=32))),
    block=st.sampled_from([1, 2, 4, 8]),
)
def test_int8_is_never_farther_than_half_a_step(values: np.ndarray, block: int) -> None:
    rounded = round_features(values, "int8", block)
    scale = rounded.scale_NLK.astype(np.float64).repeat(block, -1)
    peaks = np.abs(values.reshape(2, 3, -1, block)).max(-1)
    assert (rounded.scale_NLK.astype(np.float64) * 127 >= peaks).all()  # nothing is clipped
    assert rounded.values_NLD.min(initial=0) >= -127
    # Half a step, and what float32 adds to a quotient that lies next to a tie.
    error = np.abs(rounded.values_NLD * scale - values)
    assert (error <= scale * (0.5 + 2**-17)).all()
    found = restore(rounded.values_NLD, "int8", rounded.scale_NLK)
    np.testing.assert_array_equal(found, rounded.values_NLD.astype(np.float32) * scale.astype(np.float32))


def test_a_scale_rounded_down_would_clip() -> None:
    # The step is 1.4 of the smallest float16; one of them would reach 127 / 178 of the value, two reach it.
    value = np.float32(178 * 2.0**-24)
    rounded = round_features(np.full((1, 1, 4), value, np.float32), "int8", 4)
    assert rounded.scale_NLK.item() == 2 * 2.0**-24 and rounded.values_NLD.tolist() == [[[89] * 4]]


def test_blocks_spare_the_others_an_outlier_channel() -> None:
    values = np.random.default_rng(1).normal(size=(4, 50, 128)).astype(np.float32)
    values[..., 7] *= 60
    calm = np.arange(128) // 32 != 0
    errors = {}
    for block in (32, 128):
        rounded = round_features(values, "int8", block)
        found = restore(rounded.values_NLD, "int8", rounded.scale_NLK).numpy()
        errors[block] = np.linalg.norm((found - values)[..., calm]) / np.linalg.norm(values[..., calm])
    assert errors[32] < 0.01 < 5 * errors[32] < errors[128]


@given(values=arrays(np.float32, (1, 2, 6), elements=FINITE), keepbits=st.integers(1, 10))
def test_bit_rounding_is_that_of_numcodecs(values: np.ndarray, keepbits: int) -> None:
    rounded = round_features(values, "float16", keepbits=keepbits)
    wanted = np.frombuffer(BitRound(keepbits).encode(values.astype(np.float16)), np.float16).reshape(values.shape)
    if isinstance(rounded, Unfit):
        assert np.isinf(wanted[rounded.sample, rounded.token, rounded.channel])
    else:
        np.testing.assert_array_equal(rounded.values_NLD.view(np.uint16), wanted.view(np.uint16))


def test_bit_rounding_of_bfloat16_by_hand() -> None:
    values = np.array([1.25, 1.375, -1.125, 1.14], np.float32).reshape(1, 1, 4)
    rounded = round_features(values, "bfloat16", keepbits=2)  # steps of 1/4 between 1 and 2
    assert restore(rounded.values_NLD, "bfloat16").tolist() == [[[1.25, 1.5, -1.0, 1.25]]]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("keepbits", [0, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(codec: str, keepbits: int, value: float) -> None:
    values = np.ones((2, 3, 8), np.float32)
    values[1, 2, 5] = value
    found = round_features(values, codec, block=4, keepbits=keepbits)
    assert isinstance(found, Unfit) and found[:3] == (1, 2, 5)
    np.testing.assert_equal(found.value, value)
    # Every pattern of a NaN, since bit rounding adds to the pattern.
    values.view(np.uint32)[1, 2, 5] = 0xFFFFFFFF
    assert isinstance(round_features(values, codec, block=4, keepbits=keepbits), Unfit)


@pytest.mark.parametrize("codec", CODECS)
def test_the_largest_value_is_kept_and_the_next_refused(codec: str) -> None:
    largest = CODECS[codec].largest
    values = np.full((1, 1, 4), largest, np.float32)
    rounded = round_features(values, codec, 4)
    assert isinstance(rounded, Rounded)
    assert restore(rounded.values_NLD, codec, rounded.scale_NLK).tolist() == [[[largest] * 4]]
    values[0, 0, 2] = np.float32(min(largest * 1.004, 3.4e38))
    assert round_features(values, codec, 4)[:3] == (0, 0, 2)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1.0, 0.0, 1e-3, 1e30])
def test_moments_of_every_row_are_those_of_numpy(codec: str, size: float) -> None:
    given_ = (np.random.default_rng(2).normal(size=(3, 5, 768)) * size).astype(np.float32)
    if size == 1e30 and codec != "bfloat16":
        given_ = np.clip(given_, -CODECS[codec].largest, CODECS[codec].largest)
    rounded = round_features(given_, codec, 8)
    assert isinstance(rounded, Rounded)
    found = moments(given_, rounded, codec)
    assert found.shape == (3, 6) and found.dtype == np.float64
    for row in range(3):
        scale = None if rounded.scale_NLK is None else rounded.scale_NLK[row]
        stored = restore(rounded.values_NLD[row], codec, scale).numpy().astype(np.float64)
        given = given_[row].astype(np.float64)
        error = stored - given
        wanted = (stored**2).sum(), abs(stored).max(), (error**2).sum(), (given**2).sum(), abs(error).max()
        np.testing.assert_allclose(found[row, 1:], wanted, rtol=1e-6)
        np.testing.assert_allclose(found[row, 0], stored.sum(), rtol=1e-6, atol=1e-6 * abs(stored).sum())
    np.testing.assert_array_equal(found[1:2], moments(given_[1:2], _part(rounded, slice(1, 2)), codec))


def _part(rounded: Rounded, rows: slice) -> Rounded:
    return Rounded(rounded.values_NLD[rows], None if rounded.scale_NLK is None else rounded.scale_NLK[rows])


def test_moments_joined_do_not_depend_on_how_rows_are_split() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 6)) * 10.0 ** np.random.default_rng(1).integers(-9, 9, (40, 1))
    joined = Moments.join(rows)
    assert joined == Moments.join(rows[np.random.default_rng(2).permutation(40)])
    assert joined.total == float(sum(map(Fraction, rows[:, 0].tolist())))
    assert (joined.peak, joined.error_peak) == (rows[:, 2].max(), rows[:, 5].max())


def test_restoring_never_wakes_torchs_threads(monkeypatch) -> None:
    sizes: list[int] = []
    plain = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: sizes.append(self.numel()) or plain(self, other))
    restore(np.ones(100_000, np.int8), "int8", np.ones(100_000 // 32, np.float16))
    assert max(sizes) <= 32768 and sum(sizes) == 100_000


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("none", (0, "")),
        ("zstd", (0, "zstd")),
        ("lz4", (0, "lz4")),
        ("bitround-7", (7, "")),
        ("bitround-10+lz4", (10, "lz4")),
    ],
)
def test_filters(text: str, wanted: tuple[int, str]) -> None:
    assert parse_filter(text) == Filter(*wanted)


@pytest.mark.parametrize("text", ["", "gzip", "bitround", "bitround-0", "bitround-3zstd", "+zstd", "zstd+bitround-3"])
def test_unknown_filters_are_refused(text: str) -> None:
    with pytest.raises(CacheError, match=r"cache.filter = .* is unknown; use none, lz4, zstd"):
        parse_filter(text)


def test_a_block_must_divide_the_width() -> None:
    assert codec_problem("int8", 192, 32, 0) == "" == codec_problem("float16", 6, 32, 0)
    assert codec_problem("int8", 0, 32, 0) == ""
    assert codec_problem("int8", 100, 32, 0) == (
        "cache.block = 32 does not divide the 100 channels of a token; use cache.block=4"
    )
