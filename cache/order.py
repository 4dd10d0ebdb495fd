"""Which row of the data comes when: pure functions of seed, epoch and step, so that a resumed run, another number of
ranks (`rank` says who takes which) and a baseline arm see the same images in the same order. Stands between the
training loop's step counter and a reader's rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cache.errors import CacheError
from models.spec import derive_seed


@dataclass(frozen=True)
class Blocks:
    """Shuffling by whole shards, for stores where opening many files at once is dear: the shards come in random order,
    and rows are mixed within a window of so many shards, so that an epoch opens each shard once."""

    shard_rows: int
    """Rows of a shard; the last one may have fewer."""
    mixed: int
    """Shards in a window."""


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_samples: int, blocks: Blocks | None = None) -> np.ndarray:
    """(num_samples,) int64 permutation of the rows, read-only: of all of them, or, with `blocks`, window by window."""
    order = _shuffled(num_samples, "order", seed, epoch)
    if blocks is not None:
        shards = -(-num_samples // blocks.shard_rows)
        window_of_shard = np.empty(shards, np.int64)
        window_of_shard[_shuffled(shards, "shards", seed, epoch)] = np.arange(shards) // blocks.mixed
        # Sorting the global shuffle by window, stably, leaves a uniform shuffle inside each.
        order = order[np.argsort(window_of_shard[order // blocks.shard_rows], kind="stable")]
    order.flags.writeable = False
    return order


def _shuffled(count: int, *seed: str | int) -> np.ndarray:
    """(count,) int64: a permutation."""
    # Sorted raw bits, since numpy promises the same bits in every version but not the same permutation().
    bits = np.random.PCG64(derive_seed(*seed)).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64)


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Whole batches in an epoch; the incomplete last one is dropped. CacheError when there is none."""
    if not 1 <= batch_size <= num_samples:
        raise CacheError(
            f"train.batch_size={batch_size} does not fit {num_samples} samples; it may be 1..{num_samples}"
        )
    return num_samples // batch_size


def batch_rows(
    seed: int, epoch: int, step: int, num_samples: int, batch_size: int, blocks: Blocks | None = None
) -> np.ndarray:
    """(batch_size,) rows of a step, counted within its epoch: those of all ranks."""
    assert 0 <= step < steps_per_epoch(num_samples, batch_size)
    return epoch_order(seed, epoch, num_samples, blocks)[step * batch_size : (step + 1) * batch_size]


def view_and_group(epoch: int, views: int, groups: int) -> tuple[int, int]:
    """The view and the token group that an epoch reads: all views of a group, then the next group."""
    return epoch % views, (epoch // views) % groups
