"""Where `plan` writes what it measures and rehearses: folders of its own on the disk of the caches, which go again.
Their names begin with a dot, so that whatever lists caches passes them over. Free of torch."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache.place import is_remote
from pipeline.decide import Wanted

LEFT_SECONDS = 86400
"""From this age on a folder is one that a killed plan has left: plans take minutes, and several may run at once."""


def disk_folder(wanted: Wanted) -> Path:
    """A folder on the disk of the caches: theirs, which is made where it lies elsewhere than in the run's; where a
    store has them, the run's own."""
    root, own = wanted.paths.cache_root, wanted.paths.root
    inside = own in root.parents and not root.is_dir()
    folder = own if is_remote(root) or inside else root
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder below a folder, for as long as the block lasts; what killed plans left beside it goes as well."""
    for left in (folder / ".plan", *folder.glob(".plan-*")):  # the first is an earlier version's
        with suppress(FileNotFoundError):  # another plan clears up as well
            if left.is_dir() and time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=folder) as own:
        yield Path(own)
