"""What a Zarr v3 cache consists of: zarr-python writes the metadata, shards are written whole by our own encoder. Plain
Zarr: any reader opens it. The steps of a build are in cache.writer."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCname, BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from cache.checksum import Buffer
from cache.layout import STORE, Layout, RowArray, Shard, Stored
from cache.manifest import as_bytes
from cache.shard import encode_shard

BLOSC_LEVEL = 5

# Blosc's threads put the blocks of a chunk in the order in which they are done, and a shard that is repaired has to be
# the same to the bit.
blosc.use_threads = False


def static_files(
    layout: Layout, labels: np.ndarray, keys: Sequence[str], digests: np.ndarray
) -> dict[str, bytes]:
    """Files that hold no rows of a view: metadata, labels, keys and digests, by name."""
    files: dict[str, Any] = {}
    root = zarr.create_group(MemoryStore(files), zarr_format=3)
    # Zarr leaves out chunks that equal the fill value; here a chunk that is missing is damage. Said of each array: what
    # `zarr.config.set` says holds for the process, and a build in another thread takes it back.
    settings: dict[str, Any] = {"compressors": [Crc32cCodec()], "config": {"write_empty_chunks": True}}
    for view in range(layout.spec.views):
        for array in layout.arrays:
            root.create_array(
                f"view_{view}/{array.name}",
                shape=(layout.num_samples, *array.row_shape),
                dtype=array.dtype,
                shards=(layout.shard_rows, *array.row_shape),
                chunks=array.chunk_shape,
                compressors=[*_compressors(array), Crc32cCodec()],
                fill_value=0,
                attributes=_attributes(array, layout),
            )
    root.create_array("labels", data=np.asarray(labels, "<i8"), chunks=(len(keys),), **settings)
    root.create_array("digests", data=np.asarray(digests, "|u1"), chunks=digests.shape, **settings)
    stored_keys = root.create_array("keys", shape=(len(keys),), dtype=str, chunks=(len(keys),), **settings)
    stored_keys[:] = np.asarray(keys, dtype=object)
    return {f"{STORE}/{name}": content.to_bytes() for name, content in sorted(files.items())}


def shard_files(
    folder: Path,
    layout: Layout,
    shard: Shard,
    pieces: Iterable[Stored],
    keys: Sequence[str],
    last_crcs: dict[str, int],
) -> Iterator[tuple[str, Iterator[Buffer]]]:
    """The files of a shard, features first, by name and in parts; the rows are taken while the first is written. Fills
    `last_crcs` with the crc32c behind the last chunk of each, once it is written."""
    features, *others = layout.arrays
    kept: dict[str, list[np.ndarray]] = {array.name: [] for array in others}

    def first() -> Iterator[np.ndarray]:
        for piece in pieces:
            for name, values in kept.items():
                values.append(piece[name])
            yield piece[features.name]

    def parts(name: str, array: RowArray, rows: Iterable[np.ndarray]) -> Iterator[Buffer]:
        last_crcs[name] = yield from _encode(rows, array, layout)

    for array in layout.arrays:
        name = layout.file(array, shard.view, shard.first_row)
        yield name, parts(name, array, first() if array is features else kept[array.name])


def _encode(pieces: Iterable[np.ndarray], array: RowArray, layout: Layout) -> Generator[Buffer, None, int]:
    pack = array.compression.encode()
    # Splits cut the first axis of an entry, so the inner chunks of rows, in order, are one contiguous array.
    flat = (np.ascontiguousarray(rows, array.dtype).reshape(len(rows) * array.splits, -1) for rows in pieces)
    chunks = chain.from_iterable(flat)
    packed = (blosc.compress(chunk, pack, BLOSC_LEVEL, blosc.SHUFFLE) if pack else as_bytes(chunk) for chunk in chunks)
    return encode_shard(packed, layout.shard_rows * array.splits)


def _compressors(array: RowArray) -> list[BloscCodec]:
    if not array.compression:
        return []
    size = np.dtype(array.dtype).itemsize
    return [BloscCodec(cname=BloscCname(array.compression), clevel=BLOSC_LEVEL, shuffle="shuffle", typesize=size)]


def _attributes(array: RowArray, layout: Layout) -> dict[str, Any] | None:
    """What a reader that knows nothing of us has to know of an array."""
    if array.name in ("features", "prefix") and layout.spec.codec == "bfloat16":
        return {"dtype": "bfloat16", "how": "the upper 16 bits of a float32"}
    if array.name == "features" and layout.spec.codec == "int8":
        return {"block": layout.spec.block, "how": "features[..., d] * scale[..., d // block]"}
    return None
