"""Byte ranges of one file of a cache, read into memory that the caller owns. Under every shard reader.

A local file is read by position, or mapped. Where it was measured, pages warm, a map gave 30 GB/s and positional reads
11; but mapped pages count as the process's memory and stay in it, and letting go of them costs more (5 GB/s) than
reading by position. So readers map caches that fit the memory that they may take, and no others.
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache.errors import CacheError, DamagedCache


class RangeFile(ABC):
    """An open file; safe to read from several threads."""

    size: int
    """Bytes."""

    @abstractmethod
    def read_into(self, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """Fill flat uint8 buffers, one after the other, with the bytes from `offset` on.

        DamagedCache when the file ends before they are full, CacheError when it cannot be read.
        """

    def read_chunks(self, offset: int, out_NC: np.ndarray, after: int) -> np.ndarray:
        """N chunks of C bytes from `offset` on into uint8 rows; (N, after), the bytes after each. Errors alike."""
        tails = np.empty((len(out_NC), after), np.uint8)
        self.read_into(offset, [part for pair in zip(out_NC, tails, strict=True) for part in pair])
        return tails


class LocalFile(RangeFile):
    """A file on disk, read by position. DamagedCache when it is missing, CacheError when it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise DamagedCache(f"{path} is missing; run `make repair`") from None
        except OSError as error:
            raise CacheError(f"{path} cannot be read ({error.strerror}); mend that and run again") from error
        self.size = os.fstat(self._descriptor).st_size

    def read_into(self, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """See RangeFile."""
        left = sum(buffer.nbytes for buffer in buffers)
        try:
            while found := os.preadv(self._descriptor, buffers, offset):  # type: ignore[arg-type] # arrays are buffers
                if found == left:
                    return
                # A signal, or the kernel's own limit, may end a read early.
                left, offset, buffers = left - found, offset + found, behind(buffers, found)
        except OSError as error:
            raise CacheError(f"{self.path} cannot be read ({error.strerror}); mend that and run again") from error
        raise DamagedCache(f"{self.path} is cut short; run `make repair`")

    def __del__(self) -> None:
        # Not closed by hand: another thread may read on when a reader lets go of a file.
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class MappedFile(RangeFile):
    """The same, mapped.

    What no check can catch: a file cut short, or a disk that fails, between the check of its size and the copy out of
    the map ends the process with SIGBUS, for which the command line's faulthandler prints where that was.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, LocalFile(path).size
        self._map: mmap.mmap | None = None
        if self.size:  # an empty file cannot be mapped
            try:
                with path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError where it has become empty since
                raise CacheError(f"{path} cannot be mapped ({error}); mend that, or lower cache.memory_mb") from error
        self._content = np.frombuffer(self._map or b"", np.uint8)

    def read_into(self, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """See RangeFile."""
        self._require(offset + sum(map(len, buffers)))
        for buffer in buffers:
            end = offset + len(buffer)
            buffer[:] = self._content[offset:end]
            offset = end

    def read_chunks(self, offset: int, out_NC: np.ndarray, after: int) -> np.ndarray:
        """See RangeFile. One copy for all: each gives up the interpreter's lock, which another thread may then hold for
        longer than the copy takes; with a copy for every chunk two threads were slower than one."""
        number, size = out_NC.shape
        end = offset + number * (size + after)
        self._require(end)
        found = self._content[offset:end].reshape(number, size + after)
        out_NC[...] = found[:, :size]
        return found[:, size:]

    def _require(self, end: int) -> None:
        """The file's own size at this moment: touching what was cut off since it was mapped would kill the process."""
        if end > (self._map.size() if self._map else 0):
            raise DamagedCache(f"{self.path} is cut short; run `make repair`")


def behind(buffers: Sequence[np.ndarray], filled: int) -> list[np.ndarray]:
    """What is still to be filled of buffers when their first `filled` bytes are."""
    rest = []
    for buffer in buffers:
        if filled < len(buffer):
            rest.append(buffer[filled:])
        filled = max(0, filled - len(buffer))
    return rest
