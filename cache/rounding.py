"""The arithmetic of the codecs: float32 features to the numbers on disk and back, and what is lost on the way. The
writer rounds whole shards, readers restore batches; both stay clear of memory for copies of a whole shard in float64.

Shapes: N samples, L tokens, D channels, K blocks of channels.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from cache.codecs import CODECS, INT8_STEPS

# torch's grain size: an element-wise operation on no more values stays in the calling thread.
SERIAL_VALUES = 32768


class Rounded(NamedTuple):
    """Features as they are stored."""

    values_NLD: np.ndarray
    """float16, uint16 that stand for bfloat16, or int8."""
    scale_NLK: np.ndarray | None
    """float16 step of every block of channels; with int8 only."""


class Unfit(NamedTuple):
    """The first value that a codec cannot hold."""

    sample: int
    token: int
    channel: int
    value: float


def round_features(values_NLD: np.ndarray, codec: str, block: int = 0, keepbits: int = 0) -> Rounded | Unfit:
    """float32 features as a codec stores them: to nearest, ties to even; or the first that it cannot hold."""
    if codec == "int8":
        return _to_int8(values_NLD, block)
    half = torch.bfloat16 if codec == "bfloat16" else torch.float16
    rounded = torch.empty(values_NLD.shape, dtype=half)
    given, found = torch.from_numpy(np.ascontiguousarray(values_NLD)).view(-1), rounded.view(-1)
    for start in range(0, len(given), SERIAL_VALUES):  # numpy takes ten times as long
        found[start : start + SERIAL_VALUES].copy_(given[start : start + SERIAL_VALUES])
    stored = rounded.view(torch.int16).numpy().view(np.uint16)
    unfit = _not_finite(stored, codec)
    if keepbits and unfit is None:
        stored = _bit_round(stored, CODECS[codec].mantissa - keepbits)
        unfit = _not_finite(stored, codec)
    if unfit is not None:
        sample, token, channel = (int(i) for i in np.argwhere(unfit)[0])
        return Unfit(sample, token, channel, float(values_NLD[sample, token, channel]))
    return Rounded(stored.view(CODECS[codec].dtype), None)


def _not_finite(stored: np.ndarray, codec: str) -> np.ndarray | None:
    """Where 16-bit floats are infinite or no number; None where they nowhere are, found a fortieth as slowly as by
    asking torch about each."""
    infinite = np.uint16(0x7F80 if codec == "bfloat16" else 0x7C00)
    magnitudes = stored & np.uint16(0x7FFF)
    return magnitudes >= infinite if magnitudes.size and magnitudes.max() >= infinite else None


def restore(
    values: np.ndarray, codec: str, scale: np.ndarray | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Stored values as float32, in `out` where it is given, in pieces too small for torch to wake its thread pool.

    A pool of the loader's own threads spins after each use and takes the cores from the training step: on two cores
    that cost 12-18 % of a step. With int8, the last axis of `scale` is that of `values` over the block's size.
    """
    stored = torch.from_numpy((values.view(np.int16) if codec == "bfloat16" else values).reshape(-1))
    if codec == "bfloat16":
        stored = stored.view(torch.bfloat16)
    restored = torch.empty(values.shape, dtype=torch.float32) if out is None else out
    found = restored.view(-1)
    if scale is None:
        for start in range(0, len(stored), SERIAL_VALUES):
            found[start : start + SERIAL_VALUES].copy_(stored[start : start + SERIAL_VALUES])
        return restored
    steps = torch.from_numpy(scale.reshape(-1, 1))
    block = len(stored) // len(steps)
    many = max(1, SERIAL_VALUES // block)
    blocks, rows = stored.reshape(-1, block), found.view(-1, block)
    for start in range(0, len(steps), many):
        piece = slice(start, start + many)
        rows[piece].copy_(blocks[piece]).mul_(steps[piece].float())
    return restored


class Moments(NamedTuple):
    """Sums over features, from which the statistics of a view are made."""

    total: float
    squares: float
    peak: float
    """Largest magnitude stored."""
    error_squares: float
    """Of stored minus given."""
    given_squares: float
    error_peak: float

    @classmethod
    def join(cls, rows: Iterable[Sequence[float] | np.ndarray]) -> Moments:
        """Of all rows of moments together. Sums are exact until they are rounded once: the order has no say."""
        total, squares, peak, error_squares, given_squares, error_peak = zip(*map(tuple, rows), strict=True)
        return cls(
            *(math.fsum(total), math.fsum(squares), float(max(peak))),
            *(math.fsum(error_squares), math.fsum(given_squares), float(max(error_peak))),
        )


# Between these magnitudes squares, and sums of a token's squares, neither overflow nor vanish in float32.
PLAIN_PEAKS = 1e-15, 1e15


def moments(given_NLD: np.ndarray, rounded: Rounded, codec: str) -> np.ndarray:
    """(N, 6) float64, a row of `Moments` for every sample: what was stored and how far it is from what was given.

    A token's sums are float32 (relative error about 1e-7), those over tokens float64. einsum, unlike dot products,
    calls no BLAS, whose threads and whose order of summation depend on the machine.
    """
    stored, error_NLD = room("stored", given_NLD.shape), room("error", given_NLD.shape).numpy()
    stored_NLD = restore(rounded.values_NLD, codec, rounded.scale_NLK, stored).numpy()
    np.subtract(stored_NLD, given_NLD, out=error_NLD)
    peaks_N = _peaks(stored_NLD)
    found_N6 = _sums(stored_NLD, error_NLD, given_NLD)
    for sample in np.flatnonzero(~((PLAIN_PEAKS[0] < peaks_N) & (peaks_N < PLAIN_PEAKS[1]))):
        own = slice(sample, sample + 1)
        found_N6[own] = _sums(*(part[own].astype(np.float64) for part in (stored_NLD, error_NLD, given_NLD)))
    found_N6[:, 2], found_N6[:, 5] = peaks_N, _peaks(error_NLD)
    return found_N6


def _sums(stored_NLD: np.ndarray, error_NLD: np.ndarray, given_NLD: np.ndarray) -> np.ndarray:
    """(N, 6) moments without the peaks."""
    total_N = np.einsum("nld->nl", stored_NLD).sum(1, dtype=np.float64)
    parts = stored_NLD, error_NLD, given_NLD
    squares, errors, given = (np.einsum("nld,nld->nl", part, part).sum(1, dtype=np.float64) for part in parts)
    none = np.zeros_like(total_N)
    return np.stack([total_N, squares, none, errors, given, none], 1)


_LOCAL = threading.local()


def room(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory of a thread's own by name, used again and again: the kernel takes as long to hand out new pages as the
    arithmetic on them does."""
    held: dict[str, torch.Tensor] = _LOCAL.__dict__
    if name not in held or held[name].shape != shape:
        held[name] = torch.empty(shape, dtype=dtype)
    return held[name]


def _peaks(values_NLD: np.ndarray) -> np.ndarray:
    """(N,): the largest magnitude of every sample."""
    values = values_NLD.reshape(len(values_NLD), -1)
    return np.maximum(values.max(1), -values.min(1))


def relative_rmse(error_squares: float, given_squares: float) -> float:
    """Root of the mean squared error over that of the values; 0 where all values are 0 and kept."""
    return math.sqrt(error_squares / given_squares) if given_squares else 0.0


def _to_int8(values_NLD: np.ndarray, block: int) -> Rounded | Unfit:
    """Each block of a token's channels over its own scale, the largest magnitude over 127 rounded *up* to float16: were
    it rounded down, 127 steps would not reach that magnitude, by half of it where the scale is subnormal."""
    samples, tokens, width = values_NLD.shape
    blocks = torch.from_numpy(np.ascontiguousarray(values_NLD)).view(-1, block)
    stored = torch.empty(blocks.shape, dtype=torch.int8)
    peaks = torch.empty(len(blocks), dtype=torch.float32)
    many = SERIAL_VALUES // block
    pieces = [slice(start, start + many) for start in range(0, len(blocks), many)]
    room = torch.empty(many, block)
    for piece in pieces:
        own = blocks[piece]
        torch.amax(torch.abs(own, out=room[: len(own)]), -1, out=peaks[piece])
    scale = _int8_scale(peaks.numpy())
    if not np.isfinite(scale).all():
        which = int(np.argmin(np.isfinite(scale)))
        magnitudes = blocks[which].abs().numpy()
        channel = int(np.argmax(np.where(np.isfinite(magnitudes), magnitudes, np.inf)))
        token, which_block = divmod(which, width // block)
        place = which_block * block + channel
        return Unfit(token // tokens, token % tokens, place, float(blocks[which, channel]))
    steps = torch.from_numpy(np.where(scale == 0, np.float16(1), scale).astype(np.float32))[:, None]
    for piece in pieces:
        own = blocks[piece]
        stored[piece].copy_(torch.div(own, steps[piece], out=room[: len(own)]).round_())
    return Rounded(stored.numpy().reshape(values_NLD.shape), scale.reshape(samples, tokens, -1))


def _int8_scale(peaks: np.ndarray) -> np.ndarray:
    """float16 step of blocks with these largest magnitudes; not finite where float16 has none."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (peaks / np.float32(INT8_STEPS)).astype(np.float16)
        low = scale.astype(np.float32) * INT8_STEPS < peaks  # exact: 11 bits times 7
        return (scale.view(np.uint16) + low).view(np.float16)  # the next float16, of numbers that are not negative


def _bit_round(stored: np.ndarray, dropped: int) -> np.ndarray:
    """Floats, as uint16, without the last `dropped` bits of their mantissa: to nearest, ties to even. The same as
    numcodecs' BitRound, which does not know bfloat16."""
    if not dropped:
        return stored
    half_less = np.uint16((1 << (dropped - 1)) - 1)
    rounded = stored + (half_less + ((stored >> dropped) & np.uint16(1)))
    return rounded & np.uint16(0xFFFF ^ ((1 << dropped) - 1))
