"""Codecs: which numbers stand on disk for a feature, what they can hold, and the filters that may follow. Only names,
sizes and bounds, free of torch, for the plan and for the layout; the arithmetic is in cache.rounding."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cache.errors import CacheError

if TYPE_CHECKING:
    from models.spec import FeatureSpec

INT8_STEPS = 127
"""int8 is symmetric: -127..127 steps of a block's scale; -128 is never stored."""
FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Codec:
    """How one feature is stored."""

    dtype: str
    """On disk. bfloat16 lies there as uint16, which every reader knows."""
    prefix_dtype: str
    """Of class and register tokens: few, so that int8 leaves them in float16."""
    largest: float
    """Magnitude above which a feature stops the build."""
    mantissa: int
    """Stored bits of the mantissa, of which bit rounding may keep fewer; 0 where there is none."""


CODECS = {
    "float16": Codec("<f2", "<f2", FLOAT16_MAX, 10),
    "bfloat16": Codec("<u2", "<u2", (2 - 2**-7) * 2.0**127, 7),
    "int8": Codec("|i1", "<f2", INT8_STEPS * FLOAT16_MAX, 0),
}

COMPRESSIONS = ("lz4", "zstd")


class Filter(NamedTuple):
    """What happens to values after the codec."""

    keepbits: int
    """Mantissa bits that bit rounding keeps; 0 keeps all. Changes numbers."""
    compression: str
    """lz4 or zstd, or empty. Changes no number."""


def parse_filter(text: str) -> Filter:
    """`none`, `lz4`, `zstd`, `bitround-<keepbits>`, or both: `bitround-<keepbits>+zstd`. CacheError otherwise."""
    found = re.fullmatch(r"(?:none|(?:bitround-([1-9]\d?))?(\+)?(lz4|zstd)?)", text)
    keepbits, plus, compression = (found[1], found[2], found[3]) if found and text else (None, "?", None)
    if bool(plus) != bool(keepbits and compression):
        raise CacheError(
            f"cache.filter = {text} is unknown; use none, lz4, zstd, bitround-<bits kept> or bitround-<bits kept>+zstd"
        )
    return Filter(int(keepbits or 0), compression or "")


def codec_problem(codec: str, width: int, block: int, keepbits: int) -> str:
    """What is wrong with a codec's settings for features of `width` channels (0: not known yet), with the remedy;
    empty where nothing is."""
    if codec not in CODECS:
        return f"cache.codec = {codec} is unknown; use one of {', '.join(CODECS)}"
    if codec == "int8" and (block < 1 or (width and width % block)):
        fitting = [size for size in (128, 64, 32, 16, 8, 4, 2, 1) if width % size == 0 and size <= max(block, 1)]
        return f"cache.block = {block} does not divide the {width} channels of a token; use cache.block={fitting[0]}"
    mantissa = CODECS[codec].mantissa
    if keepbits and not mantissa:
        return f"cache.filter = bitround-{keepbits} rounds floats, but cache.codec = {codec} stores none; use zstd"
    if keepbits > mantissa:
        return f"cache.filter = bitround-{keepbits} keeps more than the {mantissa} bits of {codec}; use 1..{mantissa}"
    return ""


def codec_fields(codec: str, block: int, keepbits: int) -> dict[str, str | int]:
    """The fields of a FeatureSpec that say how features are stored; 0 for what has no say with this codec."""
    return {"codec": codec, "block": block if codec == "int8" else 0, "keepbits": keepbits}


def describe(spec: FeatureSpec) -> str:
    """How features are stored, in words."""
    if spec.codec == "int8":
        return f"int8 in blocks of {spec.block} channels"
    return f"{spec.codec} rounded to {spec.keepbits} bits" if spec.keepbits else spec.codec
