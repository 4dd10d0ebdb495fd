"""Who may write a cache: one process builds, mends or removes it at a time. The lock and what else is known of a cache
but not part of it (who uses it, what it has cost, a copy of its manifest) lie beside it, in `.permafrost` of the folder
of caches, so that removing a cache never removes a lock that somebody waits for. The workers of a build do not lock:
they write other shards of the same build. Free of torch.

The lock is `flock`, which the kernel releases however a process ends. Several hosts on a shared file system exclude
each other as far as that file system passes `flock` on (NFS 4 and Lustre with `-o flock` do); where it does not, or has
no `flock` at all, and in an object store, two builders write the same files one after the other, each whole, and lose
nothing but time.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cache.errors import CacheError
from cache.place import is_remote

ASIDE = ".permafrost"
KINDS = ("locks", "users", "costs", "manifests")
"""Its folders."""
POLL_SECONDS = 0.1
NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP})
"""What a file system without `flock` answers."""


class CacheBusy(CacheError):
    """Another process builds, mends or removes the cache."""


def aside(folder: Path, kind: str, suffix: str) -> Path:
    """Where something about a cache lies that is no part of it."""
    whole = folder.absolute()
    return whole.parent / ASIDE / kind / f"{whole.name}{suffix}"


def as_writable(path: Path) -> None:
    """Lets whoever may write in the folder of caches write something of its `.permafrost` too, whatever the umask of
    whoever made it: who cannot is noted nowhere as a user of caches. What others made stays as it is."""
    root = next(folder.parent for folder in (path, *path.parents) if folder.name == ASIDE)
    write = root.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    mode = path.stat().st_mode
    wanted = write | write << 1 | (write >> 1 if stat.S_ISDIR(mode) else 0)  # to write is to read, and to enter
    if mode & wanted != wanted:
        with suppress(OSError):
            path.chmod(stat.S_IMODE(mode) | wanted)


def _make_room(path: Path) -> None:
    """The folders of `.permafrost`, of which a lock is to lie in one."""
    made = next(folder for folder in path.parents if folder.name == ASIDE)
    for folder in (made, *(made / kind for kind in KINDS)):
        folder.mkdir(parents=True, exist_ok=True)
        as_writable(folder)


def take(path: Path, seconds: float = -1) -> FileLock:
    """The lock of a file, to be released; Timeout where another process has it for so many seconds. Where the file
    system has no locks nothing is held: a marker in their place would outlive its process, and nobody on another host
    could tell."""
    lock = FileLock(path, timeout=seconds, thread_local=False, poll_interval=0.01, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return lock


@contextmanager
def locked(path: Path, seconds: float = -1) -> Iterator[bool]:
    """The same for as long as the block lasts; whether anything is held."""
    lock = take(path, seconds)
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextmanager
def hold_cache(
    folder: Path, tell: Callable[[str], None] | None = None, stop: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Holds a cache for this process. While another does: CacheBusy at once, or with `tell` one line that says who,
    then waiting until it ends or `stop` says so, which is CacheBusy too. CacheError where nothing can be written."""
    if is_remote(folder):
        yield
        return
    path = aside(folder, "locks", ".lock")
    with _held(path, f"the cache at {folder}", tell, stop):
        yield


@contextmanager
def hold_store(root: Path) -> Iterator[None]:
    """Holds what is noted about the caches of a folder, for the moment that it takes to read and change it."""
    if is_remote(root):
        yield
        return
    path = root.absolute() / ASIDE / "store.lock"
    with _held(path, f"the list of users in {root}", lambda text: None, lambda: False):
        yield


@contextmanager
def _held(path: Path, what: str, tell: Callable[[str], None] | None, stop: Callable[[], bool]) -> Iterator[None]:
    try:
        _make_room(path)
        lock = _acquired(path)
        if lock is None and tell:
            tell(f"waiting for {what}: {_holder(path)} works on it")
        while lock is None:
            if tell is None or stop():
                raise CacheBusy(f"{what} is busy: {_holder(path)} works on it; wait for it or stop it, then run again")
            time.sleep(POLL_SECONDS)
            lock = _acquired(path)
    except OSError as error:
        raise CacheError(
            f"cannot write {path.parent}: {error.strerror}; make it writable, or set cache.root (CACHE_ROOT) to "
            "another folder"
        ) from error
    try:
        with suppress(OSError):  # only words for others: a full disk must not stop what needs no disk
            as_writable(path)
            signed = path.with_suffix(".json")
            signed.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
            as_writable(signed)
        yield
    finally:
        lock.release()


SHARD_LOCKS = 16


@contextmanager
def hold_shard(folder: Path, name: str) -> Iterator[None]:
    """Holds a shard, by its name, for the moment in which its files get theirs: of two attempts at it the second finds
    it done. Some shards share a lock. Where nothing can be locked, see above."""
    if is_remote(folder):
        yield
        return
    path = aside(folder, "locks", f"-{zlib.crc32(name.encode()) % SHARD_LOCKS:02d}.lock")
    try:
        _make_room(path)
        lock = take(path)
        as_writable(path)
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror}; make it writable for all workers") from error
    try:
        yield
    finally:
        lock.release()


def _acquired(path: Path) -> FileLock | None:
    try:
        return take(path, 0)
    except Timeout:
        return None


def _holder(path: Path) -> str:
    """In words; who has just taken the lock has not signed yet."""
    try:
        found = json.loads(path.with_suffix(".json").read_text())
        here = "" if found["host"] == socket.gethostname() else f" on {found['host']}"
        return f"process {found['process']}{here}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
