"""The manifest: what a cache is, and the size and checksum of every file in it. It is written last and atomically, so a
folder with a manifest is a finished cache; every later question (is it current, is it whole) is answered from it. Free
of torch and zarr."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cache.checksum import Buffer, Checksum, feed
from cache.errors import CacheError, DamagedCache, LaterCache, MissingCache, StaleCache
from cache.layout import Layout
from cache.lock import aside
from cache.place import describe, is_remote, is_there, new_object, place_of, read_bytes, size_of
from models.spec import FeatureSpec

FORMAT = 4
READ_FORMATS = (3, FORMAT)
"""Those of which every field is known. Format 3 has sha256 for BLAKE3."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One file of the cache; `rows` is 0 for files that hold no rows of a view (metadata, labels, keys)."""

    name: str
    first_row: int
    rows: int
    bytes: int
    checksum: str
    """Of the file, as `Checksum` says it."""
    moments: tuple[float, ...] | None = None
    """Of a shard of features: sum, sum of squares and largest magnitude of what is stored, sum of squares of its
    difference to what the frozen blocks gave, sum of squares of that, largest difference."""
    batch: int = 0
    """Of a shard of features: samples that passed the frozen blocks at once, on which their last bits depend; 0 where
    that is not known, as of rows that were partly taken over."""
    last_crc: int = field(default=0, compare=False)
    """Of a Zarr shard: the crc32c behind its last chunk, by which a reader tells it from another whole one of its size;
    0 where that is not known. Says no more than the checksum, so that entries without it are equal."""


@dataclass(frozen=True)
class ViewStats:
    """The stored features of one view."""

    mean: float
    std: float
    max_abs: float


@dataclass(frozen=True)
class ViewError:
    """What storing has lost of one view's features, measured on all of them as they were written."""

    relative_rmse: float
    """Root of the mean squared difference over that of the features that the frozen blocks gave."""
    max_abs: float
    """Largest difference of one value."""


@dataclass(frozen=True)
class CacheManifest:
    """A finished cache."""

    spec: FeatureSpec
    num_samples: int
    shard_rows: int
    shards: tuple[ShardEntry, ...]
    stats: tuple[ViewStats, ...]
    errors: tuple[ViewError, ...]
    accumulated_error: float
    """Relative RMSE, of the worst view, against what the frozen blocks make of the images: of all values where the
    cache was built from these; where it continues another, measured on `error_samples` of them before it was built."""
    kin: str
    """Caches of one kin hold equal numbers for equal samples and views (`FeatureSpec.kin`)."""
    backend: str = "zarr"
    compression: str = ""
    error_samples: int = 0
    """0 where the cache was built from images; and where it continues another and is older than this measurement: then
    `accumulated_error` is the sum of what every cache of the chain has lost by itself, which blocks may amplify."""
    format: int = FORMAT
    complete: bool = True

    @property
    def layout(self) -> Layout:
        """What lies where in it."""
        return Layout(self.spec, self.num_samples, self.shard_rows, self.backend, self.compression)

    @property
    def fingerprint(self) -> str:
        return self.spec.fingerprint

    @property
    def parent(self) -> str:
        """Fingerprint of the cache that this one was built from; empty when built from images."""
        return self.spec.parent

    @property
    def error_basis(self) -> str:
        """What `accumulated_error` is of, in words."""
        if not self.parent:
            return "of all samples"
        return f"of {self.error_samples} samples" if self.error_samples else "a sum over its caches, not measured"

    @property
    def num_tokens(self) -> int:
        return self.spec.num_tokens

    @property
    def width(self) -> int:
        return self.spec.width

    @property
    def views(self) -> int:
        return self.spec.views

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "fingerprint": self.fingerprint,
            "parent": self.parent,
            "spec": self.spec.to_dict(),
            "kin": self.kin,
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "width": self.width,
            "views": self.views,
            "backend": self.backend,
            "compression": self.compression,
            "shard_rows": self.shard_rows,
            "stats": [asdict(stats) for stats in self.stats],
            "errors": [asdict(error) for error in self.errors],
            "accumulated_error": self.accumulated_error,
            "error_samples": self.error_samples,
            "shards": [dict(vars(entry)) for entry in self.shards],
            "complete": self.complete,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CacheManifest:
        return cls(
            spec=FeatureSpec.from_dict(values["spec"]),
            num_samples=values["num_samples"],
            shard_rows=values["shard_rows"],
            shards=entries_from_dicts(values["shards"]),
            stats=tuple(ViewStats(**stats) for stats in values["stats"]),
            errors=tuple(ViewError(**error) for error in values["errors"]),
            accumulated_error=values["accumulated_error"],
            error_samples=values.get("error_samples", 0),
            kin=values["kin"],
            backend=values["backend"],
            compression=values["compression"],
            format=values["format"],
            complete=values["complete"],
        )


def entries_from_dicts(dicts: list[dict[str, Any]]) -> tuple[ShardEntry, ...]:
    return tuple(ShardEntry(**{**d, "moments": d["moments"] and tuple(d["moments"])}) for d in dicts)


def cache_folder_name(spec: FeatureSpec) -> str:
    return f"cut-{spec.cut}-{spec.fingerprint[:8]}"


def write_manifest(folder: str | os.PathLike[str], manifest: CacheManifest) -> None:
    """Declares the cache finished; every file that it names must be on disk already."""
    atomic_write(place_of(folder) / MANIFEST, seal(manifest.to_dict()))


def manifest_copy(folder: Path) -> Path:
    """Where a second copy of a manifest lies, beside the cache: without it one bad byte would cost every shard."""
    return aside(folder, "manifests", ".json")


def read_manifest(folder: str | os.PathLike[str]) -> CacheManifest:
    """The manifest of a finished cache. MissingCache, DamagedCache, StaleCache for another version's format, LaterCache
    for that of one to come."""
    path = place_of(folder) / MANIFEST
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        state = "is unfinished" if is_there(path.parent) else "does not exist"
        raise MissingCache(f"the cache at {folder} {state}; run its `make cache-N`, which resumes") from None
    try:
        values = unseal(content)
    except ValueError:
        raise DamagedCache(f"{path} is altered or cut short; run `make repair`") from None
    if values["format"] > FORMAT:
        raise LaterCache(
            f"{path} has format {values['format']}, this version reads {FORMAT}: a later version made it and may need "
            "it; update, or remove the folder"
        )
    if values["format"] not in READ_FORMATS:
        reads = " and ".join(map(str, READ_FORMATS))
        raise StaleCache(f"{path} has format {values['format']}, this version reads {reads}; build the cache again")
    try:
        return CacheManifest.from_dict(values)
    except ValueError as error:
        raise StaleCache(f"{path} was written by another version ({error}); build the cache again") from None


def manifest_stamp(folder: Path) -> tuple[int | str, ...]:
    """By what a manifest is known again without being read: a new one is a new file. Empty where there is none, or its
    store tells no versions."""
    path = folder / MANIFEST
    if is_remote(path):
        size, version = describe(path) or (0, "")
        return (size, version) if version else ()
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def check_spec(manifest: CacheManifest, wanted: FeatureSpec) -> None:
    """StaleCache, naming the first differing fields, unless the cache holds exactly what is wanted."""
    differences = manifest.spec.differences(wanted)[:3]
    if differences:
        holds = " ".join(f"{field}={_short(mine)}" for field, mine, _ in differences)
        wants = " ".join(f"{field}={_short(theirs)}" for field, _, theirs in differences)
        raise StaleCache(f"cache holds {holds}, wanted {wants}; run `make explain`")


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}…" if isinstance(value, str) and len(text) == 64 else text


def find_damage(folder: Path, entry: ShardEntry) -> str:
    """What is wrong with a file, hashed afresh; empty when it is as it was written."""
    path, found = folder / entry.name, Checksum(entry.checksum)
    try:
        size = size_of(path) if is_remote(path) else path.stat().st_size
        if size != entry.bytes:
            return f"has {size} bytes instead of {entry.bytes}"
        feed(found, path, size)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if str(found) == entry.checksum else "is altered"


def seal(values: dict[str, Any]) -> bytes:
    """JSON whose last field is the sha256 of every byte before it: not even white space can change unnoticed. A field,
    and an item of a list, has a line: json's own indentation would take ten times as long, and a manifest may have a
    million items."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    told = []
    for name, value in values.items():
        listed = isinstance(value, list) and value
        text = "[\n  " + ",\n  ".join(map(encode, value)) + "\n ]" if listed else encode(value)
        told.append(f" {encode(name)}: {text}")
    body = ("{\n" + ",\n".join(told)).encode()
    return body + _seal_of(body)


def unseal(content: bytes) -> dict[str, Any]:
    """The values of sealed JSON; ValueError when any byte is not as it was written."""
    body = content[: -len(_seal_of(b""))]
    if content != body + _seal_of(body):
        raise ValueError("the seal is broken")
    values = json.loads(content)
    del values["checksum"]
    return values


def _seal_of(body: bytes) -> bytes:
    return f',\n "checksum": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def as_bytes(values: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return values.reshape(-1).view(np.uint8).data


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file durably, all or nothing: a kill at any moment leaves the old file or the new one.

    Raises CacheError when the disk does not take it.
    """
    with _replacing(path, len(content)) as file:
        file.write(content)


def atomic_stream(path: Path, parts: Iterable[Buffer], size: int) -> tuple[int, str]:
    """The same with a file of about `size` bytes that comes in parts and is never in memory whole; returns its bytes
    and checksum. An error of `parts` leaves the old file, too."""
    written, digest, _, naming = begin_stream(path, parts, size)
    naming.close()
    return written, digest


def begin_stream(path: Path, parts: Iterable[Buffer], size: int) -> tuple[int, str, Callable[[], None], ExitStack]:
    """`atomic_stream` but for its last steps, which may run in other threads: a function that waits for the disk, and a
    stack by which the file, once that is closed, gets its name, and vanishes when it is left by an error. CacheError
    of both."""
    digest, written = Checksum(), 0
    with ExitStack() as stack:
        file = stack.enter_context(_replacing(path, size))
        for block in _joined(parts):
            written += file.write(block)
            digest.update(block)

        def sync() -> None:
            file.flush()
            if not is_remote(path):
                os.fsync(file.fileno())

        return written, str(digest), sync, stack.pop_all()


BLOCK = 1 << 20
"""Bytes that are written and hashed at once: each call gives up the interpreter's lock, and getting it back takes
longer than writing a few KB does."""


def _joined(parts: Iterable[Buffer]) -> Iterator[Buffer]:
    """The same bytes in pieces of no less than BLOCK but for the last."""
    held: list[Buffer] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= BLOCK:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


@contextmanager
def _replacing(path: Path, size: int) -> Iterator[BinaryIO]:
    """A new file that stands at `path` once it is durably written."""
    if is_remote(path):
        with new_object(path) as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        remedy = "make the folder writable" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else "make room"
        raise CacheError(
            f"cannot write {path} ({size} bytes): {error.strerror}; {remedy} and run again, what is finished stays"
        ) from error
    finally:
        with suppress(OSError):  # whatever it is, the error above has said it
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in a folder durable."""
    if is_remote(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
