"""Images behind URLs that fsspec knows (`s3://bucket/train-{000000..000007}.tar`, a glob, a folder of tars or images):
indexed like local ones, by reading every file once, then read by ranges through local copies. First in the data path,
beside `index`, whose entries, keys and order these are: the same images have the same digest wherever they lie.

A tar is brought whole to the temporary folder, one at a time, listed and hashed there, and goes again; its images
become local copies as far as there is room. From then on a read is one request for the bytes of one image.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from cache.place import BLOCK, asked, described, place_of, read_bytes, read_range
from stages.copies import Copies
from stages.errors import DataError
from stages.index import (
    Entry,
    Index,
    as_index,
    content_hash,
    entries_of_folder,
    entries_of_tar,
    expand,
    header_of,
    inspect_all,
    kept_or_made,
)

AT_A_TIME = 16
"""Requests: what a store takes to answer is then no longer what bounds reading."""
DOWNLOADS = 4
"""Blocks of a tar that are on their way at a time, and in memory."""


@dataclass(frozen=True)
class Remote:
    """A file behind a URL, as its store describes it."""

    url: str
    name: str
    """Its path inside the source's folder."""
    size: int
    version: str

    @property
    def stamp(self) -> list[Any]:
        return [self.url, self.size, self.version]


@dataclass(frozen=True)
class Reader:
    """Reads the images of an index: from a local copy while that is true, else from the store."""

    copies: Copies | None

    def __call__(self, entry: Entry) -> bytes:
        """The bytes of an image. Raises DataError where it is gone, StoreUnreachable."""
        if self.copies and entry.sha256 and (content := self.copies.get(entry.sha256)) is not None:
            return content
        return self._from_store(entry)

    def several(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        """The bytes of some images in their order, many of them on their way at a time."""
        with ThreadPoolExecutor(min(AT_A_TIME, len(entries)) or 1) as pool:
            yield from pool.map(self, entries)

    def _from_store(self, entry: Entry) -> bytes:
        content = _fetched(entry)
        if not entry.sha256:
            return content
        if content_hash(content) != entry.sha256:
            content = _fetched(entry)  # once more, in case it was altered on its way; whoever reads it compares, too
        if self.copies and content_hash(content) == entry.sha256:
            self.copies.put(entry.sha256, content)
        return content


def _fetched(entry: Entry) -> bytes:
    """An image's bytes from its store."""
    place = place_of(entry.file)
    try:
        if entry.size < 0:
            return read_bytes(place)
        return read_range(place, entry.offset, entry.offset + entry.size)
    except FileNotFoundError as error:
        raise DataError(f"{entry.file} is gone; restore it, or run again without it") from error


def indexed(source: str, on_bad: str, index_file: Path | None, copies: Copies | None) -> tuple[Index, Reader]:
    """`index.indexed` for a URL. Raises DataError, StoreUnreachable, or CacheError for an unknown protocol."""
    files, read = remote_files(source), Reader(copies)

    def make() -> Index:
        made = _made(source, files, on_bad, read)
        now = {file.url: file for file in remote_files(source)}
        if changed := [file for file in files if now.get(file.url) != file]:
            url = changed[0].url
            raise DataError(f"{url} was changed while it was read; run again when nothing writes to {source}")
        return made

    return kept_or_made(index_file, header_of(source, on_bad, [file.stamp for file in files]), make), read


def _made(source: str, files: list[Remote], on_bad: str, read: Reader) -> Index:
    """The index of files that nobody has read yet."""
    if not all(file.name.endswith(".tar") for file in files):
        entries, classes = entries_of_folder(source, [file.name for file in files], [file.url for file in files])
        keeping = _keeping(read, read.copies)
        return as_index(source, *inspect_all(entries, keeping, on_bad, AT_A_TIME), classes)
    good, skipped = [], []
    for file in files:
        with _downloaded(file) as local:
            here = _reading(local)
            entries = list(entries_of_tar(local, file.url))
            found, bad = inspect_all(entries, _keeping(here, read.copies), on_bad)
        good += found
        skipped += bad
    return as_index(source, good, skipped, ())


def _reading(local: Path) -> Callable[[Entry], bytes]:
    """Reads members of a tar from where it lies for the moment."""

    def read(entry: Entry) -> bytes:
        with local.open("rb") as file:
            file.seek(entry.offset)
            return file.read(entry.size)

    return read


def _keeping(read: Callable[[Entry], bytes], copies: Copies | None) -> Callable[[Entry], bytes]:
    """The same, which leaves a copy where there is room: none that is there makes way while all are read once."""
    if copies is None:
        return read

    def kept(entry: Entry) -> bytes:
        content = read(entry)
        copies.put(content_hash(content), content, only_into_room=True)
        return content

    return kept


@contextmanager
def _downloaded(file: Remote) -> Iterator[Path]:
    """A tar on the local disk, for as long as the block lasts."""
    place = place_of(file.url)
    starts = range(0, file.size, BLOCK)

    def block(start: int) -> bytes:
        return read_range(place, start, min(file.size, start + BLOCK))

    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "a.tar"
        try:
            with local.open("wb") as out, ThreadPoolExecutor(DOWNLOADS) as pool:
                for first in range(0, len(starts), DOWNLOADS):
                    for content in pool.map(block, starts[first : first + DOWNLOADS]):
                        out.write(content)
        except FileNotFoundError as error:
            raise DataError(f"{file.url} is gone; restore it, or run again without it") from error
        except OSError as error:
            raise DataError(
                f"no room in {tempfile.gettempdir()} for {file.url} ({file.size} bytes; {error.strerror or error}); "
                "set TMPDIR to a larger disk"
            ) from error
        yield local


# --- what a URL names -------------------------------------------------------------------------------------------------


def remote_files(source: str) -> list[Remote]:
    """The tars or images that a URL names, in the order of local ones. Raises DataError when there are none."""
    if any(sign in source for sign in "*[") or source.endswith(".tar") or expand(source) != [source]:
        return _tars(source)
    place = cast(Any, place_of(source.rstrip("/")))
    root = place.path.rstrip("/")
    try:
        found = asked(place, lambda: place.fs.find(place.path, detail=True))
    except FileNotFoundError:
        found = {}
    inside = {name: info for name, info in found.items() if name.startswith(f"{root}/")}
    names = {name[len(root) :].lstrip("/"): info for name, info in inside.items()}
    wanted = [name for name, info in names.items() if _is_file(name, info)]
    if not wanted:
        raise DataError(f"{source} is no folder with images or tars; correct the URL, or put some there")
    url = source.rstrip("/")
    return [_remote(f"{url}/{name}", name, names[name]) for name in sorted(wanted, key=PurePosixPath)]


def _is_file(name: str, info: dict[str, Any]) -> bool:
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return info.get("type") != "directory" and not name.endswith("/") and not hidden


def _tars(source: str) -> list[Remote]:
    """The tars that a pattern names: braces first, then globs, as for local paths."""
    patterns = expand(source)
    if not patterns:
        raise DataError(f"{source} names no file, its range is empty; write the smaller number first")
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        files = [file for found in pool.map(_matching, patterns) for file in found]
    for file in files:
        if not file.url.endswith(".tar"):
            raise DataError(
                f"{file.url} is no plain .tar; give a folder of images or uncompressed tars, as samples are read in "
                "place"
            )
    return files


def _matching(pattern: str) -> list[Remote]:
    place = cast(Any, place_of(pattern))
    try:
        if any(sign in pattern for sign in "*["):
            found = asked(place, lambda: place.fs.glob(place.path, detail=True))
        else:
            found = {place.path: asked(place, lambda: place.fs.info(place.path))}
    except FileNotFoundError:
        found = {}
    files = {name: info for name, info in found.items() if _is_file(PurePosixPath(name).name, info)}
    if not files:
        raise DataError(f"no such file {pattern}; correct the URL, or copy it there")
    return [_remote(place.fs.unstrip_protocol(name), name, files[name]) for name in sorted(files)]


def _remote(url: str, name: str, info: dict[str, Any]) -> Remote:
    return Remote(url, name, *described(url, info))
