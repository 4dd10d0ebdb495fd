"""One shard file in Zarr v3's `sharding_indexed` layout: inner chunks, each followed by its crc32c, then the index of
their offsets and sizes, with a crc32c of its own, at the end. Written whole and read by ranges, without
zarr-python, whose sharded reads and writes are several times slower and for which a missing chunk is a chunk of zeros.
Source: the Zarr v3 sharding codec, version 1.0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from awscrt import checksums

from cache.errors import DamagedCache
from cache.layout import CRC_BYTES, INDEX_ENTRY_BYTES
from cache.manifest import Buffer
from cache.ranges import RangeFile

MISSING = 2**64 - 1


def crc32c(content: Buffer | np.ndarray) -> bytes:
    """Of the libraries at hand awscrt's is the fastest: 69 GB/s, google-crc32c's 35, where a copy runs at 30."""
    return checksums.crc32c(content).to_bytes(CRC_BYTES, "little")


def encode_shard(chunks: Iterable[Buffer | None], chunks_per_shard: int) -> Iterator[Buffer]:
    """A shard file, part by part; chunks that are None, and those after the last given, are marked missing."""
    index = np.full((chunks_per_shard, 2), MISSING, "<u8")
    offset = 0
    for number, chunk in enumerate(chunks):
        if chunk is not None:
            size = memoryview(chunk).nbytes + CRC_BYTES
            index[number] = offset, size
            yield chunk
            yield crc32c(chunk)
            offset += size
    yield index.tobytes()
    yield crc32c(index.tobytes())


class ShardReader:
    """An open shard file; a chunk's crc32c is checked when it is read. DamagedCache when it is not whole."""

    def __init__(self, path: Path, file: RangeFile, chunks_per_shard: int) -> None:
        self.path, self._file = path, file
        tail = np.empty(chunks_per_shard * INDEX_ENTRY_BYTES + CRC_BYTES, np.uint8)
        if file.size < len(tail):
            raise self._damage("is empty" if not file.size else "has a damaged index")
        file.read_into(file.size - len(tail), [tail])
        if crc32c(tail[:-CRC_BYTES]) != tail[-CRC_BYTES:].tobytes():
            raise self._damage("has a damaged index")
        self.index: list[list[int]] = tail[:-CRC_BYTES].view("<u8").reshape(chunks_per_shard, 2).tolist()

    def read(self, first: int, out_NC: np.ndarray) -> None:
        """N adjacent chunks of C bytes from chunk `first` on, into uint8 rows that lie there without gaps."""
        begin, stored = self.index[first][0], out_NC.shape[1] + CRC_BYTES
        buffers = []
        for number, content in enumerate(out_NC):
            if self.index[first + number] != [begin + number * stored, stored]:
                raise self._damage(f"lacks chunk {first + number}")
            buffers += [content, np.empty(CRC_BYTES, np.uint8)]
        self._file.read_into(begin, buffers)
        for number in range(0, len(buffers), 2):
            if crc32c(buffers[number]) != buffers[number + 1].tobytes():
                raise self._damage(f"is altered in chunk {first + number // 2}")

    def chunk(self, number: int) -> np.ndarray:
        """(C,) uint8: one chunk of any size, as it is stored."""
        offset, size = self.index[number]
        if offset == MISSING:
            raise self._damage(f"lacks chunk {number}")
        content = np.empty(size, np.uint8)
        self._file.read_into(offset, [content])
        if crc32c(content[:-CRC_BYTES]) != content[-CRC_BYTES:].tobytes():
            raise self._damage(f"is altered in chunk {number}")
        return content[:-CRC_BYTES]

    def _damage(self, what: str) -> DamagedCache:
        return DamagedCache(f"{self.path} {what}; run `make repair`")
