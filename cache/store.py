"""What every backend of the cache agrees on: the batch that a reader hands to training, the protocol of a reader, the
errors, and `open_cache`, the one place that picks a backend. Stands between the files on disk and the loader.

Shapes: B batch, L all tokens, D width, P values of a pixel patch. When one token group is read, the L of features and
ids is the group's size; pixels always cover all tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from cache.errors import CacheError, DamagedCache, MissingCache, StaleCache, Unrepresentable
from cache.layout import refuse_unbuilt
from cache.manifest import CacheManifest, read_manifest

__all__ = [
    "CacheError",
    "CacheReader",
    "DamagedCache",
    "FeatureBatch",
    "MissingCache",
    "StaleCache",
    "Unrepresentable",
    "open_cache",
]


@dataclass(frozen=True)
class FeatureBatch:
    """Some rows of one view."""

    features_BLD: torch.Tensor
    """float32, in stored order: group after group."""
    ids_BL: torch.Tensor
    """int64, the raster position of each stored token."""
    pixels_BLP: torch.Tensor | None
    """uint8, all tokens in raster order; None when the cache keeps no pixels."""
    labels_B: torch.Tensor
    """int64, -1 where unknown."""
    keys: tuple[str, ...]


@runtime_checkable
class CacheReader(Protocol):
    """Random access to a finished cache; safe to share between threads, pickles as its path."""

    @property
    def manifest(self) -> CacheManifest: ...

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int] | np.ndarray, view: int = 0, group: int | None = None) -> FeatureBatch:
        """Rows of a view in the order asked for; only one token group of them when `group` is given."""
        ...

    def crops(self, rows: Sequence[int] | np.ndarray, view: int = 0) -> np.ndarray:
        """(B, 5) float32: top, left, height, width and flip of each row's view."""
        ...


def open_cache(path: str | os.PathLike[str], verify: bool = False) -> CacheReader:
    """Reader of the finished cache at `path`; with `verify` every file is hashed first.

    Raises MissingCache (nothing there, or unfinished), DamagedCache, StaleCache (another version's format), CacheError
    (a URL or a backend that is not built yet).
    """
    if "://" in str(path):
        raise CacheError(f"{path}: caches behind URLs are not built yet; give a local path")
    refuse_unbuilt(backend=read_manifest(path).backend)
    from cache.zarr_reader import ZarrCache

    return ZarrCache(Path(path), verify=verify)
