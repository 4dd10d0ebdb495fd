from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import CacheError
from cache.order import batch_rows, epoch_order, steps_per_epoch, view_and_group


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), num_samples=st.integers(1, 500))
def test_an_epoch_is_a_permutation_and_a_pure_function(seed: int, epoch: int, num_samples: int) -> None:
    order = epoch_order(seed, epoch, num_samples)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(num_samples))
    np.random.seed(0)
    epoch_order.cache_clear()
    np.testing.assert_array_equal(epoch_order(seed, epoch, num_samples), order)


def test_epochs_and_seeds_differ_and_mix() -> None:
    orders = np.stack([epoch_order(seed, epoch, 1000) for seed in range(3) for epoch in range(3)])
    same = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(same) < 10  # two random permutations agree in one place on average
    assert 450 < orders[:, :500].mean() < 550


def test_batches_cover_the_epoch_but_for_its_rest() -> None:
    steps = steps_per_epoch(103, 10)
    rows = np.concatenate([batch_rows(3, 1, step, 103, 10) for step in range(steps)])
    assert steps == 10 and len(set(rows.tolist())) == 100
    np.testing.assert_array_equal(rows, epoch_order(3, 1, 103)[:100])


def test_too_large_a_batch_is_refused() -> None:
    for call in (lambda: steps_per_epoch(9, 10), lambda: batch_rows(0, 0, 0, 9, 10)):
        with pytest.raises(CacheError, match=r"train.batch_size=10 does not fit 9 samples; it may be 1\.\.9"):
            call()


def test_orders_cannot_be_altered() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 5)[0] = 1


def test_views_change_first_then_groups() -> None:
    assert [view_and_group(epoch, 2, 4) for epoch in range(9)] == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3), (0, 0),
    ]  # fmt: skip
    assert [view_and_group(epoch, 3, 1) for epoch in range(4)] == [(0, 0), (1, 0), (2, 0), (0, 0)]
