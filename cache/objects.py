"""Byte ranges of one object of a store: what `cache.ranges` is on a disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache.errors import DamagedCache
from cache.place import ObjectEnds, StoreUnreachable, read_range
from cache.ranges import RangeFile


class ObjectFile(RangeFile):
    """A RangeFile in an object store. `size` is what it should have: asking for it would be a request of its own."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    def read_into(self, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """See RangeFile; one request. StoreUnreachable when the store does not answer, DamagedCache when it does and
        the object is not there or not as long."""
        size = sum(len(buffer) for buffer in buffers)
        try:
            content = read_range(self.path, offset, offset + size)
        except FileNotFoundError as error:
            if "bucket" in str(error):
                raise StoreUnreachable(f"{self.path} cannot be read ({error}); check the bucket's name") from None
            raise DamagedCache(f"{self.path} is missing; run `make repair`") from None
        except ObjectEnds:
            raise DamagedCache(f"{self.path} is cut short; run `make repair`") from None
        place = 0
        for buffer in buffers:
            buffer[:] = np.frombuffer(content, np.uint8, len(buffer), place)
            place += len(buffer)
