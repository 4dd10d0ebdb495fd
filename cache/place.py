"""Where a cache lies: a folder, or a prefix of an object store, named by a URL that fsspec knows. Paths of both kinds
behave alike (universal_pathlib); what differs between a disk and a store is here and in `manifest`, and nowhere else.
Free of torch.

In a store an object appears whole or not at all, so that writing needs no second name, and nothing is locked: two
builders of one cache write the same bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from cache.errors import CacheError

OPTIONS: dict[str, dict[str, Any]] = {
    # Listings are not kept: other processes write, too. S3's checksum of a whole object cannot be checked on a part of
    # it, as some compatible servers would have it; every chunk has a checksum of ours.
    "s3": {"use_listings_cache": False, "config_kwargs": {"response_checksum_validation": "when_required"}},
}
EXTRA = {"s3": "pip install s3fs", "gs": "pip install gcsfs", "az": "pip install adlfs"}


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
        found = UPath(text, **OPTIONS.get(protocol, {}))
        _ = found.fs
    except (ImportError, ValueError) as error:
        remedy = EXTRA.get(protocol, "see fsspec's list of protocols")
        raise CacheError(f"{text} cannot be opened ({error}); {remedy}") from error
    return cast(Path, found)


def is_remote(place: object) -> bool:
    """Whether a path is one of an object store."""
    return hasattr(place, "fs") and not isinstance(place, Path)


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
        why = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, PermissionError) or "credential" in why.lower():
            raise StoreUnreachable(
                f"{place} is refused ({why}); check the bucket and the keys in the environment (AWS_ACCESS_KEY_ID, ...)"
            ) from error
        raise StoreUnreachable(f"{place} cannot be reached ({why}); nothing is lost, run again when it can") from error


def read_bytes(path: Path) -> bytes:
    """A whole file. FileNotFoundError, or StoreUnreachable."""
    with reaching(path):
        return path.read_bytes()


def is_there(path: Path) -> bool:
    """Whether a file, a folder or anything below it exists."""
    if not is_remote(path):
        return path.exists()
    store = cast(Any, path)
    try:
        with reaching(path):
            store.fs.info(store.path)  # `exists` of a store that does not answer says no
    except FileNotFoundError:
        return False
    return True


def files_below(folder: Path) -> list[tuple[Path, int]]:
    """(path, bytes) of every file; what goes in the meantime counts nothing."""
    found: list[tuple[Path, int]] = []
    if is_remote(folder):
        store = cast(Any, folder)
        with reaching(folder), suppress(FileNotFoundError):
            for name, info in store.fs.find(store.path, detail=True).items():
                found.append((store / name[len(store.path) :].lstrip("/"), info["size"]))
        return found
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                found.append((path, path.stat().st_size))
    return found


def matching(folder: Path, pattern: str) -> list[Path]:
    """What lies in a folder and fits a pattern, sorted; nothing where there is no folder."""
    with reaching(folder):
        try:
            return sorted(folder.glob(pattern), key=str)
        except FileNotFoundError:
            return []


def remove_tree(folder: Path) -> None:
    """Remove all below a folder, which need not exist."""
    if not is_remote(folder):
        if folder.exists():
            shutil.rmtree(folder)
        return
    with reaching(folder):
        store = cast(Any, folder)
        if is_there(folder):
            store.fs.rm(store.path, recursive=True)


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
    try:
        with reaching(path):
            store.fs.put_file(file, store.path)
            if (found := store.fs.size(store.path)) != size:
                raise StoreUnreachable(f"{path} has {found} bytes instead of the {size} that were sent; run again")
    except FileNotFoundError as error:
        raise StoreUnreachable(f"{path} cannot be written ({error}); create the bucket first") from error


def copy_object(source: Path, target: Path) -> None:
    """Copy an object inside a store, or from one to another."""
    with reaching(target):
        ours, theirs = cast(Any, target), cast(Any, source)
        if is_remote(source) and theirs.fs is ours.fs:
            ours.fs.cp_file(theirs.path, ours.path)
        else:
            ours.write_bytes(source.read_bytes())


def free_bytes(folder: Path) -> float:
    """Free space on a folder's disk; a store has no end."""
    if is_remote(folder):
        return float("inf")
    disk = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(disk).free
