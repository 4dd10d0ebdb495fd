"""Several attempts at one shard: a task whose worker was lost, or is slow, is given to another worker, and the first
may still be writing, even when its client is long gone. Each writes under names of its own; under a lock that is held
for a moment, the first that is complete gives its files their names and leaves the receipt, and whoever comes later
finds the shard whole, hashed afresh, and throws its own away. Stands between the writer and the disk. Free of torch and
zarr."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path

from cache.checksum import Buffer
from cache.errors import CacheError, MissingCache
from cache.layout import Layout, Shard
from cache.lock import hold_shard
from cache.manifest import (
    CacheManifest,
    ShardEntry,
    begin_stream,
    find_damage,
    manifest_stamp,
    read_manifest,
)
from cache.place import is_remote
from cache.receipts import read_receipt, receipt_name, write_receipt


class Superseded(Exception):
    """Another attempt was first; what it has written."""

    def __init__(self, entries: list[ShardEntry]) -> None:
        super().__init__(entries)
        self.entries = entries


class Attempt:
    """The files of one attempt, written and not yet named, and what is told of them."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.entries: list[ShardEntry] = []
        self.files = ExitStack()
        self._pool = pool
        self._synced: list[Future[None]] = []
        self._namings: list[ExitStack] = []

    def stream(self, path: Path, parts: Iterable[Buffer], size: int) -> tuple[int, str]:
        """Writes a file of about `size` bytes; returns its bytes and checksum. The disk settles it meanwhile."""
        written, digest, sync, naming = begin_stream(path, parts, size)
        self.files.push(naming)
        self._namings.append(naming)
        self._synced.append(self._pool.submit(sync))
        return written, digest

    def settle(self) -> None:
        """Waits until all is on disk."""
        for done in self._synced:
            done.result()

    def name(self) -> None:
        """Gives the files their names: together, since a disk takes about as long for several as for one."""
        list(self._pool.map(ExitStack.close, self._namings))


@contextmanager
def attempt(folder: Path, layout: Layout, shard: Shard) -> Iterator[Attempt]:
    """An attempt, whose files are to be streamed and `entries` filled. When the block is left, the files get their
    names, together, and the receipt says that they are there. Where another attempt was first, `entries` become its."""
    if not is_remote(folder) and not folder.is_dir():  # made anew here it would be lost with this computer's disk
        raise MissingCache(f"{folder} is not there on {socket.gethostname()}; all workers must see the caches")
    with ThreadPoolExecutor(len(layout.arrays)) as pool:
        mine = Attempt(pool)
        try:
            with mine.files:
                yield mine
                mine.settle()
                with hold_shard(folder, receipt_name(shard)):
                    if (there := settled(folder, layout, shard)) is not None:
                        raise Superseded(there)
                    mine.name()
                    write_receipt(folder, layout, receipt_name(shard), mine.entries)
        except Superseded as found:
            mine.entries[:] = found.entries


def settled(folder: Path, layout: Layout, shard: Shard) -> list[ShardEntry] | None:
    """The files of a shard that was written whole, hashed afresh; None as long as it has to be written. A receipt says
    what they should be, or the manifest of a finished cache; one that is finished with other files takes no more."""
    entries = read_receipt(folder, layout, receipt_name(shard))
    if entries is None:
        found = finished(folder)
        if found is None:
            return None
        manifest, by_name = found
        if manifest.layout != layout:
            return []
        entries = tuple(by_name[name] for name in layout.files(shard))
    return None if any(find_damage(folder, entry) for entry in entries) else list(entries)


Finished = tuple[CacheManifest, dict[str, ShardEntry]]


def finished(folder: Path) -> Finished | None:
    """The manifest of a finished cache and its files by name, read once while it stays the same; None where there is
    none to go by."""
    try:
        stamp = () if is_remote(folder) else manifest_stamp(folder)
        return _read(folder, stamp) if stamp else _read.__wrapped__(folder, stamp)
    except CacheError:
        return None


@lru_cache(maxsize=1)
def _read(folder: Path, stamp: tuple[int | str, ...]) -> Finished:
    manifest = read_manifest(folder)
    return manifest, {entry.name: entry for entry in manifest.shards}
