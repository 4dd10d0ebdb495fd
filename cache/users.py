"""What is noted beside the caches of a folder, which several runs may share: which runs use which caches, so that
clearing up after one takes nothing from another, and how many seconds a cache has cost to build, whoever built it, so
that a run that found it does not seem faster than its method is. Free of torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.errors import CacheError
from cache.lock import ASIDE, aside, hold_store
from cache.manifest import atomic_write
from cache.place import is_remote, is_there, matching, place_of, read_bytes


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
    file: str = ""
    """Where this is noted."""

    @property
    def gone(self) -> bool:
        """Whether its folder is no longer there, or it used the folder that these caches were copied or moved from; of
        another host's runs nobody here knows."""
        here = called(place_of(self.file).parents[2])
        return self.host == socket.gethostname() and (not Path(self.run).exists() or self.root != here)

    def __str__(self) -> str:
        here = "" if self.host == socket.gethostname() else f" of {self.host} (no longer there? delete {self.file})"
        return f"{self.run}{here}"


def called(root: Path) -> str:
    """A folder of caches by the one name that it has."""
    return str(root).rstrip("/") if is_remote(root) else os.path.realpath(root)


def register(root: Path, run: Path, caches: Iterable[str]) -> None:
    """Notes that a run uses these caches of `root`, and none that it used before.

    CacheError where nothing can be written, which is no harm: whoever cannot write there cannot remove there.
    """
    host, path = socket.gethostname(), str(run.absolute())
    name = hashlib.sha256(f"{host}\n{path}".encode()).hexdigest()[:16]
    user = User(path, host, tuple(sorted(set(caches))), called(root))
    with hold_store(root):
        file = root.absolute() / ASIDE / "users" / f"{name}.json"
        content = json.dumps({key: value for key, value in asdict(user).items() if key != "file"}).encode()
        if not is_there(file) or read_bytes(file) != content:
            atomic_write(file, content)


def users(root: Path) -> list[User]:
    """The runs that use caches of `root` and are still there."""
    found = []
    for file in matching(root.absolute() / ASIDE / "users", "*.json"):
        try:
            values = json.loads(read_bytes(file))
            user = User(values["run"], values["host"], tuple(values["caches"]), values["root"], str(file))
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{file} does not say which run uses which caches ({error}); delete it, and run any verb but gc in the "
                "runs that share the folder"
            ) from None
        if not user.gone:
            found.append(user)
    return found


def read_cost(folder: Path) -> float | None:
    """Seconds that building a cache has cost in all, by whichever runs; None where nobody noted it, nan where a part
    is noted as unknown."""
    try:
        seconds = json.loads(read_bytes(aside(folder, "costs", ".json")))["seconds"]
        return math.nan if seconds is None else float(seconds)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cost(folder: Path, seconds: float) -> None:
    """Notes what a cache has cost so far; nan where that is unknown. CacheError on a full disk."""
    known = None if math.isnan(seconds) else seconds
    atomic_write(aside(folder, "costs", ".json"), json.dumps({"seconds": known}).encode())
