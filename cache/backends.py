"""The one place that picks a backend: `open_cache` for reading, `files_of` for building."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from cache.checksum import Buffer
from cache.layout import Layout, Shard, Stored
from cache.manifest import manifest_stamp, read_manifest
from cache.place import place_of
from cache.reader import MEMORY, RowReader
from cache.store import CacheReader
from cache.wds_reader import TarCache
from cache.zarr_reader import ZarrCache

READERS: dict[str, type[RowReader]] = {"zarr": ZarrCache, "webdataset": TarCache}


class Files(Protocol):
    """What a backend's writer makes of a cache; cache.writer puts it on disk, safely."""

    def static_files(
        self, layout: Layout, labels: np.ndarray, keys: Sequence[str], digests: np.ndarray
    ) -> dict[str, bytes]:
        """Content of the files that hold no rows of a view, by name."""
        ...

    def shard_files(
        self,
        folder: Path,
        layout: Layout,
        shard: Shard,
        pieces: Iterable[Stored],
        keys: Sequence[str],
        last_crcs: dict[str, int],
    ) -> Iterator[tuple[str, Iterable[Buffer]]]:
        """A shard's files in the order of `Layout.files`, each by name and in parts, of its rows, some at a time. To be
        written one after the other: the rows are taken while the first is. Fills `last_crcs` (ShardEntry), by name,
        where the backend has them."""
        ...


def files_of(backend: str) -> Files:
    """The writer of a backend."""
    if backend == "webdataset":
        from cache import wds_writer

        return wds_writer
    from cache import zarr_writer  # imports zarr, which readers do without

    return zarr_writer


def open_cache(path: str | os.PathLike[str], verify: bool = False, memory: int = MEMORY) -> CacheReader:
    """Reader of the finished cache at `path`; with `verify` every file is hashed first.

    A cache of up to `memory` bytes is mapped, which is faster; its pages then count as the process's memory.

    path may be a URL, such as `s3://bucket/caches/cut-3-1234abcd`.

    Raises MissingCache (nothing there, or unfinished), DamagedCache, StaleCache (another version's format),
    StoreUnreachable.
    """
    folder = place_of(path)
    manifest = read_manifest(folder)
    return READERS[manifest.backend](folder, verify, memory, manifest)


def shared_reader(path: str, memory: int) -> CacheReader:
    """The process's reader of a cache that the tasks of a build read, opened once and again where its manifest is a new
    one. Errors as `open_cache`; `close_shared` when the build is over."""
    stamp = manifest_stamp(place_of(path))
    return _shared(path, memory, stamp) if stamp else open_cache(path, memory=memory)


@lru_cache(maxsize=2)  # what a cache continues, and what it takes over; what is mapped counts as memory
def _shared(path: str, memory: int, stamp: tuple[int | str, ...]) -> CacheReader:
    return open_cache(path, memory=memory)


def close_shared() -> None:
    """Lets go of the shared readers of this process, and of their files, which may be removed now."""
    _shared.cache_clear()
