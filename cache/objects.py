"""Byte ranges of one object of a store: what `cache.ranges` is on a disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from cache.errors import DamagedCache
from cache.place import StoreUnreachable, is_there, reaching
from cache.ranges import RangeFile


class ObjectFile(RangeFile):
    """A RangeFile in an object store. `size` is what it should have: asking for it would be a request of its own."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    def read_into(self, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """See RangeFile; one request. StoreUnreachable when the store does not answer, DamagedCache when it does and
        the object is not there or not as long."""
        store, size = cast(Any, self.path), sum(len(buffer) for buffer in buffers)
        try:
            with reaching(self.path):
                content = store.fs.cat_file(store.path, start=offset, end=offset + size)
        except FileNotFoundError as error:
            if "bucket" in str(error):
                raise StoreUnreachable(f"{self.path} cannot be read ({error}); check the bucket's name") from None
            raise DamagedCache(f"{self.path} is missing; run `make repair`") from None
        except StoreUnreachable as error:
            if "Connect" in type(error.__cause__).__name__:
                raise
            with reaching(self.path):  # a range behind an object's end is an error of its own
                there = store.fs.size(store.path) if is_there(self.path) else 0
            if there < offset + size:
                raise DamagedCache(f"{self.path} is {'cut short' if there else 'missing'}; run `make repair`") from None
            raise
        if len(content) < size:
            raise DamagedCache(f"{self.path} is cut short; run `make repair`")
        place = 0
        for buffer in buffers:
            buffer[:] = np.frombuffer(content, np.uint8, len(buffer), place)
            place += len(buffer)
