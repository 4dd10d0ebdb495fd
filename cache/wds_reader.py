"""The reader of a WebDataset cache: rows at random, by the index beside every tar."""

from __future__ import annotations

import io
import json
from itertools import accumulate
from pathlib import Path
from weakref import WeakMethod

import numpy as np

from cache import reader
from cache.checksum import checksum
from cache.errors import DamagedCache
from cache.layout import DIGESTS, KEYS, LABELS, RowArray, Shard
from cache.manifest import CacheManifest
from cache.place import read_bytes
from cache.reader import Chunks, RowReader
from cache.tar import TarShard


class TarCache(RowReader):
    """The CacheReader of a WebDataset cache. Raises MissingCache, DamagedCache or StaleCache when it does not open."""

    def __init__(
        self, folder: Path, verify: bool = False, memory: int = reader.MEMORY, manifest: CacheManifest | None = None
    ) -> None:
        super().__init__(folder, verify, memory, manifest)
        arrays = self._layout.arrays
        self._sizes = [array.chunk_bytes for array in arrays for _ in range(array.splits)]
        starts = accumulate((array.splits for array in arrays), initial=0)
        self._first = dict(zip((array.name for array in arrays), starts, strict=False))
        self._opener = WeakMethod(self._open_shard)

    def _samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        labels, digests = (np.load(io.BytesIO(read_bytes(self.folder / name))) for name in (LABELS, DIGESTS))
        return labels, np.array(json.loads(read_bytes(self.folder / KEYS)), object), digests

    def _locate(self, array: RowArray, view: int, row: int) -> tuple[Chunks, int]:
        number, place = divmod(row, self._layout.shard_rows)
        return reader.open_shard(self._opener, view, number), place * len(self._sizes) + self._first[array.name]

    def _open_shard(self, view: int, number: int) -> TarShard:
        tar, index = self._layout.files(Shard(view, number * self._layout.shard_rows, 0))
        path = self.folder / index
        try:
            content = read_bytes(path)
        except FileNotFoundError:
            raise DamagedCache(f"{path} is missing; run `make repair`") from None
        known = self._entries[index].checksum
        if checksum(content, known) != known:
            raise DamagedCache(f"{path} is altered; run `make repair`")
        return TarShard(self.folder / tar, self._open(tar), np.load(io.BytesIO(content)), self._sizes)
