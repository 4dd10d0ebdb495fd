"""Which tokens the encoder sees. `hidden` is 1 where a token is hidden and 0 where it is kept, here and everywhere. Two
ways to draw a mask: MAE's, over all tokens, and one that stays inside a token group that ran through frozen blocks
alone. Both follow the order of a noise, which can be made block-wise first. Hidden tokens can be weighed by how far
they are from a visible one.

Shapes: B batch, L all tokens, G tokens of a group, K kept tokens, D width. Ids are raster positions, int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """A mask in MAE's terms."""

    ids_keep: Tensor
    """(B, K): the kept tokens, in shuffled order."""
    ids_hide: Tensor
    """(B, L - K): the hidden ones, behind them."""
    ids_restore: Tensor
    """(B, L): where each raster token stands in the shuffled order, kept tokens first."""
    hidden: Tensor
    """(B, L) float32: 0 keep, 1 hidden."""


@dataclass(frozen=True)
class GroupMask:
    """A mask drawn inside a token group."""

    take_BK: Tensor
    """Index within the group of each kept token."""
    mask: Mask
    scored_BL: Tensor
    """float32, 1 for tokens that count in the loss: the hidden ones that the kept tokens have not attended to."""


def random_mask(noise_BL: Tensor, ratio: float) -> Mask:
    """MAE's random masking: ascending argsort of the noise, the first int(L * (1 - ratio)) tokens are kept.

    Source: `random_masking` in facebookresearch/mae, models_mae.py.
    """
    return keep_lowest(noise_BL, kept_tokens(noise_BL.shape[1], ratio))


def kept_tokens(num_tokens: int, ratio: float) -> int:
    """How many tokens stay visible, by MAE's rounding."""
    return int(num_tokens * (1 - ratio))


def keep_lowest(noise_BL: Tensor, keep: int) -> Mask:
    """`random_mask` by the number of tokens that are kept."""
    return _mask_of(noise_BL.argsort(dim=1), keep)


def block_noise(noise_BL: Tensor, block: int) -> Tensor:
    """Noise whose ascending order takes squares of `block` x `block` tokens one after the other.

    Masks drawn from it hide and keep whole squares, but for one that the number of kept tokens may split: SimMIM's
    block-wise masking (arXiv 2111.09886), with MAE's exact number of visible tokens. Returns the noise itself for 1.
    """
    if block == 1:
        return noise_BL
    side = round(noise_BL.shape[1] ** 0.5)
    place = torch.arange(side, device=noise_BL.device) // block
    squares = place[-1] + 1
    square_L = (place[:, None] * squares + place).flatten()
    first = torch.stack([(square_L == square).nonzero()[0, 0] for square in range(int(squares) ** 2)])
    rank_BS = inverse(noise_BL[:, first].argsort(dim=1))
    return rank_BS[:, square_L] + noise_BL


def distance_to_visible(ids_keep_BK: Tensor, num_tokens: int) -> Tensor:
    """(B, L) float32: every token's Euclidean distance on the grid to the nearest kept one, in tokens."""
    side = round(num_tokens**0.5)
    place = torch.arange(side, dtype=torch.float32, device=ids_keep_BK.device)
    grid_L2 = torch.stack(torch.meshgrid(place, place, indexing="ij"), dim=-1).reshape(-1, 2)
    between_LL = (grid_L2[:, None] - grid_L2).square().sum(dim=-1).sqrt()
    return between_LL[ids_keep_BK].amin(dim=1)


def weigh_by_distance(scored_BL: Tensor, distance_BL: Tensor, power: float, share: float) -> Tensor:
    """Scored tokens weighed by distance^power, and only the nearest `share` of them, at least one, counted at all.

    The weights of each image sum to the number of its scored tokens, so that a batch's loss stays the mean of its
    micro-batches' losses.
    """
    number = scored_BL.sum(dim=1, keepdim=True)
    weight_BL = torch.where(scored_BL > 0, distance_BL**power, 0.0)
    if share < 1:
        far_BL = torch.where(scored_BL > 0, distance_BL, torch.inf)
        nearest_first = inverse(far_BL.argsort(dim=1, stable=True))
        weight_BL = torch.where(nearest_first < (number * share).ceil().clamp(min=1), weight_BL, 0.0)
    return weight_BL * (number / weight_BL.sum(dim=1, keepdim=True))


def group_ids(noise_BL: Tensor, groups: int) -> Tensor:
    """A random permutation (B, L) of the tokens, to be read as `groups` groups of L / groups, one after the other."""
    assert noise_BL.shape[1] % groups == 0
    return noise_BL.argsort(dim=1)


def mask_group(ids_BG: Tensor, noise_BG: Tensor, keep: int, num_tokens: int) -> GroupMask:
    """Keep `keep` tokens of a group; all other tokens of the image are hidden.

    Where the group is the whole image (full mode) every hidden token is scored, although the kept ones have attended to
    it: full mode leaks. Otherwise only tokens outside the group are scored, which no kept token has seen. Raises
    ValueError when the group has fewer than `keep` tokens.
    """
    size = ids_BG.shape[1]
    if keep > size:
        raise ValueError(f"keeping {keep} tokens needs a group of as many, this one has {size}; raise mask.ratio")
    order = torch.arange(size, device=ids_BG.device).expand_as(ids_BG) if keep == size else noise_BG.argsort(dim=1)
    take_BK = order[:, :keep]
    outside_BL = torch.ones(len(ids_BG), num_tokens, device=ids_BG.device).scatter(1, ids_BG, 0.0)
    others = outside_BL.argsort(dim=1, descending=True, stable=True)[:, : num_tokens - size]
    mask = _mask_of(torch.cat([ids_BG.gather(1, order), others], dim=1), keep)
    return GroupMask(take_BK, mask, mask.hidden if size == num_tokens else outside_BL)


def take_tokens(tokens_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """The tokens at `ids`, (B, K, D)."""
    return tokens_BLD.gather(1, ids_BK.unsqueeze(-1).expand(-1, -1, tokens_BLD.shape[-1]))


def take_rows(values_BLT: Tensor, ids_BM: Tensor) -> Tensor:
    """The same of values that no gradient flows through, and of any type: (B, M, T). Row by row, which on a CPU takes a
    twentieth of what `gather` does."""
    batch, tokens, values = values_BLT.shape
    rows = ids_BM + torch.arange(0, batch * tokens, tokens, device=ids_BM.device).unsqueeze(-1)
    return values_BLT.reshape(-1, values).index_select(0, rows.flatten()).reshape(*ids_BM.shape, values)


def restore_tokens(tokens_BKD: Tensor, mask_token_D: Tensor, ids_restore_BL: Tensor) -> Tensor:
    """All tokens in raster order, (B, L, D): the kept ones where they belong, the mask token everywhere else."""
    batch, kept, width = tokens_BKD.shape
    filler = mask_token_D.to(tokens_BKD.dtype).expand(batch, ids_restore_BL.shape[1] - kept, width)
    return take_tokens(torch.cat([tokens_BKD, filler], dim=1), ids_restore_BL)


def inverse(order_BL: Tensor) -> Tensor:
    """(B, L) int64: where each token stands in a permutation of all tokens; what argsort gives, without sorting."""
    places_BL = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    return torch.empty_like(order_BL).scatter_(1, order_BL, places_BL)


def _mask_of(ids_shuffle_BL: Tensor, keep: int) -> Mask:
    ids_restore_BL = inverse(ids_shuffle_BL)
    hidden_BL = (ids_restore_BL >= keep).float()
    return Mask(ids_shuffle_BL[:, :keep], ids_shuffle_BL[:, keep:], ids_restore_BL, hidden_BL)
