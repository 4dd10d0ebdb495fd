"""What a WebDataset cache consists of: tars that `tarfile` and `webdataset` read, and in a folder beside them their
indexes, the labels and the keys, which no reader but ours needs. The steps of a build are in cache.writer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cache.checksum import Buffer
from cache.layout import DIGESTS, KEYS, LABELS, Layout, Shard, Stored
from cache.patience import CutShort
from cache.place import asked
from cache.tar import encode_index, encode_tar, npy


def static_files(
    layout: Layout, labels: np.ndarray, keys: Sequence[str], digests: np.ndarray
) -> dict[str, bytes]:
    """Files that hold no rows of a view: labels, keys and digests, by name."""
    return {
        LABELS: npy(np.asarray(labels, "<i8")),
        KEYS: json.dumps(list(keys), ensure_ascii=False).encode(),
        DIGESTS: npy(np.asarray(digests, "|u1")),
    }


def shard_files(
    folder: Path,
    layout: Layout,
    shard: Shard,
    pieces: Iterable[Stored],
    keys: Sequence[str],
    last_crcs: dict[str, int],
) -> Iterator[tuple[str, Iterable[Buffer]]]:
    """The files of a shard, the tar first, each by name and in parts; the rows are taken while the first is written. A
    tar is known by the checksums of its index, which is hashed when it is opened, so `last_crcs` stays empty."""
    labels = rows_of(folder / LABELS, shard)
    tar, index_name = layout.files(shard)
    index: list[tuple[int, int, int, int]] = []
    yield tar, encode_tar(layout.arrays, pieces, keys, labels, index)
    yield index_name, [encode_index(index, shard.rows)]


def rows_of(file: Path, shard: Shard) -> np.ndarray:
    """The labels of a shard's rows: read from the middle of their file, which may be of a hundred million."""

    def read() -> np.ndarray:
        with file.open("rb") as opened:
            assert np.lib.format.read_magic(opened) == (1, 0)
            _, _, dtype = np.lib.format.read_array_header_1_0(opened)
            opened.seek(shard.first_row * dtype.itemsize, 1)
            content = opened.read(shard.rows * dtype.itemsize)
        if len(content) < shard.rows * dtype.itemsize:
            raise CutShort(f"{file} ends within the rows of a shard")
        return np.frombuffer(content, dtype)

    return asked(file, read)
