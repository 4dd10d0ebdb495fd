"""Which row of the data comes when: pure functions of seed, epoch and step, so that a resumed run, another number of
ranks and a baseline arm see the same images in the same order. Stands between the training loop's step counter and a
reader's rows."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cache.errors import CacheError
from models.spec import derive_seed


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """(num_samples,) int64 permutation of the rows, read-only."""
    # Sorted raw bits, since numpy promises the same bits in every version but not the same permutation().
    bits = np.random.PCG64(derive_seed("order", seed, epoch)).random_raw(num_samples)
    order = np.argsort(bits, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Whole batches in an epoch; the incomplete last one is dropped. CacheError when there is none."""
    if not 1 <= batch_size <= num_samples:
        raise CacheError(
            f"train.batch_size={batch_size} does not fit {num_samples} samples; it may be 1..{num_samples}"
        )
    return num_samples // batch_size


def batch_rows(seed: int, epoch: int, step: int, num_samples: int, batch_size: int) -> np.ndarray:
    """(batch_size,) rows of a step, counted within its epoch."""
    assert 0 <= step < steps_per_epoch(num_samples, batch_size)
    return epoch_order(seed, epoch, num_samples)[step * batch_size : (step + 1) * batch_size]


def view_and_group(epoch: int, views: int, groups: int) -> tuple[int, int]:
    """The view and the token group that an epoch reads: all views of a group, then the next group."""
    return epoch % views, (epoch // views) % groups
