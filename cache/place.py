"""Where a cache, or anything else that a URL may name, lies: a folder, or a prefix of an object store that fsspec
knows. Paths of both kinds behave alike (universal_pathlib); what differs between a disk and a store is here and in
`manifest`, and nowhere else. Free of torch.

In a store an object appears whole or not at all, so that writing needs no second name, and nothing is locked: two
builders of one cache write the same bytes where their settings agree. What a store fails to answer for a reason that
passes is asked again.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qsl, urlsplit

from cache.errors import CacheError
from cache.patience import Answer, CutShort, is_refusal, patiently, store_settings

NO_LISTINGS = {"use_listings_cache": False}
"""Listings are not kept: other processes write, too."""
OPTIONS: dict[str, dict[str, Any]] = {
    # S3's checksum of a whole object cannot be checked on a part of it, as some compatible servers would have it; every
    # chunk has a checksum of ours.
    "s3": NO_LISTINGS | {"config_kwargs": {"response_checksum_validation": "when_required"}},
    "sftp": {},  # hands all that it is given to its connection, and keeps no listings
}
SAME = {"s3a": "s3", "ssh": "sftp", "gcs": "gs", "abfs": "az", "abfss": "az"}
"""Other names of protocols."""
EXTRA = {"s3": "pip install s3fs", "gs": "pip install gcsfs", "az": "pip install adlfs"}
VERSIONS = (
    *("ETag", "etag", "md5Hash", "content_md5", "generation", "checksum"),
    *("LastModified", "last_modified", "mtime", "updated", "created"),
)
"""By what the protocols tell one content of an object from another, or when it was written."""
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
"""What of the environment no message may repeat, whatever a server answers."""
CONNECTIONS = 32
"""Requests to a store at the same time; readers and loaders have 16 each."""
BLOCK = 8 << 20
"""Bytes of one ranged read where a whole object is wanted."""


class StoreUnreachable(CacheError):
    """An object store did not answer, or refused: nothing is known of what lies there."""


def place_of(place: str | os.PathLike[str]) -> Path:
    """A folder's path, or that of a URL such as `s3://bucket/caches`. CacheError for a protocol that is unknown."""
    if isinstance(place, Path) or is_remote(place):
        return cast(Path, place)
    text = os.fspath(place)
    protocol, colon, rest = text.partition("://")
    if not colon:
        return Path(text)
    if protocol in ("file", "local"):
        return Path(rest)
    from upath import UPath

    try:
        found = UPath(text, **_options(protocol))
        if hasattr(found.fs, "retries"):
            found.fs.retries = 1  # s3fs's own repetitions; ours are counted
    except (ImportError, ValueError) as error:
        remedy = EXTRA.get(SAME.get(protocol, protocol), "see fsspec's list of protocols")
        raise CacheError(f"{text} cannot be opened ({error}); {remedy}") from error
    return cast(Path, found)


def path_or_url(text: str) -> str:
    """The same name; but a URL of the local disk is the path there. CacheError for a protocol that is unknown."""
    return text if "://" not in text or is_remote(place := place_of(text)) else str(place)


def is_remote(place: object) -> bool:
    """Whether a path is one of an object store."""
    return hasattr(place, "fs") and not isinstance(place, Path)


def _options(protocol: str) -> dict[str, Any]:
    """What a protocol's client is made with."""
    protocol = SAME.get(protocol, protocol)
    found = dict(OPTIONS.get(protocol, NO_LISTINGS))
    if protocol == "s3":
        timeout = store_settings().timeout
        found["config_kwargs"] = found["config_kwargs"] | {
            "read_timeout": timeout,
            "connect_timeout": min(timeout, 10.0),
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": CONNECTIONS,
        }
    return found


def holds_secret(url: str) -> bool:
    """Whether a URL has a password or a signature in it, which would then stand in every file that names its place."""
    if "://" not in url:
        return False
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    words = ("signature", "sig", "token", "secret", "password", "credential")
    told = [name.lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    return ":" in parts.netloc.rpartition("@")[0] or any(word in name for name in told for word in words)


@contextmanager
def reaching(place: Path) -> Iterator[None]:
    """Turns what a store's client raises into one line; FileNotFoundError passes, and everything of a local disk."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, CacheError):
        raise
    except Exception as error:
        if not is_remote(place):
            raise
        slow = f"no answer within {store_settings().timeout:g} s" if isinstance(error, TimeoutError) else ""
        why = without_secrets(" ".join(str(error).split()) or slow or type(error).__name__)
        if is_refusal(error) or "credential" in why.lower():
            raise StoreUnreachable(
                f"{place} is refused ({why}); check the bucket and the keys in the environment (AWS_ACCESS_KEY_ID, "
                "...): they are wrong, have expired, or may not do this"
            ) from error
        if why.endswith("Bad Request"):  # all that a server says to HEAD, whose answer has no body
            why += ", which may mean expired keys"
        raise StoreUnreachable(f"{place} cannot be reached ({why}); nothing is lost, run again when it can") from error


def without_secrets(text: str) -> str:
    """A text without the keys of the environment, whatever a server or a client has repeated of them."""
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text


def asked(place: Path, ask: Callable[[], Answer]) -> Answer:
    """What a store answers, asked again where that helps; errors as `reaching` has them."""
    with reaching(place):
        return patiently(ask) if is_remote(place) else ask()


def read_bytes(path: Path) -> bytes:
    """A whole file. FileNotFoundError, or StoreUnreachable."""
    if not is_remote(path):
        return path.read_bytes()
    return read_range(path, 0, size_of(path))


def size_of(path: Path) -> int:
    """Bytes of an object. FileNotFoundError, or StoreUnreachable."""
    found = describe(path)
    if found is None:
        raise FileNotFoundError(f"{path} is not there")
    return found[0]


def describe(path: Path) -> tuple[int, str] | None:
    """(bytes, version) of an object, None where there is none. Errors as `reaching` has them."""
    store = cast(Any, path)
    try:
        info = asked(path, lambda: store.fs.info(store.path))
    except FileNotFoundError:
        return None
    return None if info.get("type") == "directory" else described(str(path), info)


def described(url: str, info: dict[str, Any]) -> tuple[int, str]:
    """The same from what fsspec tells of an object. CacheError where that is not its size."""
    if info.get("size") is None:
        raise CacheError(f"{url}: its server does not say how large it is; copy it to a disk or a store")
    return int(info["size"]), " ".join(f"{key}={info[key]}" for key in VERSIONS if info.get(key))


class ObjectEnds(CacheError):
    """An object is shorter than what was asked of it."""


def read_range(path: Path, start: int, end: int) -> bytes:
    """The bytes [start, end) of an object, all of them. FileNotFoundError, StoreUnreachable, or ObjectEnds where the
    object itself is shorter; that the answer is shorter is a reason to ask again."""
    if start == end:
        return b""
    store = cast(Any, path)

    def read() -> bytes:
        try:
            content = _within_time(store, start, end)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and not _is_bad_range(error):
                raise
            content = b""  # a range behind an object's end is an error of its own
        if len(content) < end - start:
            if (size := store.fs.size(store.path)) < end:
                raise ObjectEnds(f"{path} has {size} bytes and {end} were asked for; it is cut short, copy it again")
            raise CutShort(f"{len(content)} bytes came of {end - start}")
        if len(content) > end - start:
            raise CacheError(f"{path}: its server gives no parts of a file; copy it to a disk or a store")
        return content

    return asked(path, read)


def _within_time(store: Any, start: int, end: int) -> bytes:
    """One request, in no more time than the settings give: a client's own limit is on each byte that comes."""
    if not getattr(store.fs, "async_impl", False):
        return bytes(store.fs.cat_file(store.path, start=start, end=end))
    from fsspec.asyn import sync

    read = store.fs._cat_file
    return bytes(sync(store.fs.loop, read, store.path, start=start, end=end, timeout=store_settings().timeout))


def _is_bad_range(error: OSError) -> bool:
    return error.errno == errno.EINVAL and not is_refusal(error)


def blocks_of(path: Path, size: int) -> Iterator[bytes]:
    """An object of a known size in blocks; errors as `read_range`."""
    for start in range(0, size, BLOCK):
        yield read_range(path, start, min(size, start + BLOCK))


def is_there(path: Path) -> bool:
    """Whether a file, a folder or anything below it exists."""
    if not is_remote(path):
        return path.exists()
    store = cast(Any, path)
    try:
        asked(path, lambda: store.fs.info(store.path))  # `exists` of a store that does not answer says no
    except FileNotFoundError:
        return False
    return True


def files_below(folder: Path) -> list[tuple[Path, int]]:
    """(path, bytes) of every file; what goes in the meantime counts nothing."""
    found: list[tuple[Path, int]] = []
    if is_remote(folder):
        store = cast(Any, folder)
        with suppress(FileNotFoundError):
            for name, info in asked(folder, lambda: store.fs.find(store.path, detail=True)).items():
                found.append((store / name[len(store.path) :].lstrip("/"), info["size"]))
        return found
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                found.append((path, path.stat().st_size))
    return found


def matching(folder: Path, pattern: str) -> list[Path]:
    """What lies in a folder and fits a pattern, sorted; nothing where there is no folder."""
    try:
        return asked(folder, lambda: sorted(folder.glob(pattern), key=str))
    except FileNotFoundError:
        return []


def remove_tree(folder: Path) -> None:
    """Remove all below a folder, which need not exist."""
    if not is_remote(folder):
        if folder.exists():
            shutil.rmtree(folder)
        return
    store = cast(Any, folder)
    with suppress(FileNotFoundError):  # nothing there, or gone by the first of two attempts
        asked(folder, lambda: store.fs.rm(store.path, recursive=True))


def forget(folder: Path) -> None:
    """Remove what nobody needs any more; where it cannot be, it stays."""
    with suppress(OSError):
        remove_tree(folder)


@contextmanager
def new_object(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes an object when the block is left, and does not when that raises."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            yield cast(BinaryIO, file)
            file.flush()
            _store(path, file.name, file.tell())
    except OSError as error:
        raise CacheError(
            f"cannot write to {tempfile.gettempdir()} on the way to {path}: {error.strerror or error}; make room or "
            "set TMPDIR, and run again, what is finished stays"
        ) from error


def _store(path: Path, file: str, size: int) -> None:
    store = cast(Any, path)
    s3 = SAME.get(store.protocol, store.protocol) == "s3"
    parts = {"chunksize": int(store_settings().part_mb * 2**20)} if s3 else {}

    def send() -> None:
        store.fs.put_file(file, store.path, **parts)
        if (found := store.fs.size(store.path)) != size:
            raise CutShort(f"it has {found} bytes instead of the {size} that were sent")

    try:
        asked(path, send)
    except FileNotFoundError as error:
        raise StoreUnreachable(f"{path} cannot be written ({error}); create the bucket first") from error


def copy_object(source: Path, target: Path) -> None:
    """Copy an object inside a store, or from one to another."""
    ours, theirs = cast(Any, target), cast(Any, source)
    if is_remote(source) and theirs.fs is ours.fs:
        asked(target, lambda: ours.fs.cp_file(theirs.path, ours.path))
    else:
        asked(target, lambda: ours.write_bytes(read_bytes(source)))


def free_bytes(folder: Path) -> float:
    """Free space on a folder's disk; a store has no end."""
    if is_remote(folder):
        return float("inf")
    disk = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(disk).free
