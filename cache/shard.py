"""One shard file in Zarr v3's `sharding_indexed` layout: inner chunks, each followed by its crc32c, then the index of
their offsets and sizes, with a crc32c of its own, at the end. Written whole and read by ranges, without
zarr-python, whose sharded reads and writes are several times slower and for which a missing chunk is a chunk of zeros.
Source: the Zarr v3 sharding codec, version 1.0."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path

import numpy as np
from awscrt import checksums

from cache.checksum import Buffer
from cache.errors import DamagedCache
from cache.layout import CRC_BYTES, INDEX_ENTRY_BYTES
from cache.ranges import RangeFile

MISSING = 2**64 - 1


def crc32c(content: Buffer | np.ndarray) -> bytes:
    """Of the libraries at hand awscrt's is the fastest: 69 GB/s, google-crc32c's 35, where a copy runs at 30."""
    return checksums.crc32c(content).to_bytes(CRC_BYTES, "little")


def encode_shard(chunks: Iterable[Buffer | None], chunks_per_shard: int) -> Generator[Buffer, None, int]:
    """A shard file, part by part; chunks that are None, and those after the last given, are marked missing. Returns the
    crc32c behind the last chunk, 0 where there is none."""
    index = np.full((chunks_per_shard, 2), MISSING, "<u8")
    offset, last = 0, bytes(CRC_BYTES)
    for number, chunk in enumerate(chunks):
        if chunk is not None:
            size = memoryview(chunk).nbytes + CRC_BYTES
            index[number] = offset, size
            yield chunk
            yield (last := crc32c(chunk))
            offset += size
    yield index.tobytes()
    yield crc32c(index.tobytes())
    return int.from_bytes(last, "little")


class ShardReader:
    """An open shard file; a chunk's crc32c is checked when it is read. DamagedCache when it is not whole, or, where
    `last_crc` is not 0, another than the one whose last chunk has that crc32c: the last comes with the index, in one
    request."""

    def __init__(self, path: Path, file: RangeFile, chunks_per_shard: int, last_crc: int = 0) -> None:
        self.path, self._file = path, file
        last = np.empty(CRC_BYTES if last_crc else 0, np.uint8)
        tail = np.empty(chunks_per_shard * INDEX_ENTRY_BYTES + CRC_BYTES, np.uint8)
        if file.size < len(last) + len(tail):
            raise self._damage("is empty" if not file.size else "has a damaged index")
        file.read_into(file.size - len(last) - len(tail), [part for part in (last, tail) if len(part)])
        if crc32c(tail[:-CRC_BYTES]) != tail[-CRC_BYTES:].tobytes():
            raise self._damage("has a damaged index")
        if int.from_bytes(last.tobytes(), "little") != last_crc:
            raise self._damage("is not the shard that was written there")
        index = tail[:-CRC_BYTES].view("<u8").reshape(chunks_per_shard, 2)
        self._places: list[tuple[int, int, int]] = list(zip(*index.T.tolist(), _run_ends(index).tolist(), strict=True))

    def read(self, first: int, out_NC: np.ndarray) -> None:
        """N adjacent chunks of C bytes from chunk `first` on, into uint8 rows that lie there without gaps."""
        number, size = out_NC.shape
        begin, stored, end = self._places[first]
        if first + number > end or stored != size + CRC_BYTES:
            raise self._damage(f"lacks chunk {end if stored == size + CRC_BYTES else first}")
        behind = self._file.read_chunks(begin, out_NC, CRC_BYTES)
        wanted, found = behind.view("<u4")[:, 0].tolist(), [checksums.crc32c(chunk) for chunk in out_NC]
        if found != wanted:
            altered = next(n for n, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
            raise self._damage(f"is altered in chunk {first + altered}")

    def chunk(self, number: int) -> np.ndarray:
        """(C,) uint8: one chunk of any size, as it is stored."""
        offset, size, _ = self._places[number]
        if offset == MISSING:
            raise self._damage(f"lacks chunk {number}")
        content = np.empty(size, np.uint8)
        self._file.read_into(offset, [content])
        if crc32c(content[:-CRC_BYTES]) != content[-CRC_BYTES:].tobytes():
            raise self._damage(f"is altered in chunk {number}")
        return content[:-CRC_BYTES]

    def _damage(self, what: str) -> DamagedCache:
        return DamagedCache(f"{self.path} {what}; run `make repair`")


def _run_ends(index_N2: np.ndarray) -> np.ndarray:
    """(N,): behind every chunk, the first that does not lie right behind the one before it, or is of another size."""
    begin, size = index_N2.T
    breaks = np.flatnonzero((begin[1:] != begin[:-1] + size[:-1]) | (size[1:] != size[:-1])) + 1
    ends = np.append(breaks, len(index_N2))
    return ends[np.searchsorted(ends, np.arange(len(index_N2)), side="right")]
