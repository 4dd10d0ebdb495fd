"""What is noted beside the caches of a folder, which several runs may share: which runs use which caches, so that
clearing up after one takes nothing from another, and how many seconds a cache has cost to build, whoever built it, so
that a run that found it does not seem faster than its method is. Free of torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cache.errors import CacheError
from cache.lock import ASIDE, as_writable, aside, hold_store
from cache.manifest import atomic_write
from cache.place import SAME, StoreUnreachable, asked, is_remote, is_there, matching, place_of, read_bytes

NOWHERE = (0, 0)
"""Device and inode of no folder."""


@dataclass(frozen=True)
class User:
    """A run that uses caches of a folder."""

    run: str
    """Its folder, absolute."""
    host: str
    caches: tuple[str, ...]
    """Names of the caches that its settings ask for, as they were when it last looked."""
    root: str
    """The folder of the caches, as it was called then."""
    id: str = ""
    """Random, and in the run's folder, too; empty where a version noted this that knew runs by host and path only."""
    inode: int = 0
    """Of the file in the run's folder that has the id: a folder that is copied keeps the id, and not this."""
    lay_in: tuple[int, int] = NOWHERE
    """Device and inode of the folder in which the run's lies; nowhere where an earlier version noted this."""
    root_inode: int = 0
    """Of the folder of the caches; 0 in a store, and as above."""
    file: str = ""
    """Where this is noted."""

    def is_run(self, run: Path) -> bool:
        """Whether this is the run in a folder: it still is where that was moved, or another host sees it; no copy of it
        is, nor a run that has the same path on another machine. Whatever is in doubt is another's."""
        same_place = (self.host, self.run) == (socket.gethostname(), str(run.absolute()))
        name, inode = read_id(run)
        return self.id == name and (same_place or self.inode == inode) if self.id else same_place

    @property
    def gone(self) -> bool:
        """Whether its folder is no longer there, or these caches are a copy of those that it uses. Of another host's
        runs nobody here knows, nor of one that lay in a folder which is not the one that is seen here by its name: in
        another container, or before its disk is mounted."""
        run, root = Path(self.run), place_of(self.file).parents[2]
        if self.host != socket.gethostname():
            return False
        if seen(run) is False and identity(run.parent) == self.lay_in != NOWHERE:
            return True
        if is_remote(root):
            return "://" in self.root and self.root != called(root)
        # The same folder may have two names, where it is mounted twice, but not two inodes.
        return self.root != called(root) and self.root_inode not in (0, identity(root)[1])

    def __str__(self) -> str:
        of = "" if self.host == socket.gethostname() else f" of {self.host}"
        if self.is_run(Path(self.run)):
            return f"{self.run}{of}"
        hidden = seen(Path(self.run) / ID) is None
        doubt = "not to be seen from here" if hidden else f"no longer there? delete {self.file}"
        return f"{self.run}{of} ({doubt})"


ID = ".id"
"""The file of a run's folder that says which run it is, wherever the folder lies."""


def read_id(run: Path) -> tuple[str, int]:
    """The id in a run's folder, and the inode of its file; nothing where there is none."""
    try:
        return (run / ID).read_text(), (run / ID).stat().st_ino
    except OSError:
        return "", 0


def seen(path: Path) -> bool | None:
    """Whether a file or folder is there; None where that cannot be told: in another user's home, on a disk that does
    not answer."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    return True


def identity(folder: Path) -> tuple[int, int]:
    """Device and inode of a folder on a disk, by which it is known whatever its path."""
    try:
        found = os.stat(folder)
    except OSError:
        return NOWHERE
    return found.st_dev, found.st_ino


def called(root: Path) -> str:
    """A folder of caches by the one name that it has, or that it has on this machine."""
    if not is_remote(root):
        return os.path.realpath(root)
    protocol, _, rest = str(root).rstrip("/").partition("://")
    return f"{SAME.get(protocol, protocol)}://{rest}"


def register(root: Path, run: Path, caches: Iterable[str]) -> None:
    """Notes that a run uses these caches of `root`, and none that it used before.

    CacheError where nothing can be written: others may then remove what it reads.
    """
    names, host = tuple(sorted(set(caches))), socket.gethostname()
    with hold_store(root):
        if not read_id(run)[0]:
            atomic_write(run / ID, secrets.token_hex(16).encode())
        run, inode = run.absolute(), 0 if is_remote(root) else identity(root)[1]
        user = User(str(run), host, names, called(root), *read_id(run), identity(run.parent), inode)
        name = hashlib.sha256(f"{user.id}\n{user.inode}".encode()).hexdigest()[:16]
        file = root.absolute() / ASIDE / "users" / f"{name}.json"
        content = json.dumps({key: value for key, value in asdict(user).items() if key != "file"}).encode()
        new = not is_there(file)
        if new or read_bytes(file) != content:
            atomic_write(file, content)
            if not is_remote(file):
                as_writable(file)
        if new:
            forget_before(root, run, file)


def forget_before(root: Path, run: Path, file: Path) -> None:
    """Removes what was noted of a run by an earlier version, or before its folder came from another disk."""
    with suppress(CacheError):  # `gc` says what is wrong with a note
        for old in users(root):
            if old.file != str(file) and old.is_run(run):
                asked(root, partial(place_of(old.file).unlink, missing_ok=True))


def users(root: Path) -> list[User]:
    """The runs that use caches of `root` and are still there. CacheError for a note that is none, StoreUnreachable."""
    found = []
    for file in matching(root.absolute() / ASIDE / "users", "*.json"):
        try:
            content = read_bytes(file)
        except FileNotFoundError:  # its run has moved, and has just noted itself anew
            continue
        try:
            values = json.loads(content)
            user = User(
                values["run"],
                values["host"],
                tuple(values["caches"]),
                values["root"],
                id=values.get("id", ""),
                inode=values.get("inode", 0),
                lay_in=tuple(values.get("lay_in", NOWHERE)),
                root_inode=values.get("root_inode", 0),
                file=str(file),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{file} does not say which run uses which caches ({error}); delete it, and run any verb but gc in the "
                "runs that share the folder"
            ) from None
        if not user.gone:
            found.append(user)
    return found


@dataclass(frozen=True)
class Cost:
    """Seconds that building a cache has cost in all, by whichever runs."""

    seconds: float
    """nan where a part is not known."""
    crowded: float | None = None
    """Of those, what other work on the machine took, as far as it was measured; None where it was not."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, sum_measured((self.crowded, other.crowded)))

    def share(self, part: float) -> Cost:
        """What a part of the cache has cost."""
        return Cost(part * self.seconds, None if self.crowded is None else part * self.crowded)


def sum_measured(seconds: Iterable[float | None]) -> float | None:
    """The sum of what was measured, so much at least; None where nothing was."""
    known = [part for part in seconds if part is not None]
    return sum(known) if known else None


def read_cost(folder: Path) -> Cost | None:
    """What a cache has cost so far; None where nobody noted it. StoreUnreachable."""
    try:
        found = json.loads(read_bytes(aside(folder, "costs", ".json")))
        seconds, crowded = found["seconds"], found.get("crowded_seconds")
        return Cost(math.nan if seconds is None else float(seconds), None if crowded is None else float(crowded))
    except StoreUnreachable:  # or the note would be begun anew
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cost(folder: Path, cost: Cost) -> None:
    """Notes what a cache has cost so far. CacheError on a full disk."""
    known = None if math.isnan(cost.seconds) else cost.seconds
    told = {"seconds": known, "crowded_seconds": cost.crowded}
    atomic_write(aside(folder, "costs", ".json"), json.dumps(told).encode())
