"""`open_cache`, the one place that picks a backend."""

from __future__ import annotations

import os
from pathlib import Path

from cache.errors import CacheError
from cache.layout import refuse_unbuilt
from cache.manifest import read_manifest
from cache.store import CacheReader
from cache.zarr_reader import ZarrCache


def open_cache(path: str | os.PathLike[str], verify: bool = False) -> CacheReader:
    """Reader of the finished cache at `path`; with `verify` every file is hashed first.

    Raises MissingCache (nothing there, or unfinished), DamagedCache, StaleCache (another version's format), CacheError
    (a URL or a backend that is not built yet).
    """
    if "://" in str(path):
        raise CacheError(f"{path}: caches behind URLs are not built yet; give a local path")
    refuse_unbuilt(read_manifest(path).backend)
    return ZarrCache(Path(path), verify=verify)
