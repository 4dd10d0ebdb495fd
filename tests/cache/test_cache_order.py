from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import CacheError
from cache.order import Blocks, batch_rows, epoch_order, steps_per_epoch, view_and_group
from cache.rank import Rank


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


# --- shuffling by blocks of shards ------------------------------------------------------------------------------------

BLOCKS = Blocks(shard_rows=10, mixed=3)


@given(
    seed=st.integers(0, 2**40), epoch=st.integers(0, 99), num_samples=st.integers(1, 300),
    shard_rows=st.integers(1, 50), mixed=st.integers(1, 9),
)  # fmt: skip
def test_blocks_give_every_row_once_and_open_every_shard_in_one_window(
    seed: int, epoch: int, num_samples: int, shard_rows: int, mixed: int
) -> None:
    blocks = Blocks(shard_rows, mixed)
    order = epoch_order(seed, epoch, num_samples, blocks)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_samples))
    epoch_order.cache_clear()
    np.testing.assert_array_equal(epoch_order(seed, epoch, num_samples, blocks), order)
    # By a plain walk: whenever a row's shard is not among the open ones, a new window of so many shards has begun.
    seen: set[int] = set()
    window: set[int] = set()
    for shard in (order // shard_rows).tolist():
        if shard not in window:
            if len(window) == mixed:
                seen, window = seen | window, set()
            assert shard not in seen, "a shard is opened in one window only"
            window.add(shard)


def test_a_batch_touches_the_shards_of_a_window_and_a_global_shuffle_nearly_all() -> None:
    def touched(blocks: Blocks | None) -> list[int]:
        rows = (batch_rows(0, 0, step, 1000, 20, blocks) for step in range(50))
        return [len(set((some // 10).tolist())) for some in rows]

    assert max(touched(BLOCKS)) <= 2 * 3  # of 30 rows a window: 20 rows reach into two windows at most
    assert np.mean(touched(None)) == pytest.approx(100 * (1 - 0.98**10), abs=0.5)  # each of 10 rows is drawn with 0.02


def test_default_order_is_the_one_of_old() -> None:
    assert epoch_order(3, 1, 12).tolist() == [6, 11, 8, 4, 2, 10, 3, 1, 9, 0, 5, 7]


def test_rows_of_a_window_are_mixed_and_shards_come_in_any_order() -> None:
    """Over epochs: every place is as likely for every row (chi-squared), neighbours in a shard are parted."""
    epochs, samples = 600, 120
    orders = np.stack([epoch_order(5, epoch, samples, BLOCKS) for epoch in range(epochs)])
    places = orders.argsort(axis=1)
    for row in (0, 7, 59, 119):
        counts = np.bincount(places[:, row] // 10, minlength=12)
        assert ((counts - epochs / 12) ** 2 / (epochs / 12)).sum() < 33.1  # 11 degrees of freedom, p = 0.0005
        inside = np.bincount(places[:, row] % 30, minlength=30)
        assert ((inside - epochs / 30) ** 2 / (epochs / 30)).sum() < 60  # 29 degrees of freedom, p = 0.0006
    # Rows 0 and 1 share a window of 30 places: the next place is the neighbour's with 1 / 30, as for rows 0 and 29.
    follows = (places[:, 1] - places[:, 0] == 1).mean()
    assert follows == pytest.approx(29 / (30 * 29), abs=3 * (0.033 * 0.967 / epochs) ** 0.5)
    # Two shards of 12 meet in a window of 3 with 2 / 11.
    together = (places[:, 0] // 30 == places[:, 119] // 30).mean()
    assert together == pytest.approx(2 / 11, abs=3 * (0.18 * 0.82 / epochs) ** 0.5)


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_ranks_share_every_micro_batch_equally_and_in_order(ranks: int, parts: int) -> None:
    every = [Rank(rank, ranks).places(48, parts).reshape(parts, -1) for rank in range(ranks)]
    for part in range(parts):
        whole = np.concatenate([places[part] for places in every])
        np.testing.assert_array_equal(whole, np.arange(48).reshape(parts, -1)[part])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_pairs_stay_on_a_rank_and_are_its_own_mirror_images(ranks: int, parts: int) -> None:
    every = [Rank(rank, ranks).paired_places(48, parts) for rank in range(ranks)]
    for places in every:
        assert (np.diff(places) > 0).all()
        np.testing.assert_array_equal(places[::-1], 47 - places)
    for part in range(parts):
        whole = np.concatenate([places.reshape(parts, -1)[part] for places in every])
        np.testing.assert_array_equal(np.sort(whole), np.arange(48).reshape(parts, -1)[part])
        for rank, places in enumerate(every):  # the same of each micro-batch, as stochastic depth takes for granted
            own = Rank(rank, ranks).paired_places(48 // parts)
            np.testing.assert_array_equal(places.reshape(parts, -1)[part] - part * (48 // parts), own)


def test_a_batch_that_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(CacheError, match="a batch of 10 is not divisible into 1 equal parts for each of 4 ranks; use"):
        Rank(3, 4).places(10)
    with pytest.raises(CacheError, match=r"batch of 12 .* 4 equal parts for each of 2 ranks; .* that 8 divides"):
        Rank(0, 2).paired_places(12, 2)
    np.testing.assert_array_equal(Rank().paired_places(6, 3), np.arange(6))
