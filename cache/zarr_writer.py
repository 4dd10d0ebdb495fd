"""Builds a cache as a Zarr v3 store: `create_store` once, `write_rows` once per shard in any order and from any
process, `finish` last. A shard that is durably written leaves a receipt, so that a build that was stopped anywhere goes
on at the first shard without one. zarr-python writes the metadata; shards are written whole by our own encoder.

Shapes: N the samples of a shard, L tokens, S prefix tokens of all groups, D width, P values of a pixel patch.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from cache.errors import CacheError, MissingCache, Unrepresentable
from cache.layout import STORE, Layout, RowArray, Shard
from cache.manifest import (
    MANIFEST,
    CacheManifest,
    ShardEntry,
    ViewStats,
    atomic_write,
    check_spec,
    checksum,
    find_damage,
    read_manifest,
    write_manifest,
)
from cache.receipts import RECEIPTS, STORE_RECEIPT, read_receipt, receipt_name, write_receipt
from cache.shard import encode_shard

FLOAT16_MAX = 65504.0


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

    @classmethod
    def join(cls, blocks: Sequence[RowBlock]) -> RowBlock:
        """One block of all rows, in order."""

        def stack(name: str) -> np.ndarray | None:
            parts = [getattr(block, name) for block in blocks]
            return None if parts[0] is None else np.concatenate(parts)

        keys = tuple(chain.from_iterable(block.keys for block in blocks))
        features, crops = stack("features_NLD"), stack("crop_N5")
        assert features is not None and crops is not None
        return cls(features, crops, keys, stack("token_ids_NL"), stack("pixels_NLP"), stack("prefix_NSD"))


def create_store(folder: Path, layout: Layout, labels: np.ndarray, keys: Sequence[str]) -> None:
    """Writes metadata, labels and keys. Does nothing to what is there already and as it should be."""
    if _finished(folder, layout):
        return
    entries = []
    for name, content in _static_files(layout, labels, keys).items():
        entry = ShardEntry(f"{STORE}/{name}", 0, 0, len(content), checksum(content))
        if find_damage(folder, entry):
            atomic_write(folder / entry.name, content)
        entries.append(entry)
    write_receipt(folder, layout, STORE_RECEIPT, entries)


def missing_shards(folder: Path, layout: Layout) -> list[Shard]:
    """Shards still to be written: no receipt of this very layout, or files that, hashed afresh, differ from it."""
    if _finished(folder, layout):
        return []

    def is_whole(shard: Shard) -> bool:
        entries = read_receipt(folder, layout, receipt_name(shard))
        return entries is not None and not any(find_damage(folder, entry) for entry in entries)

    return [shard for shard in layout.shards if not is_whole(shard)]


def write_rows(folder: Path, layout: Layout, view: int, first_row: int, block: RowBlock) -> list[ShardEntry]:
    """Writes one shard of every array of a view, then its receipt. Unrepresentable; CacheError on a full disk."""
    shard = Shard(view, first_row, len(block.keys))
    assert shard in layout.shards, f"{shard} is no shard of the layout: one writer per shard"
    features_NLD = _to_float16(block, layout, view)
    prefix_NSD = None if block.prefix_NSD is None else _prefix_to_float16(block, block.prefix_NSD, layout, view)
    values = {
        "features": features_NLD,
        "crop": block.crop_N5,
        "token_ids": block.token_ids_NL,
        "pixels": block.pixels_NLP,
        "prefix": prefix_NSD,
    }
    entries = []
    for array in layout.arrays:
        rows = values[array.name]
        assert rows is not None and rows.shape == (shard.rows, *array.row_shape), f"{array} in a block of the spec"
        content = _encode(rows, array, layout)
        entry = ShardEntry(
            layout.file(array, view, first_row),
            first_row,
            shard.rows,
            len(content),
            checksum(content),
            _moments(features_NLD) if array.name == "features" else None,
        )
        atomic_write(folder / entry.name, content)
        entries.append(entry)
    write_receipt(folder, layout, receipt_name(shard), entries)
    return entries


def finish(folder: Path, layout: Layout) -> CacheManifest:
    """Declares the cache finished. CacheError when a shard is still missing; a second call changes nothing."""
    manifest = _finished(folder, layout)
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
        stats = _view_stats(entries, layout)
        manifest = CacheManifest(layout.spec, layout.num_samples, layout.shard_rows, entries, stats)
        write_manifest(folder, manifest)
    _sweep(folder, {entry.name for entry in manifest.shards})
    return manifest


def _finished(folder: Path, layout: Layout) -> CacheManifest | None:
    try:
        manifest = read_manifest(folder)
    except MissingCache:
        return None
    check_spec(manifest, layout.spec)
    return manifest


def _static_files(layout: Layout, labels: np.ndarray, keys: Sequence[str]) -> dict[str, bytes]:
    """Files that hold no rows of a view, as zarr-python writes them."""
    assert len(labels) == len(keys) == layout.num_samples
    files: dict[str, Any] = {}
    root = zarr.create_group(MemoryStore(files), zarr_format=3)
    settings: dict[str, Any] = {"chunks": (len(keys),), "compressors": [Crc32cCodec()]}
    for view in range(layout.spec.views):
        for array in layout.arrays:
            root.create_array(
                f"view_{view}/{array.name}",
                shape=(layout.num_samples, *array.row_shape),
                dtype=array.dtype,
                shards=(layout.shard_rows, *array.row_shape),
                chunks=array.chunk_shape,
                compressors=[Crc32cCodec()],
                fill_value=0,
            )
    # Zarr leaves out chunks that equal the fill value; here a chunk that is missing is damage.
    with zarr.config.set({"array.write_empty_chunks": True}):
        root.create_array("labels", data=np.asarray(labels, "<i8"), **settings)
        stored_keys = root.create_array("keys", shape=(len(keys),), dtype=str, **settings)
        stored_keys[:] = np.asarray(keys, dtype=object)
    return {name: content.to_bytes() for name, content in sorted(files.items())}


def _to_float16(block: RowBlock, layout: Layout, view: int) -> np.ndarray:
    def token(sample: int, stored: int) -> str:
        return f"token {stored if block.token_ids_NL is None else block.token_ids_NL[sample, stored]}"

    return _rounded(block.features_NLD, block, layout, view, token)


def _prefix_to_float16(block: RowBlock, prefix_NSD: np.ndarray, layout: Layout, view: int) -> np.ndarray:
    def token(sample: int, stored: int) -> str:
        group, place = divmod(stored, layout.spec.prefix)
        return f"prefix token {place} of group {group}"

    return _rounded(prefix_NSD, block, layout, view, token)


def _rounded(
    values_NLD: np.ndarray, block: RowBlock, layout: Layout, view: int, token: Callable[[int, int], str]
) -> np.ndarray:
    """The values in float16; Unrepresentable, naming sample and token, when one does not fit."""
    rounded_NLD = torch.from_numpy(values_NLD).half().numpy()  # numpy takes twenty times as long
    bad_NLD = ~np.isfinite(rounded_NLD)
    if bad_NLD.any():
        sample, stored, channel = (int(i) for i in np.argwhere(bad_NLD)[0])
        value = float(values_NLD[sample, stored, channel])
        remedy = "cut earlier" if math.isfinite(value) else "the encoder has diverged: lower train.lr and train again"
        raise Unrepresentable(
            f"sample {block.keys[sample]!r} view {view} {token(sample, stored)}: feature {value:g} at cut "
            f"{layout.spec.cut} does not fit float16 (finite, magnitude at most {FLOAT16_MAX:g}); {remedy}"
        )
    return rounded_NLD


def _encode(rows: np.ndarray, array: RowArray, layout: Layout) -> bytes:
    # Splits cut the first axis of an entry, so the inner chunks of a shard, in order, are one contiguous array.
    chunks = np.ascontiguousarray(rows, array.dtype).reshape(len(rows) * array.splits, -1)
    return encode_shard([chunk.data for chunk in chunks], layout.shard_rows * array.splits)


def _moments(features_NLD: np.ndarray) -> tuple[float, float, float]:
    """Sum, sum of squares, largest magnitude; sample by sample, since float64 copies of a whole shard are large."""
    total = squares = peak = 0.0
    for sample_LD in features_NLD:
        values = sample_LD.astype(np.float64)
        total += float(values.sum())
        squares += float(np.square(values).sum())
        peak = max(peak, float(np.abs(values).max()))
    return total, squares, peak


def _view_stats(entries: Iterable[ShardEntry], layout: Layout) -> tuple[ViewStats, ...]:
    moments = np.array([entry.moments for entry in entries if entry.moments]).reshape(layout.spec.views, -1, 3)
    count = layout.num_samples * layout.spec.num_tokens * layout.spec.width
    stats = []
    for view in moments:
        mean = float(view[:, 0].sum()) / count
        variance = float(view[:, 1].sum()) / count - mean**2
        stats.append(ViewStats(mean, math.sqrt(max(variance, 0.0)), float(view[:, 2].max())))
    return tuple(stats)


def _sweep(folder: Path, named: set[str]) -> None:
    """Removes receipts, half-written files, and shards of a build with another shard size."""
    shutil.rmtree(folder / RECEIPTS, ignore_errors=True)
    store = [path for path in (folder / STORE).rglob("*") if path.is_file()]
    for path in [*store, *folder.glob(f".{MANIFEST}.*.tmp")]:
        if path.relative_to(folder).as_posix() not in named:
            path.unlink()
