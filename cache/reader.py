"""What readers of every backend share: rows of one view, all tokens or one group of them, straight from their
bytes in the shards, every chunk's checksum checked, restored to float32. What the loader's threads call. A backend only
says in which shard, and as which chunk of it, a row lies.

Shapes: B batch, L all tokens (or one group's), S prefix tokens of all groups (or one's), D width, P values of a pixel
patch.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable
from weakref import WeakMethod, finalize

import numpy as np
import torch
from numcodecs import blosc

from cache.buffers import FRESH, Buffers
from cache.errors import CacheError, DamagedCache
from cache.layout import RowArray
from cache.manifest import CacheManifest, ShardEntry, find_damage, read_manifest
from cache.objects import ObjectFile
from cache.place import is_remote
from cache.ranges import LocalFile, MappedFile, RangeFile
from cache.rounding import restore
from cache.store import FeatureBatch

OPEN_SHARDS = 256
"""Of all readers of a process together. Each is a file descriptor, of which a process often has 1,024; ImageNet has
5,000 shards per array and view."""

REQUESTS = 16
"""Rows that are asked for at once where they lie in an object store."""

MEMORY = 512 << 20
"""Bytes of mapped files that a reader may keep in memory; a larger cache is not mapped."""


class Chunks(Protocol):
    """An open shard."""

    def read(self, first: int, out_NC: np.ndarray) -> None:
        """N adjacent chunks of C bytes from chunk `first` on, checksums checked, into uint8 rows. DamagedCache."""
        ...


@runtime_checkable
class PackedChunks(Chunks, Protocol):
    """An open shard whose chunks are compressed, so that each has a size of its own."""

    def chunk(self, number: int) -> np.ndarray:
        """(C,) uint8: a chunk as it is stored, its checksum checked. DamagedCache."""
        ...


@lru_cache(OPEN_SHARDS)
def open_shard(opener: WeakMethod[Callable[..., Chunks]], *place: Hashable) -> Chunks:
    """What a reader's method opens, kept for its next row. The reader is held weakly: its shards go when it does."""
    opened = opener()
    assert opened is not None, "its reader asks"
    return opened(*place)


def _close_shards() -> None:
    open_shard.cache_clear()  # of all readers: one goes seldom, and opening is cheap


class RowReader(ABC):
    """A CacheReader but for where its rows lie. Raises MissingCache, DamagedCache or StaleCache when it cannot be
    opened."""

    def __init__(
        self, folder: Path, verify: bool = False, memory: int = MEMORY, manifest: CacheManifest | None = None
    ) -> None:
        self.folder, self._memory = folder, memory
        self.manifest: CacheManifest = manifest or read_manifest(folder)
        self._layout = self.manifest.layout
        self._arrays = {array.name: array for array in self._layout.arrays}
        self._entries = {entry.name: entry for entry in self.manifest.shards}
        for entry in self._entries.values():
            # Metadata, labels and keys are read once, so they are hashed here; shards are checked chunk by chunk.
            if verify or entry.rows == 0:
                _require_whole(folder, entry)
        self.labels, self.keys, self.digests = self._samples()
        self._local = threading.local()
        finalize(self, _close_shards).atexit = False
        self._mapped = sum(entry.bytes for entry in self._entries.values()) <= memory

    @abstractmethod
    def _samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N,) int64 labels, (N,) keys and (N, 32) uint8 sha256 of the images."""

    @abstractmethod
    def _locate(self, array: RowArray, view: int, row: int) -> tuple[Chunks, int]:
        """The shard that holds a row of an array, and the number of the first of the row's chunks in it."""

    def __reduce__(self) -> tuple[type[RowReader], tuple[Path, bool, int]]:
        return type(self), (self.folder, False, self._memory)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def read(
        self,
        rows: Sequence[int] | np.ndarray,
        view: int = 0,
        group: int | None = None,
        into: Buffers = FRESH,
    ) -> FeatureBatch:
        """Rows of a view, in the order asked for; only one token group of them when `group` is given.

        The batch lies in memory of `into`, and is overwritten when that is handed to another call.
        Raises CacheError for a row, view or group that the cache does not have, DamagedCache naming the file.
        """
        rows_B = self._checked_rows(rows, view)
        groups = self.manifest.spec.groups
        if group is not None and not 0 <= group < groups:
            raise CacheError(f"group {group} is not in the cache at {self.folder}; it has groups 0..{groups - 1}")
        codec = self.manifest.spec.codec
        few = "float16" if codec == "int8" else codec  # int8 leaves the few prefix tokens in float16
        prefix_BSD = self._restored("prefix", few, rows_B, view, group, into) if "prefix" in self._arrays else None
        if "token_ids" in self._arrays:
            ids_BL = torch.from_numpy(self.stored("token_ids", rows_B, view, group).astype(np.int64))
        else:
            ids_BL = torch.arange(self.manifest.num_tokens).repeat(len(rows_B), 1)
        return FeatureBatch(
            features_BLD=self._restored("features", codec, rows_B, view, group, into),
            ids_BL=ids_BL,
            pixels_BLP=self._pixels(rows_B, view, into) if "pixels" in self._arrays else None,
            labels_B=torch.from_numpy(self.labels[rows_B]),
            keys=tuple(self.keys[rows_B]),
            prefix_BSD=prefix_BSD,
        )

    def crops(self, rows: Sequence[int] | np.ndarray, view: int = 0) -> np.ndarray:
        """(B, 5) float32: top, left, height, width and flip of each row's view. Errors as for `read`."""
        return self.stored("crop", self._checked_rows(rows, view), view)

    def _checked_rows(self, rows: Sequence[int] | np.ndarray, view: int) -> np.ndarray:
        if not 0 <= view < self.manifest.views:
            last = self.manifest.views - 1
            raise CacheError(f"view {view} is not in the cache at {self.folder}; it has views 0..{last}")
        rows_B = np.asarray(rows, np.int64)
        outside = rows_B[(rows_B < 0) | (rows_B >= len(self))]
        if outside.size:
            raise CacheError(f"row {outside[0]} is not in the cache at {self.folder}; it has rows 0..{len(self) - 1}")
        return rows_B

    def stored(
        self, name: str, rows_B: np.ndarray, view: int = 0, group: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """(B, ...): an array's rows as they are stored, in the order asked for; of one token group when it is given."""
        array, splits = self._arrays[name], self._splits(name, group)
        _, first, *rest = array.chunk_shape
        shape = (len(rows_B), len(splits) * first, *rest)
        values = np.empty(shape, array.dtype) if out is None else out
        assert values.shape == shape and values.dtype == array.dtype and values.flags.c_contiguous
        values_BNC = values.reshape(len(rows_B), len(splits), -1).view(np.uint8)
        if not is_remote(self.folder):
            for value_NC, row in zip(values_BNC, rows_B.tolist(), strict=True):
                self._read_row(array, view, row, splits, value_NC)
            return values
        with ThreadPoolExecutor(REQUESTS) as pool:  # a store answers many requests as soon as one
            list(pool.map(lambda row, out: self._read_row(array, view, row, splits, out), rows_B.tolist(), values_BNC))
        return values

    def _restored(
        self, name: str, codec: str, rows_B: np.ndarray, view: int, group: int | None, into: Buffers
    ) -> torch.Tensor:
        """(B, L, D) float32: rows of an array of features. One by one: a row stays in the core's cache from the disk's
        pages to its checksum to its float32 values."""
        array, splits = self._arrays[name], self._splits(name, group)
        _, first, width = array.chunk_shape
        found_BLD = into.take(name, (len(rows_B), len(splits) * first, width), torch.float32)
        scale = self.stored("scale", rows_B, view, group) if codec == "int8" else None
        if is_remote(self.folder):
            for place, stored_LD in enumerate(self.stored(name, rows_B, view, group)):
                restore(stored_LD, codec, None if scale is None else scale[place], found_BLD[place])
            return found_BLD
        row_LD = self._scratch(array, len(splits) * first)
        row_NC = row_LD.reshape(len(splits), -1).view(np.uint8)
        for place, row in enumerate(rows_B.tolist()):
            self._read_row(array, view, row, splits, row_NC)
            restore(row_LD, codec, None if scale is None else scale[place], found_BLD[place])
        return found_BLD

    def _pixels(self, rows_B: np.ndarray, view: int, into: Buffers) -> torch.Tensor:
        pixels_BLP = into.take("pixels", (len(rows_B), *self._arrays["pixels"].row_shape), torch.uint8)
        self.stored("pixels", rows_B, view, out=pixels_BLP.numpy())
        return pixels_BLP

    def _splits(self, name: str, group: int | None) -> range:
        """The chunks of a row that are read."""
        splits = self._arrays[name].splits
        return range(splits) if group is None or splits == 1 else range(group, group + 1)

    def _read_row(self, array: RowArray, view: int, row: int, splits: range, out_NC: np.ndarray) -> None:
        """Adjacent chunks of a row of an array."""
        shard, number = self._locate(array, view, row)
        if not array.compression:
            shard.read(number + splits.start, out_NC)
            return
        assert isinstance(shard, PackedChunks)
        for chunk, content in zip(splits, out_NC, strict=True):
            content[:] = np.frombuffer(blosc.decompress(shard.chunk(number + chunk)), np.uint8)

    def _scratch(self, array: RowArray, first: int) -> np.ndarray:
        """Memory for a row of a feature array as it is stored; each thread has its own."""
        key, held = f"{array.name} {first}", self._local.__dict__
        if key not in held:
            held[key] = np.empty((first, *array.row_shape[1:]), array.dtype)
        scratch: np.ndarray = held[key]
        return scratch

    def _open(self, name: str) -> RangeFile:
        """A shard's file, of the size that the manifest says."""
        path, size = self.folder / name, self._entries[name].bytes
        if is_remote(path):
            return ObjectFile(path, size)
        file: RangeFile = MappedFile(path) if self._mapped else LocalFile(path)
        if file.size != size:
            raise DamagedCache(f"{path} has {file.size} bytes instead of {size}; run `make repair`")
        return file


def _require_whole(folder: Path, entry: ShardEntry) -> None:
    what = find_damage(folder, entry)
    if what:
        raise DamagedCache(f"{folder / entry.name} {what}; run `make repair`")
