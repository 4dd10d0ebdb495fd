"""What a new cache can take over from a finished one beside it: the same samples, the same views, of the same making.
So a longer list of images, or more views of them, costs only what is new. Stands before the build, which then computes
the rest. Stored values are taken as they are stored, never rounded twice, and only where their checksums hold."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from cache.backends import open_cache, shared_reader
from cache.errors import CacheError
from cache.layout import Layout, Shard
from cache.manifest import MANIFEST, ShardEntry, find_damage, read_manifest, sync_folder
from cache.place import copy_object, is_remote, is_there, matching
from cache.reader import MEMORY
from cache.receipts import receipt_name, write_receipt
from cache.store import CacheReader


@dataclass(frozen=True)
class Taken:
    """Where the rows of a shard come from: small, and picklable, since workers need it."""

    folder: str
    """The donor's."""
    view: int
    """The donor's slot of the view."""
    rows: tuple[int, ...]
    """The donor's row of each row of the shard, -1 for those that are new."""
    memory: int = MEMORY
    """Bytes of the donor that may be mapped."""

    @property
    def places(self) -> np.ndarray:
        """The rows of the shard, counted from its first, that are taken."""
        return np.flatnonzero(np.array(self.rows) >= 0)

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the rows that are taken."""
        return tuple(shared_reader(self.folder, self.memory).keys[np.array(self.rows)[self.places]])

    @property
    def new(self) -> np.ndarray:
        """Those that are not."""
        return np.flatnonzero(np.array(self.rows) < 0)

    def stored(self, layout: Layout) -> dict[str, np.ndarray]:
        """The rows that are taken, of every array, as they are stored. DamagedCache where a checksum does not hold."""
        rows = np.array(self.rows)[self.places]
        donor = shared_reader(self.folder, self.memory)
        return {array.name: donor.stored(array.name, rows, self.view) for array in layout.arrays}


@dataclass(frozen=True)
class Donor:
    """A finished cache of the same kin as one that is to be built."""

    folder: Path
    reader: CacheReader
    rows_N: np.ndarray
    """(N,) its row of each wanted sample, -1 where it has none."""
    same_labels_N: np.ndarray
    """(N,) whether its label is the wanted one, too."""
    memory: int = MEMORY
    """Bytes of it that may be mapped."""

    @cached_property
    def layout(self) -> Layout:
        """What lies where in it."""
        return self.reader.manifest.layout

    @cached_property
    def entries(self) -> dict[str, ShardEntry]:
        """Its files, by name."""
        return {entry.name: entry for entry in self.reader.manifest.shards}

    def taken(self, layout: Layout, shard: Shard) -> Taken | None:
        """What it has of a shard; None where that is nothing."""
        view = self.reader.manifest.spec.slot_of(layout.spec.view_at(shard.view))
        rows = self.rows_N[shard.first_row : shard.first_row + shard.rows]
        if view is None or not (rows >= 0).any():
            return None
        return Taken(str(self.folder), view, tuple(rows.tolist()), self.memory)

    def twin(self, layout: Layout, shard: Shard) -> Shard | None:
        """The donor's shard that has the same rows in the same places, in files of the same kind; None where none
        has."""
        taken, theirs = self.taken(layout, shard), self.layout
        if taken is None:
            return None
        first, own = taken.rows[0], slice(shard.first_row, shard.first_row + shard.rows)
        twin = Shard(taken.view, first, shard.rows)
        alike = (layout.shard_rows, layout.backend, layout.compression, [a.name for a in layout.arrays])
        if (
            taken.rows != tuple(range(first, first + shard.rows))
            or not theirs.holds(twin)
            or alike != (theirs.shard_rows, theirs.backend, theirs.compression, [a.name for a in theirs.arrays])
            or (layout.backend == "webdataset" and not self.same_labels_N[own].all())  # tars hold labels
        ):
            return None
        return twin

    def link(self, folder: Path, layout: Layout, shard: Shard) -> bool:
        """Take a shard over whole, where the donor has its twin and that is sound: its files are linked, or copied
        where they cannot be, and get a receipt like those of a shard that was written."""
        twin, theirs = self.twin(layout, shard), self.layout
        if twin is None:
            return False
        mine: list[ShardEntry] = []
        for source, name in zip(theirs.files(twin), layout.files(shard), strict=True):
            entry = replace(self.entries[source], name=name, first_row=shard.first_row)
            try:
                link_file(self.folder / source, folder / name)
            except (CacheError, FileNotFoundError):
                if is_there(self.folder / source):
                    raise
                return False  # the donor lost it, or `gc` has removed it since
            if find_damage(folder, entry):  # hashed where it lies now: damage is not inherited
                (folder / name).unlink(missing_ok=True)
                return False
            mine.append(entry)
        write_receipt(folder, layout, receipt_name(shard), mine)
        return True


def find_donor(
    folder: Path,
    layout: Layout,
    kin: str,
    labels: np.ndarray,
    keys: Sequence[str],
    digests: np.ndarray,
    memory: int = MEMORY,
) -> Donor | None:
    """The finished cache beside `folder` of the same kin that has the most of what is wanted; None where none has any.

    keys and digests (N, 32), the sha256 of the images, say which samples are wanted. A donor of up to `memory` bytes is
    mapped.
    """
    best, most = None, 0
    for manifest_file in matching(folder.parent, f"*/{MANIFEST}"):
        other = manifest_file.parent
        try:
            if other == folder or read_manifest(other).kin != kin:
                continue
            donor = _donor(other, labels, keys, digests, memory)
        except CacheError:  # damaged or of another version: no donor
            continue
        spec = donor.reader.manifest.spec
        views = sum(spec.slot_of(layout.spec.view_at(slot)) is not None for slot in range(layout.spec.views))
        has = views * int((donor.rows_N >= 0).sum())
        if has > most:
            best, most = donor, has
    return best


def _donor(folder: Path, labels: np.ndarray, keys: Sequence[str], digests: np.ndarray, memory: int) -> Donor:
    reader = open_cache(folder, memory=memory)
    place = {key: row for row, key in enumerate(reader.keys)}
    rows_N = np.array([place.get(key, -1) for key in keys], np.int64)
    found = rows_N >= 0
    rows_N[found] = np.where((reader.digests[rows_N[found]] == digests[found]).all(1), rows_N[found], -1)
    same_N = np.zeros(len(keys), bool)
    found = rows_N >= 0
    same_N[found] = reader.labels[rows_N[found]] == labels[found]
    return Donor(folder, reader, rows_N, same_N, memory)


def link_file(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy of it where there can be none. All files of a cache are replaced and
    never written into, so that a cache that is repaired leaves those that share its files alone."""
    if is_remote(target) or is_remote(source):
        copy_object(source, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise CacheError(
            f"cannot link {source} as {target}: {error.strerror}; make room or the folder writable, and run again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)  # renaming a file onto itself leaves both names
