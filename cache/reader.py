"""What readers of every backend share: rows of one view, all tokens or one group of them, straight from memory-mapped
shards, every chunk's checksum checked, restored to float32. What the loader's threads call. A backend only says in
which shard, and as which chunk of it, a row lies.

Shapes: B batch, L all tokens (or one group's), S prefix tokens of all groups (or one's), D width, P values of a pixel
patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numcodecs import blosc

from cache.errors import CacheError, DamagedCache
from cache.layout import RowArray
from cache.manifest import CacheManifest, ShardEntry, find_damage, read_manifest
from cache.rounding import restore
from cache.store import FeatureBatch

# A map holds a file descriptor, of which a process often has 1,024; ImageNet has 5,000 shards per array and view.
OPEN_SHARDS = 256


class Chunks(Protocol):
    """An open shard."""

    def chunk(self, number: int) -> memoryview:
        """Content of a chunk, its checksum checked. DamagedCache."""
        ...


class RowReader(ABC):
    """A CacheReader but for where its rows lie. Raises MissingCache, DamagedCache or StaleCache when it cannot be
    opened."""

    def __init__(self, folder: Path, verify: bool = False) -> None:
        self.folder = folder
        self.manifest: CacheManifest = read_manifest(folder)
        self._layout = self.manifest.layout
        self._arrays = {array.name: array for array in self._layout.arrays}
        self._entries = {entry.name: entry for entry in self.manifest.shards}
        for entry in self._entries.values():
            # Metadata, labels and keys are read once, so they are hashed here; shards are checked chunk by chunk.
            if verify or entry.rows == 0:
                _require_whole(folder, entry)
        self._labels, self._keys = self._labels_and_keys()

    @abstractmethod
    def _labels_and_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 labels and (N,) keys."""

    @abstractmethod
    def _locate(self, array: RowArray, view: int, row: int) -> tuple[Chunks, int]:
        """The shard that holds a row of an array, and the number of the first of the row's chunks in it."""

    def __reduce__(self) -> tuple[type[RowReader], tuple[Path]]:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def read(self, rows: Sequence[int] | np.ndarray, view: int = 0, group: int | None = None) -> FeatureBatch:
        """Rows of a view, in the order asked for; only one token group of them when `group` is given.

        Raises CacheError for a row, view or group that the cache does not have, DamagedCache naming the file.
        """
        rows_B = self._checked_rows(rows, view)
        groups = self.manifest.spec.groups
        if group is not None and not 0 <= group < groups:
            raise CacheError(f"group {group} is not in the cache at {self.folder}; it has groups 0..{groups - 1}")
        codec = self.manifest.spec.codec
        scale = self._gather("scale", rows_B, view, group) if "scale" in self._arrays else None
        features_BLD = restore(self._gather("features", rows_B, view, group), codec, scale)
        prefix_BSD = None
        if "prefix" in self._arrays:
            # int8 leaves the few prefix tokens in float16.
            prefix_BSD = restore(self._gather("prefix", rows_B, view, group), "float16" if scale is not None else codec)
        if "token_ids" in self._arrays:
            ids_BL = torch.from_numpy(self._gather("token_ids", rows_B, view, group).astype(np.int64))
        else:
            ids_BL = torch.arange(self.manifest.num_tokens).repeat(len(rows_B), 1)
        return FeatureBatch(
            features_BLD=features_BLD,
            ids_BL=ids_BL,
            pixels_BLP=torch.from_numpy(self._gather("pixels", rows_B, view)) if "pixels" in self._arrays else None,
            labels_B=torch.from_numpy(self._labels[rows_B]),
            keys=tuple(self._keys[rows_B]),
            prefix_BSD=prefix_BSD,
        )

    def crops(self, rows: Sequence[int] | np.ndarray, view: int = 0) -> np.ndarray:
        """(B, 5) float32: top, left, height, width and flip of each row's view. Errors as for `read`."""
        return self._gather("crop", self._checked_rows(rows, view), view)

    def _checked_rows(self, rows: Sequence[int] | np.ndarray, view: int) -> np.ndarray:
        if not 0 <= view < self.manifest.views:
            last = self.manifest.views - 1
            raise CacheError(f"view {view} is not in the cache at {self.folder}; it has views 0..{last}")
        rows_B = np.asarray(rows, np.int64)
        outside = rows_B[(rows_B < 0) | (rows_B >= len(self))]
        if outside.size:
            raise CacheError(f"row {outside[0]} is not in the cache at {self.folder}; it has rows 0..{len(self) - 1}")
        return rows_B

    def _gather(self, name: str, rows_B: np.ndarray, view: int, group: int | None = None) -> np.ndarray:
        array = self._arrays[name]
        splits = range(array.splits) if group is None else (group,)
        _, first, *rest = array.chunk_shape
        values = np.empty((len(rows_B), len(splits), first, *rest), array.dtype)
        for b, row in enumerate(rows_B.tolist()):
            shard, number = self._locate(array, view, row)
            for s, split in enumerate(splits):
                chunk = shard.chunk(number + split)
                content = blosc.decompress(np.frombuffer(chunk, np.uint8)) if array.compression else chunk
                values[b, s] = np.frombuffer(content, array.dtype).reshape(first, *rest)
        return values.reshape(len(rows_B), len(splits) * first, *rest)


def _require_whole(folder: Path, entry: ShardEntry) -> None:
    what = find_damage(folder, entry)
    if what:
        raise DamagedCache(f"{folder / entry.name} {what}; run `make repair`")
