"""By what the files of a cache, and files of weights, are told. Free of torch and zarr."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from blake3 import blake3

from cache.place import blocks_of, is_remote

Buffer = bytes | memoryview


class Checksum:
    """Of a file's content, named by what made it: BLAKE3 (10 GB/s on a core where sha256 makes 2). One without a name
    is sha256, as in format 3."""

    NAME = "blake3:"

    def __init__(self, like: str = NAME) -> None:
        """To be compared with `like`."""
        self._name = self.NAME if like.startswith(self.NAME) else ""
        self._hash = blake3() if self._name else hashlib.sha256()

    def update(self, part: Buffer) -> None:
        """Takes the next bytes."""
        self._hash.update(part)

    def __str__(self) -> str:
        return self._name + self._hash.hexdigest()


def checksum(content: Buffer, like: str = Checksum.NAME) -> str:
    """Of all of a file, to be compared with `like`."""
    found = Checksum(like)
    found.update(content)
    return str(found)


def sha256_of(path: Path, size: int) -> str:
    """The sha256 of a file or object of a known size, hex. Errors as `read_range`, or OSError."""
    digest = hashlib.sha256()
    feed(digest, path, size)
    return digest.hexdigest()


def feed(found: Any, path: Path, size: int) -> None:
    """The content of a file or object of a known size into a hash. Errors as `read_range`, or OSError."""
    if is_remote(path):
        for block in blocks_of(path, size):
            found.update(block)
        return
    with path.open("rb") as file:
        hashlib.file_digest(file, lambda: found)
