"""Builds a cache: `create_store` once, `write_rows` once per shard in any order and from any process, `finish` last. A
shard that is durably written leaves a receipt, so that a build that was stopped anywhere goes on at the first shard
without one. What the files of a backend are, cache.backends knows.

Shapes: N the samples of a shard, L tokens, S prefix tokens of all groups, D width, P values of a pixel patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from cache.attempts import attempt
from cache.backends import files_of
from cache.checksum import Checksum, checksum
from cache.codecs import CODECS, describe
from cache.errors import CacheError, MissingCache, StaleCache, TooCoarse, Unrepresentable
from cache.layout import INDEX, STORE, TARS, Layout, Shard, Stored
from cache.loader import prefetch
from cache.manifest import (
    MANIFEST,
    CacheManifest,
    ShardEntry,
    ViewError,
    ViewStats,
    atomic_write,
    check_spec,
    find_damage,
    manifest_copy,
    read_manifest,
    seal,
    write_manifest,
)
from cache.place import files_below, forget, matching, place_of
from cache.receipts import RECEIPTS, STORE_RECEIPT, read_receipt, receipt_name, write_receipt
from cache.rounding import Moments, Rounded, Unfit, moments, relative_rmse, round_features
from models.spec import FeatureSpec

Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Maps a function over tasks, anywhere and in any order."""


@dataclass(frozen=True)
class RowBlock:
    """All that one shard of a view holds."""

    features_NLD: np.ndarray
    """float32, tokens in stored order: group after group."""
    crop_N5: np.ndarray
    """Top, left, height, width, flip."""
    keys: tuple[str, ...]
    token_ids_NL: np.ndarray | None = None
    """Raster position of each stored token; with more than one group only."""
    pixels_NLP: np.ndarray | None = None
    """uint8 patches in raster order; where the spec stores pixels only."""
    prefix_NSD: np.ndarray | None = None
    """float32, the prefix of every group, group after group; where the model has one only."""


@dataclass(frozen=True)
class ErrorLimit:
    """How much of its features a cache may lose, as relative RMSE."""

    largest: float = math.inf
    """cache.max_error"""

    def check(self, own: float, spec: FeatureSpec) -> None:
        """TooCoarse, with the numbers, when storing a part of a cache loses so much."""
        if own > self.largest:
            raise TooCoarse(
                f"{describe(spec)} loses {own:.4f} (relative RMSE) at cut {spec.cut}, more than "
                f"cache.max_error = {self.largest:g}; use cache.codec=float16 or a smaller cache.block, or raise it"
            )

    def check_chain(self, chain: ChainError, spec: FeatureSpec) -> None:
        """The same of a cache and those before it together."""
        if not chain.relative_rmse <= self.largest:  # what is no number is refused, too
            raise TooCoarse(
                f"{describe(spec)} at cut {spec.cut}, behind the caches before it, differs by "
                f"{chain.relative_rmse:.4f} (relative RMSE of {chain.samples} samples) from what the frozen blocks "
                f"make of the images, more than cache.max_error = {self.largest:g}; use cache.codec=float16 and no "
                "cache.later_codec, or raise it"
            )


@dataclass(frozen=True)
class ChainError:
    """How far a cache that continues another is from what the frozen blocks make of the images themselves."""

    relative_rmse: float
    """Of the worst view."""
    samples: int
    """On how many it was measured."""


NO_LIMIT = ErrorLimit()


def create_store(
    folder: Path, layout: Layout, labels: np.ndarray, keys: Sequence[str], digests: np.ndarray
) -> None:
    """Writes metadata, labels, keys and digests (N, 32), the sha256 of the images. Does nothing to what is there and as
    it should be."""
    if finished(folder, layout):
        return
    assert len(labels) == len(keys) == len(digests) == layout.num_samples
    entries = []
    for name, content in files_of(layout.backend).static_files(layout, labels, keys, digests).items():
        entry = ShardEntry(name, 0, 0, len(content), checksum(content))
        if find_damage(folder, entry):
            atomic_write(folder / entry.name, content)
        entries.append(entry)
    write_receipt(folder, layout, STORE_RECEIPT, entries)


RECEIPTS_AT_ONCE = 16
"""Shards whose files are hashed as one task."""


def missing_shards(folder: Path, layout: Layout, run: Run = map) -> list[Shard]:
    """Shards still to be written: no receipt of this very layout, or files that, hashed afresh, differ from it. `run`
    hashes anywhere."""
    if finished(folder, layout):
        return []
    there = {path.name for path in matching(folder / RECEIPTS, "*.json")}
    noted = [shard for shard in layout.shards if f"{receipt_name(shard)}.json" in there]
    parts = [tuple(noted[one : one + RECEIPTS_AT_ONCE]) for one in range(0, len(noted), RECEIPTS_AT_ONCE)]
    whole = set(chain.from_iterable(run(whole_shards, [(str(folder), layout, part) for part in parts])))
    return [shard for shard in layout.shards if shard not in whole]


def whole_shards(task: tuple[str, Layout, tuple[Shard, ...]]) -> list[Shard]:
    """Those of some shards that have a receipt to which their files hash."""
    folder, layout, shards = place_of(task[0]), task[1], task[2]
    found = [(shard, read_receipt(folder, layout, receipt_name(shard))) for shard in shards]
    return [shard for shard, entries in found if entries and not any(find_damage(folder, entry) for entry in entries)]


def write_rows(
    folder: Path,
    layout: Layout,
    view: int,
    first_row: int,
    block: RowBlock,
    limit: ErrorLimit = NO_LIMIT,
    batch: int = 0,
) -> list[ShardEntry]:
    """Writes one shard of every array of a view, then its receipt; `batch` is how many samples were computed at once. A
    thread rounds and measures the next rows while this one is checksummed, hashed and written.

    Unrepresentable, naming the value; TooCoarse when the shard alone is above the limit, and CacheError on a full disk.
    """
    shard = Shard(view, first_row, len(block.keys))
    assert layout.holds(shard), f"{shard} is no shard of the layout: one writer per shard"
    many = max(1, PIECE_VALUES // (layout.spec.num_tokens * layout.spec.width))
    pieces = [slice(first, min(first + many, shard.rows)) for first in range(0, shard.rows, many)]

    def make(rows: slice) -> Stored:
        return stored_rows(layout, view, block, rows)

    with prefetch(make, pieces, 1, PIECES_AHEAD) as made:
        return write_stored(folder, layout, shard, made, block.keys, limit, batch)


PIECE_VALUES = 1 << 19
"""Features that are rounded at once, of a row at least: few enough to stay in the processor's cache until they are
written, and so many that the calls, and taking turns with the interpreter's lock, cost little beside the work."""
PIECES_AHEAD = 3
"""Pieces that are rounded and not yet written."""


def stored_rows(layout: Layout, view: int, block: RowBlock, rows: slice) -> Stored:
    """What is stored of some rows of a block. Unrepresentable, naming the value."""
    rounded, prefix_NSD = _round(block, layout, view, rows), _round_prefix(block, layout, view, rows)
    given = {
        "features": rounded.values_NLD,
        "scale": rounded.scale_NLK,
        "crop": block.crop_N5[rows],
        "token_ids": None if block.token_ids_NL is None else block.token_ids_NL[rows],
        "pixels": None if block.pixels_NLP is None else block.pixels_NLP[rows],
        "prefix": prefix_NSD,
        "moments": moments(block.features_NLD[rows], rounded, layout.spec.codec),
    }
    stored = {}
    for array in layout.arrays:
        values = given[array.name]
        assert values is not None and values.shape[1:] == array.row_shape, f"{array} in a block of the spec"
        stored[array.name] = values
    return stored


def write_stored(
    folder: Path,
    layout: Layout,
    shard: Shard,
    pieces: Iterable[Stored],
    keys: Sequence[str],
    limit: ErrorLimit = NO_LIMIT,
    batch: int = 0,
) -> list[ShardEntry]:
    """`write_rows` of rows that are as they are stored already, some at a time."""
    assert layout.holds(shard), f"{shard} is no shard of the layout: one writer per shard"
    found: list[np.ndarray] = []

    def checked() -> Iterator[Stored]:
        for piece in pieces:
            found.extend(piece["moments"])
            yield piece
        total = Moments.join(found)  # before the file gets its name
        limit.check(relative_rmse(total.error_squares, total.given_squares), layout.spec)

    size = sum(array.shard_bytes(shard.rows, layout.shard_rows) for array in layout.arrays)
    with attempt(folder, layout, shard) as mine:
        crcs: dict[str, int] = {}
        for name, parts in files_of(layout.backend).shard_files(folder, layout, shard, checked(), keys, crcs):
            written, digest = mine.stream(folder / name, parts, size)
            entry = ShardEntry(name, shard.first_row, shard.rows, written, digest, last_crc=crcs.get(name, 0))
            if not mine.entries:
                entry = replace(entry, moments=tuple(Moments.join(found)), batch=batch)
            mine.entries.append(entry)
    return mine.entries


def finish(
    folder: Path,
    layout: Layout,
    limit: ErrorLimit = NO_LIMIT,
    parent_kin: str = "",
    chain_error: ChainError | None = None,
) -> CacheManifest:
    """Declares the cache finished; a second call changes nothing. parent_kin: the kin of the cache that it continues;
    chain_error: what was measured of it, then.

    CacheError when a shard is still missing, TooCoarse when it lost more than it may.
    """
    manifest = finished(folder, layout)
    if manifest is None:
        names = [STORE_RECEIPT, *(receipt_name(shard) for shard in layout.shards)]
        receipts = {name: read_receipt(folder, layout, name) for name in names}
        missing = [name for name, entries in receipts.items() if entries is None]
        if missing:
            raise CacheError(
                f"the cache at {folder} lacks {len(missing)} of {len(names)} parts, first {missing[0]}; "
                f"run again, it resumes there"
            )
        entries = tuple(chain.from_iterable(entries for entries in receipts.values() if entries))
        stats, errors = _view_stats(entries, layout)
        worst = max(error.relative_rmse for error in errors)
        limit.check(worst, layout.spec)
        manifest = CacheManifest(
            spec=layout.spec,
            num_samples=layout.num_samples,
            shard_rows=layout.shard_rows,
            shards=entries,
            stats=stats,
            errors=errors,
            accumulated_error=chain_error.relative_rmse if chain_error else worst,
            error_samples=chain_error.samples if chain_error else 0,
            kin=layout.spec.kin(parent_kin),
            backend=layout.backend,
            compression=layout.compression,
        )
        atomic_write(manifest_copy(folder), seal(manifest.to_dict()))
        write_manifest(folder, manifest)
    _sweep(folder, {entry.name for entry in manifest.shards})
    return manifest


def amend(folder: Path, limit: ErrorLimit = NO_LIMIT) -> bool:
    """Takes what was written again of a finished cache into its manifest; says whether its files are, to the bit, what
    they were. TooCoarse as for `finish`."""
    manifest = read_manifest(folder)
    layout = manifest.layout
    names = [STORE_RECEIPT, *(receipt_name(shard) for shard in layout.shards)]
    again = {entry.name: entry for name in names for entry in read_receipt(folder, layout, name) or ()}
    entries = tuple(_renewed(folder, entry, again.get(entry.name, entry)) for entry in manifest.shards)
    same = all(now.checksum == before.checksum for now, before in zip(entries, manifest.shards, strict=True))
    if entries != manifest.shards:  # of the same bits it may be known by now in what batches they come
        stats, errors = _view_stats(entries, layout)
        worst = max(error.relative_rmse for error in errors)
        limit.check(worst, layout.spec)
        accumulated = manifest.accumulated_error if manifest.parent else worst
        manifest = replace(manifest, shards=entries, stats=stats, errors=errors, accumulated_error=accumulated)
        atomic_write(manifest_copy(folder), seal(manifest.to_dict()))
        write_manifest(folder, manifest)
    _sweep(folder, {entry.name for entry in manifest.shards})
    return same


def _renewed(folder: Path, before: ShardEntry, now: ShardEntry) -> ShardEntry:
    """What a manifest says of a file that was written again: the same as before where it is the same, which checksums
    of two kinds leave to be seen."""
    named = [entry.checksum.startswith(Checksum.NAME) for entry in (before, now)]
    return before if named[0] != named[1] and not find_damage(folder, before) else now


def drop_receipts(folder: Path) -> None:
    """Forgets what was written again of a finished cache and not taken into its manifest: it is damage still."""
    forget(folder / RECEIPTS)


def finished(folder: Path, layout: Layout) -> CacheManifest | None:
    """The manifest of a cache that needs no building; None where it does. StaleCache where it holds something else."""
    try:
        manifest = read_manifest(folder)
    except (MissingCache, StaleCache):  # stale: another version's, and built anew over it
        return None
    check_spec(manifest, layout.spec)
    return manifest


def _round(block: RowBlock, layout: Layout, view: int, rows: slice) -> Rounded:
    spec = layout.spec
    rounded = round_features(block.features_NLD[rows], spec.codec, spec.block, spec.keepbits)
    if isinstance(rounded, Unfit):
        ids, row = block.token_ids_NL, rows.start + rounded.sample
        token = rounded.token if ids is None else ids[row, rounded.token]
        raise _unrepresentable(rounded, block.keys[row], layout, view, f"token {token}", spec.codec)
    return rounded


def _round_prefix(block: RowBlock, layout: Layout, view: int, rows: slice) -> np.ndarray | None:
    if block.prefix_NSD is None:
        return None
    codec = "float16" if layout.spec.codec == "int8" else layout.spec.codec
    rounded = round_features(block.prefix_NSD[rows], codec)
    if isinstance(rounded, Unfit):
        row = rows.start + rounded.sample
        group, place = divmod(rounded.token, layout.spec.prefix)
        raise _unrepresentable(rounded, block.keys[row], layout, view, f"prefix token {place} of group {group}", codec)
    return rounded.values_NLD


def _unrepresentable(unfit: Unfit, key: str, layout: Layout, view: int, token: str, codec: str) -> Unrepresentable:
    remedy = "the encoder has diverged: lower train.lr and train again"
    if math.isfinite(unfit.value):
        remedy = "cut earlier" + ("" if codec == "bfloat16" else " or use cache.codec=bfloat16")
    spec, place = layout.spec, f"channel {unfit.channel}"
    if codec == "int8":
        place += f" (block {unfit.channel // spec.block} of {spec.width // spec.block})"
    return Unrepresentable(
        f"sample {key!r} view {view} {token} {place}: feature {unfit.value:g} at cut {spec.cut} "
        f"does not fit {codec} (finite, magnitude at most {CODECS[codec].largest:.7g}); {remedy}"
    )


def _view_stats(
    entries: Iterable[ShardEntry], layout: Layout
) -> tuple[tuple[ViewStats, ...], tuple[ViewError, ...]]:
    found = [Moments(*entry.moments) for entry in entries if entry.moments]
    shards = len(found) // layout.spec.views
    count = layout.num_samples * layout.spec.num_tokens * layout.spec.width
    stats, errors = [], []
    for view in range(layout.spec.views):
        own = found[view * shards : (view + 1) * shards]
        total = Moments.join(own)
        mean = total.total / count
        variance = total.squares / count - mean**2
        stats.append(ViewStats(mean, math.sqrt(max(variance, 0.0)), total.peak))
        relative = relative_rmse(total.error_squares, total.given_squares)
        errors.append(ViewError(relative, total.error_peak))
    return tuple(stats), tuple(errors)


def _sweep(folder: Path, named: set[str]) -> None:
    """Removes receipts, half-written files, and shards of a build with another shard size or backend."""
    forget(folder / RECEIPTS)
    for place in (STORE, TARS, INDEX):
        if not any(name.startswith(f"{place}/") for name in named):
            forget(folder / place)
    kept = [path for place in (STORE, TARS, INDEX) for path, _ in files_below(folder / place)]
    for path in [*kept, *matching(folder, f".{MANIFEST}.*.tmp")]:
        if path.relative_to(folder).as_posix() not in named:
            path.unlink(missing_ok=True)  # of an attempt that came too late, and has just removed it itself
