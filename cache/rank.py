"""Which of several processes takes which places of a batch. Part of `order`, and apart from it since the command line
asks for its rank before anything is worth loading: free of numpy until places are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache.errors import CacheError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Rank:
    """Which of the processes that share every batch this is. It changes who computes what, never what is computed."""

    rank: int = 0
    ranks: int = 1

    def places(self, batch_size: int, parts: int = 1) -> np.ndarray:
        """(batch_size / ranks,) int64: the places of the global batch that this rank takes, ascending.

        `parts` are the micro-batches of a step: every rank takes an equal slice of each, so micro-batch m of all ranks,
        one after the other, is micro-batch m of one. With one part the slices are whole. CacheError where they are not
        equal.
        """
        import numpy as np

        self._check(batch_size, parts)
        return np.arange(batch_size).reshape(parts, self.ranks, -1)[:, self.rank].ravel()

    def paired_places(self, batch_size: int, parts: int = 1) -> np.ndarray:
        """The same where place i is mixed with its mirror image, batch_size - 1 - i: a rank takes both or neither.

        A rank's places, taken by themselves, have the same mirror images; micro-batch m of all ranks, in some order, is
        micro-batch m of one. In each they are alike: this rank's part of the first half, and the last but as many of
        the second, which is what stochastic depth counts on (`models.drop`).
        """
        import numpy as np

        if self.ranks == 1:
            return np.arange(batch_size)
        self._check(batch_size, 2 * parts)
        halves = np.arange(batch_size).reshape(parts, 2, self.ranks, -1)
        return np.stack([halves[:, 0, self.rank], halves[:, 1, self.ranks - 1 - self.rank]], axis=1).ravel()

    def _check(self, batch_size: int, parts: int) -> None:
        assert 0 <= self.rank < self.ranks
        if batch_size % (self.ranks * parts):
            raise CacheError(
                f"a batch of {batch_size} is not divisible into {parts} equal parts for each of {self.ranks} ranks; "
                f"use a batch_size that {self.ranks * parts} divides"
            )


ALONE = Rank()
"""The one process there is."""
