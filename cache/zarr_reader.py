"""The reader of a Zarr cache. It never imports zarr, for which a missing chunk is a chunk of zeros."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakMethod

import numpy as np
from numcodecs import VLenUTF8

from cache import reader
from cache.layout import CRC_BYTES, STORE, RowArray
from cache.manifest import CacheManifest
from cache.place import read_bytes
from cache.reader import Chunks, RowReader
from cache.shard import ShardReader


class ZarrCache(RowReader):
    """The CacheReader of a Zarr cache. Raises MissingCache, DamagedCache or StaleCache when it cannot be opened."""

    def __init__(
        self, folder: Path, verify: bool = False, memory: int = reader.MEMORY, manifest: CacheManifest | None = None
    ) -> None:
        super().__init__(folder, verify, memory, manifest)
        self._opener = WeakMethod(self._open_shard)

    def _samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        digests = np.frombuffer(self._static("digests/c/0/0"), np.uint8).reshape(len(self), -1)
        return np.frombuffer(self._static("labels/c/0"), "<i8"), VLenUTF8().decode(self._static("keys/c/0")), digests

    def _static(self, name: str) -> bytes:
        return read_bytes(self.folder / STORE / name)[:-CRC_BYTES]

    def _locate(self, array: RowArray, view: int, row: int) -> tuple[Chunks, int]:
        shard_rows = self._layout.shard_rows
        shard = reader.open_shard(self._opener, self._layout.file(array, view, row), shard_rows * array.splits)
        return shard, row % shard_rows * array.splits

    def _open_shard(self, name: str, chunks: int) -> ShardReader:
        path = self.folder / name
        return ShardReader(path, self._open(name), chunks, self._entries[name].last_crc)
