"""What lies where in a Zarr cache: its arrays, their shards and inner chunks, the name and size of every shard file.
The writer, the reader, verification and the prediction of disk space all go by this one table. Free of torch and
zarr."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cache.errors import CacheError
from models.spec import FeatureSpec

STORE = "data.zarr"
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16


def refuse_unbuilt(backend: str = "zarr", codec: str = "float16") -> None:
    """CacheError for settings that parse but are not built yet."""
    if backend != "zarr":
        raise CacheError(f"cache.backend={backend} is not built yet; use cache.backend=zarr")
    if codec != "float16":
        raise CacheError(f"cache.codec={codec} is not built yet; use cache.codec=float16")


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

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (1, self.row_shape[0] // self.splits, *self.row_shape[1:])

    def shard_bytes(self, rows: int, shard_rows: int) -> int:
        """Size of a shard file that holds `rows` of its `shard_rows` rows."""
        chunk = math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize + CRC_BYTES
        return self.splits * (rows * chunk + shard_rows * INDEX_ENTRY_BYTES) + CRC_BYTES


@dataclass(frozen=True)
class Layout:
    """A cache of `num_samples` rows in shards of `shard_rows`. CacheError when the sizes do not go together."""

    spec: FeatureSpec
    num_samples: int
    shard_rows: int

    def __post_init__(self) -> None:
        refuse_unbuilt(codec=self.spec.codec)
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
        """The row arrays of a view."""
        spec, tokens = self.spec, self.spec.num_tokens
        arrays = [
            RowArray("features", (tokens, spec.width), "<f2", spec.groups),
            RowArray("crop", (5,), "<f4"),
        ]
        if spec.groups > 1:
            arrays.append(RowArray("token_ids", (tokens,), "|u1" if tokens <= 256 else "<u2", spec.groups))
        if spec.pixels:
            arrays.append(RowArray("pixels", (tokens, 3 * spec.patch_size**2), "|u1"))
        if spec.prefix:  # every group has run behind a prefix of its own
            arrays.append(RowArray("prefix", (spec.groups * spec.prefix, spec.width), "<f2", spec.groups))
        return tuple(arrays)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, view after view, row after row."""
        return tuple(
            Shard(view, first, min(self.shard_rows, self.num_samples - first))
            for view in range(self.spec.views)
            for first in range(0, self.num_samples, self.shard_rows)
        )

    def file(self, array: RowArray, view: int, row: int) -> str:
        """Name, relative to the cache's folder, of the file that holds a row of an array."""
        return f"{STORE}/view_{view}/{array.name}/c/{row // self.shard_rows}" + "/0" * len(array.row_shape)

    def files(self, shard: Shard) -> list[str]:
        """Names of the files that a shard consists of, one per array."""
        return [self.file(array, shard.view, shard.first_row) for array in self.arrays]
