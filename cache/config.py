"""Settings of the feature cache. Free of torch, like every config module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CacheConfig:
    """How frozen features are kept."""

    backend: Literal["zarr", "webdataset"] = "zarr"
    """Format on disk."""
    codec: Literal["float16", "bfloat16", "int8"] = "float16"
    """How a feature is stored."""
    views: int = 2
    """Augmented views kept of every image; epoch e reads view e mod views."""
    pixels: Literal["stored", "recut"] = "stored"
    """Where pixel and HOG targets of a cached stage come from: the crop's uint8 pixels, stored beside the features, or
    the original image, cut again by the stored parameters of that crop: less disk, more decoding at every step."""
    root: str = ""
    """Folder of the caches; empty means <run>/cache."""
    shard_rows: int = 256
    """Samples in one shard file; a shard is the unit of building, resuming and repair."""
    encode_batch: int = 64
    """Samples that pass the frozen blocks at once while a cache is built."""
