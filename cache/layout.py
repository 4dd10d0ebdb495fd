"""What lies where in a cache: its arrays, their shards and inner chunks, the name and size of every shard file.
The writer, the reader, verification and the prediction of disk space all go by this one table. Free of torch and
zarr."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from cache.codecs import CODECS, COMPRESSIONS, codec_problem
from cache.errors import CacheError
from models.spec import FeatureSpec

STORE = "data.zarr"
TARS = "shards"
INDEX = "index"
"""Beside the tars: where their chunks lie, labels and keys."""
LABELS, KEYS, DIGESTS = f"{INDEX}/labels.npy", f"{INDEX}/keys.json", f"{INDEX}/digests.npy"
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
BLOSC_BYTES = 16
"""What Blosc adds to a chunk that it cannot make smaller."""


MOMENTS = ("total", "squares", "peak", "error_squares", "given_squares", "error_peak")
"""Of a sample's features: sum, sum of squares and largest magnitude of what is stored; of its difference to what the
frozen blocks gave: sum of squares, sum of squares of what they gave, largest."""


Stored = Mapping[str, np.ndarray]
"""Some rows as they are stored: of every array, by name, the same number of entries."""


class Shard(NamedTuple):
    """The rows that are built, resumed and repaired as one."""

    view: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class RowArray:
    """An array with one entry per sample, cut into `splits` inner chunks along the entry's first axis."""

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    splits: int = 1
    compression: str = ""
    """lz4 or zstd, by Blosc, chunk by chunk; empty where chunks lie there as they are."""

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (1, self.row_shape[0] // self.splits, *self.row_shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Size of an inner chunk, uncompressed."""
        return math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize

    def shard_bytes(self, rows: int, shard_rows: int) -> int:
        """Size of a shard file that holds `rows` of its `shard_rows` rows; at most, where it is compressed."""
        chunk = self.chunk_bytes + (BLOSC_BYTES if self.compression else 0) + CRC_BYTES
        return self.splits * (rows * chunk + shard_rows * INDEX_ENTRY_BYTES) + CRC_BYTES


@dataclass(frozen=True)
class Layout:
    """A cache of `num_samples` rows in shards of `shard_rows`. CacheError when the sizes do not go together."""

    spec: FeatureSpec
    num_samples: int
    shard_rows: int
    backend: str = "zarr"
    compression: str = ""
    """lz4 or zstd; like the sizes of shards no part of the spec, since no number depends on it."""

    def __post_init__(self) -> None:
        if self.backend == "webdataset" and self.compression:
            raise CacheError(
                f"cache.filter = {self.compression} compresses no member of a tar; use cache.backend=zarr or none"
            )
        assert self.compression in ("", *COMPRESSIONS)
        if problem := codec_problem(self.spec.codec, self.spec.width, self.spec.block, self.spec.keepbits):
            raise CacheError(problem)
        if self.num_samples < 1:
            raise CacheError(f"a cache of {self.num_samples} samples cannot be built; it needs at least 1")
        if self.shard_rows < 1:
            raise CacheError(f"cache.shard_rows={self.shard_rows} must be at least 1")
        if self.spec.num_tokens % self.spec.groups:
            raise CacheError(
                f"{self.spec.num_tokens} tokens do not split into {self.spec.groups} equal groups; "
                f"change mask.groups, model.image_size or model.patch_size"
            )

    @cached_property
    def arrays(self) -> tuple[RowArray, ...]:
        """The row arrays of a view, features first."""
        spec, tokens, codec, pack = self.spec, self.spec.num_tokens, CODECS[self.spec.codec], self.compression
        arrays = [RowArray("features", (tokens, spec.width), codec.dtype, spec.groups, pack)]
        if spec.block:
            arrays.append(RowArray("scale", (tokens, spec.width // spec.block), "<f2", spec.groups, pack))
        arrays.append(RowArray("crop", (5,), "<f4"))
        if spec.groups > 1:
            arrays.append(RowArray("token_ids", (tokens,), "|u1" if tokens <= 256 else "<u2", spec.groups))
        if spec.pixels:
            arrays.append(RowArray("pixels", (tokens, 3 * spec.patch_size**2), "|u1", compression=pack))
        if spec.prefix:  # every group has run behind a prefix of its own
            shape = (spec.groups * spec.prefix, spec.width)
            arrays.append(RowArray("prefix", shape, codec.prefix_dtype, spec.groups, pack))
        arrays.append(RowArray("moments", (len(MOMENTS),), "<f8"))
        return tuple(arrays)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, view after view, row after row."""
        return tuple(shard for view in range(self.spec.views) for shard in self.shards_of(view))

    def shards_of(self, view: int) -> list[Shard]:
        """The shards of one view, row after row."""
        starts = range(0, self.num_samples, self.shard_rows)
        return [Shard(view, first, min(self.shard_rows, self.num_samples - first)) for first in starts]

    def holds(self, shard: Shard) -> bool:
        """Whether it is one of the shards."""
        rows = min(self.shard_rows, self.num_samples - shard.first_row)
        return (
            0 <= shard.view < self.spec.views
            and 0 <= shard.first_row < self.num_samples
            and shard.first_row % self.shard_rows == 0
            and shard.rows == rows
        )

    def __getstate__(self) -> dict[str, Any]:
        # It travels with every task of a build: the list of all shards must not.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def file(self, array: RowArray, view: int, row: int) -> str:
        """Name, relative to the cache's folder, of the file that holds a row of an array of a Zarr cache."""
        return f"{STORE}/view_{view}/{array.name}/c/{row // self.shard_rows}" + "/0" * len(array.row_shape)

    def files(self, shard: Shard) -> list[str]:
        """Names of the files that a shard consists of, that of the features first: one per array, or tar and index."""
        if self.backend == "webdataset":
            name = f"view_{shard.view}-{shard.first_row // self.shard_rows:06d}"
            return [f"{TARS}/{name}.tar", f"{INDEX}/{name}.npy"]
        return [self.file(array, shard.view, shard.first_row) for array in self.arrays]
