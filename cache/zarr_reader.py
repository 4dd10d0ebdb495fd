"""Reads a finished Zarr cache: rows of one view, all tokens or one group of them, straight from memory-mapped shards,
every chunk's checksum checked. What the loader's threads call; never imports zarr, for which a missing chunk is a chunk
of zeros.

Shapes: B batch, L all tokens (or one group's), S prefix tokens of all groups (or one's), D width, P values of a pixel
patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numcodecs import VLenUTF8

from cache.errors import CacheError, DamagedCache
from cache.layout import CRC_BYTES, STORE, Layout
from cache.manifest import CacheManifest, ShardEntry, find_damage, read_manifest
from cache.shard import ShardReader
from cache.store import FeatureBatch

# A map holds a file descriptor, of which a process often has 1,024; ImageNet has 5,000 shards per array and view.
OPEN_SHARDS = 256
# torch's grain size: an element-wise operation on no more values stays in the calling thread.
SERIAL_VALUES = 32768


class ZarrCache:
    """The CacheReader of a Zarr cache. Raises MissingCache, DamagedCache or StaleCache when it cannot be opened."""

    def __init__(self, folder: Path, verify: bool = False) -> None:
        self.folder = folder
        self.manifest: CacheManifest = read_manifest(folder)
        self._layout = Layout(self.manifest.spec, self.manifest.num_samples, self.manifest.shard_rows)
        self._arrays = {array.name: array for array in self._layout.arrays}
        entries = {entry.name: entry for entry in self.manifest.shards}
        for entry in entries.values():
            # Metadata, labels and keys are read once, so they are hashed here; shards are checked chunk by chunk.
            if verify or entry.rows == 0:
                _require_whole(folder, entry)
        self._labels = np.frombuffer(self._static("labels"), "<i8")
        self._keys: np.ndarray = VLenUTF8().decode(self._static("keys"))
        open_shard = partial(_open_shard, folder, entries)
        self._shard: Callable[[str, int], ShardReader] = lru_cache(OPEN_SHARDS)(open_shard)

    def __reduce__(self) -> tuple[type[ZarrCache], tuple[Path]]:
        return ZarrCache, (self.folder,)

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
        features_BLD = to_float32(self._gather("features", rows_B, view, group))
        prefix_BSD = to_float32(self._gather("prefix", rows_B, view, group)) if "prefix" in self._arrays else None
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
        array, shard_rows = self._arrays[name], self._layout.shard_rows
        splits = range(array.splits) if group is None else (group,)
        _, first, *rest = array.chunk_shape
        values = np.empty((len(rows_B), len(splits), first, *rest), array.dtype)
        for b, row in enumerate(rows_B.tolist()):
            shard = self._shard(self._layout.file(array, view, row), shard_rows * array.splits)
            for s, split in enumerate(splits):
                chunk = shard.chunk(row % shard_rows * array.splits + split)
                values[b, s] = np.frombuffer(chunk, array.dtype).reshape(first, *rest)
        return values.reshape(len(rows_B), len(splits) * first, *rest)

    def _static(self, name: str) -> bytes:
        return (self.folder / STORE / name / "c/0").read_bytes()[:-CRC_BYTES]


def to_float32(values: np.ndarray) -> torch.Tensor:
    """The values as float32, converted in pieces too small for torch to wake its thread pool.

    A pool of the loader's own threads spins after each use and takes the cores from the training step: on two cores
    that cost 12-18 % of a step.
    """
    stored = torch.from_numpy(values.reshape(-1))
    found = torch.empty(stored.shape, dtype=torch.float32)
    for start in range(0, len(stored), SERIAL_VALUES):
        found[start : start + SERIAL_VALUES].copy_(stored[start : start + SERIAL_VALUES])
    return found.reshape(values.shape)


def _open_shard(folder: Path, entries: dict[str, ShardEntry], name: str, chunks: int) -> ShardReader:
    path = folder / name
    reader = ShardReader(path, chunks)
    if reader.size != entries[name].bytes:
        raise DamagedCache(f"{path} has {reader.size} bytes instead of {entries[name].bytes}; run `make repair`")
    return reader


def _require_whole(folder: Path, entry: ShardEntry) -> None:
    what = find_damage(folder, entry)
    if what:
        raise DamagedCache(f"{folder / entry.name} {what}; run `make repair`")
