"""Masks: MAE's semantics against a version written out by hand, and masks that stay inside a token group."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.masking import (
    block_noise,
    distance_to_visible,
    group_ids,
    inverse,
    mask_group,
    random_mask,
    restore_tokens,
    take_tokens,
    weigh_by_distance,
)


def slow_mask(noise: list[float], ratio: float) -> tuple[list[int], list[int], list[float]]:
    """(ids_keep, ids_restore, hidden) of one image, as MAE's `random_masking` defines them."""
    shuffled = sorted(range(len(noise)), key=lambda token: noise[token])
    keep = int(len(noise) * (1 - ratio))
    restore = [shuffled.index(token) for token in range(len(noise))]
    return shuffled[:keep], restore, [0.0 if token in shuffled[:keep] else 1.0 for token in range(len(noise))]


def test_a_permutation_is_inverted_as_sorting_would() -> None:
    order = torch.rand(5, 196).argsort(dim=1)
    assert torch.equal(inverse(order), order.argsort(dim=1))


def random_groups(batch: int, tokens: int, groups: int) -> Tensor:
    return group_ids(torch.rand(batch, tokens), groups)


@given(
    st.lists(st.permutations(range(12)), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9]),
)
def test_random_mask_is_mae_s(ranks: list[list[int]], ratio: float) -> None:
    mask = random_mask(torch.tensor(ranks) / 12, ratio)
    for row, noise in enumerate(ranks):
        ids_keep, ids_restore, hidden = slow_mask([float(rank) for rank in noise], ratio)
        assert mask.ids_keep[row].tolist() == ids_keep
        assert mask.ids_restore[row].tolist() == ids_restore
        assert mask.hidden[row].tolist() == hidden


@pytest.mark.parametrize(("tokens", "ratio", "kept"), [(196, 0.75, 49), (64, 0.75, 16), (10, 0.9, 0), (10, 0.72, 2)])
def test_as_many_are_kept_as_mae_keeps(tokens: int, ratio: float, kept: int) -> None:
    # 10 * (1 - 0.9) is a hair less than 1 in floating point, and MAE cuts it off.
    mask = random_mask(torch.rand(2, tokens), ratio)
    assert mask.ids_keep.shape == (2, kept)
    assert mask.hidden.sum(dim=1).tolist() == [tokens - kept] * 2


def test_hidden_is_one_where_a_token_is_hidden() -> None:
    mask = random_mask(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), 0.5)
    assert mask.ids_keep.tolist() == [[1, 3]]
    assert mask.ids_restore.tolist() == [[2, 0, 3, 1]]
    assert mask.hidden.tolist() == [[1.0, 0.0, 1.0, 0.0]] and mask.hidden.dtype == torch.float32


def test_take_and_restore_put_every_token_back() -> None:
    tokens, mask_token = torch.randn(3, 16, 5), torch.full((5,), -9.0)
    mask = random_mask(torch.rand(3, 16), 0.75)
    restored = restore_tokens(take_tokens(tokens, mask.ids_keep), mask_token, mask.ids_restore)
    for row in range(3):
        for token in range(16):
            want = mask_token if mask.hidden[row, token] else tokens[row, token]
            assert torch.equal(restored[row, token], want)


def test_restore_keeps_the_tokens_precision() -> None:
    mask = random_mask(torch.rand(1, 4), 0.5)
    assert restore_tokens(torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.zeros(3), mask.ids_restore).dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_share_no_token_and_leave_none_out(groups: int) -> None:
    ids = random_groups(5, 16, groups)
    assert ids.sort(dim=1).values.tolist() == [list(range(16))] * 5
    assert len({tuple(row) for row in ids.tolist()}) == 5


def test_group_ids_are_the_order_of_the_noise() -> None:
    assert group_ids(torch.tensor([[0.4, 0.1, 0.8, 0.3]]), 2).tolist() == [[1, 3, 0, 2]]


def test_in_full_mode_a_group_mask_is_mae_s() -> None:
    noise, ids = torch.rand(3, 16), torch.arange(16).expand(3, 16)
    chosen, mask = mask_group(ids, noise, 4, 16), random_mask(noise, 0.75)
    assert torch.equal(chosen.take_BK, mask.ids_keep)
    for name in ("ids_keep", "ids_restore", "hidden"):
        assert torch.equal(getattr(chosen.mask, name), getattr(mask, name))
    assert torch.equal(chosen.scored_BL, mask.hidden)


@pytest.mark.parametrize(("groups", "keep"), [(4, 4), (2, 4), (2, 8), (2, 3), (1, 4)])
def test_a_group_mask_keeps_tokens_of_the_group_only(groups: int, keep: int) -> None:
    size = 16 // groups
    ids = random_groups(6, 16, groups)[:, -size:]
    chosen = mask_group(ids, torch.rand(6, size), keep, 16)
    assert torch.equal(chosen.mask.ids_keep, ids.gather(1, chosen.take_BK))
    for row in range(6):
        kept, group = set(chosen.mask.ids_keep[row].tolist()), set(ids[row].tolist())
        assert len(kept) == keep and kept <= group
        assert {t for t in range(16) if chosen.mask.hidden[row, t] == 0} == kept
        scored = {t for t in range(16) if chosen.scored_BL[row, t] == 1}
        assert scored == set(range(16)) - (kept if groups == 1 else group)
    assert set(chosen.scored_BL.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(("groups", "keep"), [(4, 4), (2, 4), (1, 4)])
def test_a_group_mask_restores_every_token(groups: int, keep: int) -> None:
    size = 16 // groups
    ids = random_groups(3, 16, groups)[:, :size]
    tokens = torch.randn(3, 16, 2)
    stored = take_tokens(tokens, ids)
    chosen = mask_group(ids, torch.rand(3, size), keep, 16)
    restored = restore_tokens(take_tokens(stored, chosen.take_BK), torch.full((2,), 7.0), chosen.mask.ids_restore)
    hidden = chosen.mask.hidden.unsqueeze(-1)
    assert torch.equal(restored, tokens * (1 - hidden) + 7.0 * hidden)
    assert chosen.mask.ids_restore.sort(dim=1).values.tolist() == [list(range(16))] * 3


def test_a_group_that_is_kept_whole_keeps_its_order() -> None:
    ids = random_groups(3, 16, 4)[:, 4:8]
    first, second = (mask_group(ids, torch.rand(3, 4), 4, 16) for _ in range(2))
    assert torch.equal(first.mask.ids_keep, ids) and first.take_BK.tolist() == [[0, 1, 2, 3]] * 3
    assert torch.equal(first.mask.ids_restore, second.mask.ids_restore)


def test_pooled_masks_are_drawn_afresh() -> None:
    ids, noise = random_groups(1, 16, 2)[:, :8], torch.rand(2, 1, 8)
    kept = [mask_group(ids, each, 4, 16).mask.ids_keep for each in noise]
    assert [row.tolist() for row in kept] == [ids.gather(1, each.argsort(dim=1)[:, :4]).tolist() for each in noise]
    assert not torch.equal(kept[0], kept[1])


def test_more_tokens_than_the_group_has_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^keeping 5 tokens needs a group of as many, this one has 4; raise mask.ratio$"
    ):
        mask_group(torch.arange(4).expand(1, 4), torch.rand(1, 4), 5, 16)


# --- block-wise masks and distance ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "block"), [(14, 2), (8, 2), (9, 3), (7, 2)])
def test_block_wise_masks_hide_and_keep_whole_squares(side: int, block: int) -> None:
    """With MAE's exact count; at most one square of an image is split, where the count is no multiple of it."""
    noise = torch.rand(20, side * side)
    mask = random_mask(block_noise(noise, block), 0.75)
    assert mask.ids_keep.shape == (20, int(side * side * 0.25))
    for hidden in mask.hidden.reshape(20, side, side):
        squares = [
            hidden[y : y + block, x : x + block] for y in range(0, side, block) for x in range(0, side, block)
        ]
        assert sum(square.unique().numel() > 1 for square in squares) <= 1


def test_block_wise_noise_of_block_1_is_maes() -> None:
    noise = torch.rand(3, 16)
    assert block_noise(noise, 1) is noise


def test_every_square_is_as_likely_to_be_kept() -> None:
    kept = 1 - random_mask(block_noise(torch.rand(2000, 36), 2), 0.75).hidden
    assert (kept.mean(dim=0) - 0.25).abs().max() < 0.04


def test_distance_is_that_to_the_nearest_visible_token() -> None:
    ids = torch.tensor([[0, 15], [5, 6]])
    found = distance_to_visible(ids, 16)
    for row in range(2):
        for token in range(16):
            y, x = divmod(token, 4)
            want = min(math.hypot(y - k // 4, x - k % 4) for k in ids[row].tolist())
            assert found[row, token].item() == pytest.approx(want)


def test_far_tokens_weigh_more_and_an_image_weighs_as_before() -> None:
    mask = random_mask(torch.rand(5, 64), 0.75)
    distance = distance_to_visible(mask.ids_keep, 64)
    weights = weigh_by_distance(mask.hidden, distance, 2.0, 1.0)
    torch.testing.assert_close(weights.sum(dim=1), torch.full((5,), 48.0))
    for row in range(5):
        own = distance[row] ** 2 * mask.hidden[row]
        torch.testing.assert_close(weights[row], own * 48 / own.sum())
    assert torch.equal(weigh_by_distance(mask.hidden, distance, 0.0, 1.0), mask.hidden)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 12), (0.5, 24), (1.0, 48)])
def test_the_curriculum_counts_the_nearest_tokens_first(share: float, count: int) -> None:
    mask = random_mask(torch.rand(5, 64), 0.75)
    distance = distance_to_visible(mask.ids_keep, 64)
    weights = weigh_by_distance(mask.hidden, distance, 0.0, share)
    torch.testing.assert_close(weights.sum(dim=1), torch.full((5,), 48.0))
    for row in range(5):
        counted = weights[row] > 0
        assert int(counted.sum()) == count and not (counted & (mask.hidden[row] == 0)).any()
        left_out = (mask.hidden[row] == 1) & ~counted
        assert count == 48 or distance[row][counted].max() <= distance[row][left_out].min()
