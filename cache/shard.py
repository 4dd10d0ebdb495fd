"""One shard file in Zarr v3's `sharding_indexed` layout: inner chunks, each followed by its crc32c, then the index of
their offsets and sizes, with a crc32c of its own, at the end. Written whole and read by memory map, without
zarr-python, whose sharded reads and writes are several times slower and for which a missing chunk is a chunk of zeros.
Source: the Zarr v3 sharding codec, version 1.0."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from cache.errors import DamagedCache
from cache.layout import CRC_BYTES, INDEX_ENTRY_BYTES

MISSING = 2**64 - 1
Buffer = bytes | memoryview


def crc32c(content: Buffer) -> bytes:
    # google_crc32c takes no memoryview, but it takes an array over one, without a copy.
    return google_crc32c.value(np.frombuffer(content, np.uint8)).to_bytes(CRC_BYTES, "little")


def encode_shard(chunks: Sequence[Buffer | None], chunks_per_shard: int) -> bytes:
    """Content of a shard file; chunks that are None, and those after the last given, are marked missing."""
    index = np.full((chunks_per_shard, 2), MISSING, "<u8")
    parts: list[Buffer] = []
    offset = 0
    for number, chunk in enumerate(chunks):
        if chunk is not None:
            size = memoryview(chunk).nbytes + CRC_BYTES
            index[number] = offset, size
            parts += [chunk, crc32c(chunk)]
            offset += size
    return b"".join([*parts, index.data, crc32c(index.data)])


class ShardReader:
    """Memory map of a shard file; a chunk's crc32c is checked when it is read. DamagedCache when it is not whole."""

    def __init__(self, path: Path, chunks_per_shard: int) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            raise self._damage("is missing") from None
        except ValueError:  # an empty file cannot be mapped
            raise self._damage("is empty") from None
        self.size = len(self._content)
        index_bytes = chunks_per_shard * INDEX_ENTRY_BYTES
        index = self._content[-index_bytes - CRC_BYTES :]
        if len(index) != index_bytes + CRC_BYTES or crc32c(index[:-CRC_BYTES]) != index[-CRC_BYTES:]:
            raise self._damage("has a damaged index")
        self.index = np.frombuffer(index[:-CRC_BYTES], "<u8").reshape(chunks_per_shard, 2)

    def chunk(self, number: int) -> memoryview:
        """Content of an inner chunk; valid as long as it is referred to."""
        offset, size = self.index[number].tolist()
        if offset == MISSING:
            raise self._damage(f"lacks chunk {number}")
        chunk = self._content[offset : offset + size - CRC_BYTES]
        if crc32c(chunk) != self._content[offset + size - CRC_BYTES : offset + size]:
            raise self._damage(f"is altered in chunk {number}")
        return chunk

    def _damage(self, what: str) -> DamagedCache:
        return DamagedCache(f"{self.path} {what}; run `make repair`")
