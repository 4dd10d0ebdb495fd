"""Whether a finished cache still is what was written: `verify_cache` hashes every file again, `restore_manifest` puts a
copy in the place of a bad manifest, and without one `drop_manifest` makes the cache an unfinished one, to be built from
the start. What else is bad, stages.mend computes again."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from cache.errors import CacheError, DamagedCache, MissingCache
from cache.layout import STORE, TARS
from cache.lock import aside
from cache.manifest import (
    MANIFEST,
    READ_FORMATS,
    CacheManifest,
    ShardEntry,
    atomic_write,
    cache_folder_name,
    find_damage,
    manifest_copy,
    read_manifest,
    sync_folder,
    unseal,
)
from cache.place import StoreUnreachable, asked, files_below, is_there, place_of, read_bytes, remove_tree
from cache.receipts import RECEIPTS


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written."""

    file: str
    what: str
    rows: range | None = None
    """The samples that it held; None for a file without rows of a view."""
    view: int | None = None


Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""Maps a function over tasks, anywhere and in any order."""

PORTION = 1 << 30
"""Bytes that are hashed as one task, on whatever computer."""


def in_threads(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    """Tasks in threads of this process."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(function, tasks)


def verify_cache(folder: Path, run: Run = in_threads) -> list[Damage]:
    """Damaged files, in the manifest's order; every file is hashed. MissingCache when there is no finished cache."""
    try:
        manifest = read_manifest(folder)
    except DamagedCache:
        return [Damage(MANIFEST, "is altered or cut short: no shard can be trusted without it")]
    layout = manifest.layout
    shard_of = {name: shard for shard in layout.shards for name in layout.files(shard)}
    findings = dict(chain.from_iterable(run(damaged, [(str(folder), part) for part in portions(manifest.shards)])))
    damages = []
    for entry in manifest.shards:
        what = findings.get(entry.name, "")
        if what and entry.rows:
            rows = range(entry.first_row, entry.first_row + entry.rows)
            damages.append(Damage(entry.name, what, rows, shard_of[entry.name].view))
        elif what:
            damages.append(Damage(entry.name, what))
    return damages


def portions(entries: Iterable[ShardEntry]) -> Iterator[tuple[ShardEntry, ...]]:
    """Files in groups that are worth a task."""
    part: list[ShardEntry] = []
    total = 0
    for entry in entries:
        part.append(entry)
        total += entry.bytes
        if total >= PORTION or len(part) >= 256:
            yield tuple(part)
            part, total = [], 0
    if part:
        yield tuple(part)


def damaged(task: tuple[str, tuple[ShardEntry, ...]]) -> list[tuple[str, str]]:
    """(name, what is wrong) of the damaged files among some, hashed. MissingCache where this computer does not see the
    cache at all: that is no damage."""
    folder, entries = place_of(task[0]), task[1]
    if not is_there(folder):
        raise MissingCache(f"{folder} is not there on {socket.gethostname()}; all workers must see the caches")
    return [(entry.name, what) for entry in entries if (what := find_damage(folder, entry))]


def restore_manifest(folder: Path) -> bool:
    """Puts the copy that lies beside a cache in the place of a manifest that is damaged or gone; whether it could.
    Every shard still has to show that it is what the copy says."""
    if kept := kept_manifest(folder):
        atomic_write(folder / MANIFEST, kept[0])
    return kept is not None


def kept_manifest(folder: Path) -> tuple[bytes, CacheManifest] | None:
    """The copy of a cache's manifest, and what it says; None where there is none that is whole. StoreUnreachable."""
    try:
        content = read_bytes(manifest_copy(folder))
        found = CacheManifest.from_dict(unseal(content))
    except StoreUnreachable:  # or all would be built again that the copy saves
        raise
    except (OSError, ValueError):
        return None
    fits = found.format in READ_FORMATS and cache_folder_name(found.spec) == folder.absolute().name
    return (content, found) if fits else None


def lacks_manifest_only(folder: Path) -> bool:
    """Whether a finished cache has lost its manifest and, by their bytes, none of its other files."""
    if is_there(folder / MANIFEST) or is_there(folder / RECEIPTS) or not (kept := kept_manifest(folder)):
        return False
    return sum(size for _, size in files_below(folder)) >= sum(entry.bytes for entry in kept[1].shards)


def remove_cache(folder: Path) -> None:
    """Deletes a cache, finished or not; the manifest first, so that a kill leaves no cache that looks finished."""
    if not any(is_there(folder / part) for part in (MANIFEST, STORE, TARS, RECEIPTS)):
        raise MissingCache(f"{folder} is no cache; nothing was removed")
    try:
        drop_manifest(folder)
        remove_tree(folder)
        for kind in ("manifests", "costs"):
            aside(folder, kind, ".json").unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(
            f"cannot remove {error.filename or folder}: {error.strerror}; make the folder writable and run again"
        ) from error


def drop_manifest(folder: Path) -> None:
    """Makes an unfinished cache of one that is finished; without it no file of the cache is believed."""
    asked(folder, lambda: (folder / MANIFEST).unlink(missing_ok=True))
    sync_folder(folder)
