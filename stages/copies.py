"""Local copies of images that lie behind URLs: a folder of files named by the sha256 of what is in them, bounded, of
which the least recently used goes first. Between an object store and the decoding of images. A copy is believed only
after it has been hashed, so that one that was cut short or altered is no copy; and losing any costs a request, nothing
else, which is why nothing here waits for a disk or fails on one.

Several processes may share a folder. Each counts what it writes and looks at the whole folder after every sixteenth of
the bound, so that P of them stay below the bound and P sixteenths of it; one alone stays below the bound.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from filelock import Timeout

from cache.lock import locked

SPARE = 1 << 30
"""Bytes of the disk that copies leave free: what a run computes matters more."""
KEPT = 0.9
"""Share of the bound that is left when room is made, so that the folder is not listed for every copy."""


@dataclass
class Copies:
    """Copies in a folder, of up to `limit` bytes together."""

    folder: Path
    limit: int
    _known: int | None = field(default=None, init=False)
    """Bytes in the folder when it was last looked at."""
    _written: int = field(default=0, init=False)
    """Bytes that this process has added since."""
    _lock: Lock = field(default_factory=Lock, init=False)

    def get(self, sha256: str) -> bytes | None:
        """The content of this hash, or None where there is no true copy of it."""
        path = self._path(sha256)
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                with suppress(OSError):  # a disk that is read-only by now
                    os.utime(path)
                return content
            path.unlink()
        except OSError:
            pass
        return None

    def put(self, sha256: str, content: bytes, only_into_room: bool = False) -> bool:
        """Keep a copy, of which the caller knows the hash; what was not used for longest makes room, unless there is to
        be room already. Whether it is kept: not what is larger than the bound, nor where the disk has no room."""
        path, size = self._path(sha256), len(content)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        with self._lock:
            try:
                if size > KEPT * self.limit or not self._makes_room(size, only_into_room):
                    return False
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(content)
                temporary.replace(path)
            except OSError:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                return False
            self._written += size
            return True

    def _makes_room(self, size: int, only_into_room: bool) -> bool:
        """Whether there is room for so many bytes now."""
        self.folder.mkdir(parents=True, exist_ok=True)  # a person may have removed it since
        if self._known is None or self._written > self.limit / 16:
            self._look()
        if not only_into_room and self._bytes + size > self.limit:
            self._look(size)
        most = (KEPT if only_into_room else 1) * self.limit
        fits = self._known is not None and self._bytes + size <= most
        return fits and shutil.disk_usage(self.folder).free >= SPARE + size

    @property
    def _bytes(self) -> int:
        return (self._known or 0) + self._written

    def _look(self, size: int = 0) -> None:
        """Count what is there and, where `size` bytes more would pass the bound, remove the oldest of it."""
        with suppress(Timeout), locked(self.folder / ".lock", 0):  # or another process makes room
            found = deque(sorted(self._files()))
            total = sum(each for _, each, _ in found)
            if total + size > self.limit:
                while found and total > KEPT * self.limit - size:
                    _, gone, path = found.popleft()
                    with suppress(OSError):
                        os.unlink(path)
                    total -= gone
            self._known, self._written = total, 0

    def _files(self) -> list[tuple[int, int, str]]:
        """(time of last use, bytes, path) of all, half-written ones of processes that were killed among them."""
        found = []
        for folder in self.folder.iterdir():
            if not folder.is_dir():
                continue
            for file in os.scandir(folder):
                with suppress(OSError):
                    stat = file.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, file.path))
        return found

    def _path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256
