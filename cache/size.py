"""How large a cache will be on disk, before anything is computed: for the plan, and for refusing a build that does not
fit. Free of torch and zarr."""

from __future__ import annotations

import math
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from cache.errors import CacheError
from cache.layout import Layout, RowArray, Shard
from cache.place import free_bytes
from cache.tar import COLUMNS, END, npy_header, padding

# Measured on caches written here; only their order of magnitude matters beside the arrays.
METADATA_BYTES = 1200
MANIFEST_ENTRY_BYTES = 300
KEY_BYTES = 16
DIGEST_BYTES = 32
BLOCK = tarfile.BLOCKSIZE


def array_bytes(layout: Layout, array: RowArray) -> int:
    """Bytes of an array in the shard files, all views, exactly: values, checksums and indexes, or members of tars."""
    if layout.backend == "webdataset":
        size = len(npy_header(array)) + array.splits * array.chunk_bytes
        return layout.spec.views * layout.num_samples * (BLOCK + size + len(padding(size)))
    whole, rest = divmod(layout.num_samples, layout.shard_rows)
    view = whole * array.shard_bytes(layout.shard_rows, layout.shard_rows)
    view += array.shard_bytes(rest, layout.shard_rows) if rest else 0
    return layout.spec.views * view


def feature_bytes(layout: Layout) -> int:
    """Bytes of all feature shards, all views, exactly."""
    return array_bytes(layout, layout.arrays[0])


def cache_bytes(layout: Layout) -> int:
    """Bytes of the whole cache: arrays exactly (at most, where they are compressed); metadata, labels and keys (of
    unknown length) about."""
    arrays = sum(array_bytes(layout, array) for array in layout.arrays)
    samples = layout.spec.views * layout.num_samples
    if layout.backend == "webdataset":
        arrays += samples * (2 * BLOCK + sum(array.splits for array in layout.arrays) * COLUMNS * 8)
        arrays += layout.spec.views * math.ceil(layout.num_samples / layout.shard_rows) * (len(END) + 128)
    files = len(layout.arrays) * layout.spec.views * math.ceil(layout.num_samples / layout.shard_rows)
    metadata = METADATA_BYTES * len(layout.arrays) * layout.spec.views
    return arrays + metadata + files * MANIFEST_ENTRY_BYTES + layout.num_samples * (8 + DIGEST_BYTES + KEY_BYTES)


def part_bytes(layout: Layout, shards: Iterable[Shard]) -> int:
    """The share of a cache's bytes that some of its shards have."""
    return cache_bytes(layout) * sum(shard.rows for shard in shards) // (layout.num_samples * layout.spec.views)


def check_space(folder: Path, layout: Layout, missing: Iterable[Shard]) -> None:
    """CacheError, with the numbers, when the shards that are still to be written do not fit the disk of the folder."""
    free, needed = free_bytes(folder), part_bytes(layout, missing)
    if needed > free:
        raise CacheError(
            f"the cache at {os.fspath(folder)} needs {needed / 1e9:.1f} GB more, its disk has {free / 1e9:.1f} GB; "
            f"lower cache.views (now {layout.spec.views}) or data.limit, or point cache.root at a larger disk"
        )
