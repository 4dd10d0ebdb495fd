"""What every backend of the cache agrees on: the batch that a reader hands to training, the protocol of a reader, and
the errors. Stands between the files on disk and the loader.

Shapes: B batch, L all tokens, S prefix tokens of all groups, D width, P values of a pixel patch. When one token group
is read, the L of features and ids is the group's size and the S of prefixes its own; pixels always cover all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from cache.buffers import FRESH, Buffers
from cache.errors import CacheError, DamagedCache, MissingCache, StaleCache, Unrepresentable
from cache.manifest import CacheManifest

__all__ = [
    "CacheError",
    "CacheReader",
    "DamagedCache",
    "FeatureBatch",
    "MissingCache",
    "StaleCache",
    "Unrepresentable",
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
    prefix_BSD: torch.Tensor | None = None
    """float32, the class and register tokens of the groups read, group after group; None where the model has none."""


@runtime_checkable
class CacheReader(Protocol):
    """Random access to a finished cache; safe to share between threads, pickles as its path."""

    @property
    def manifest(self) -> CacheManifest: ...

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64, -1 where unknown."""
        ...

    @property
    def keys(self) -> np.ndarray:
        """(N,) strings."""
        ...

    @property
    def digests(self) -> np.ndarray:
        """(N, 32) uint8: sha256 of the images that the samples were made of."""
        ...

    def __len__(self) -> int: ...

    def read(
        self, rows: Sequence[int] | np.ndarray, view: int = 0, group: int | None = None, into: Buffers = FRESH
    ) -> FeatureBatch:
        """Rows of a view in the order asked for; only one token group of them when `group` is given.

        The batch lies in memory of `into`, and is overwritten when that is handed to another call.
        """
        ...

    def stored(
        self, name: str, rows_B: np.ndarray, view: int = 0, group: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """(B, ...): an array's rows as they are stored."""
        ...

    def crops(self, rows: Sequence[int] | np.ndarray, view: int = 0) -> np.ndarray:
        """(B, 5) float32: top, left, height, width and flip of each row's view."""
        ...
