"""Which tokens the encoder sees. `hidden` is 1 where a token is hidden and 0 where it is kept, here and everywhere. Two
ways to draw a mask: MAE's, over all tokens, and one that stays inside a token group that ran through frozen blocks
alone.

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
    ids_shuffle = noise_BL.argsort(dim=1)
    return _mask_of(ids_shuffle, int(noise_BL.shape[1] * (1 - ratio)))


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


def restore_tokens(tokens_BKD: Tensor, mask_token_D: Tensor, ids_restore_BL: Tensor) -> Tensor:
    """All tokens in raster order, (B, L, D): the kept ones where they belong, the mask token everywhere else."""
    batch, kept, width = tokens_BKD.shape
    filler = mask_token_D.to(tokens_BKD.dtype).expand(batch, ids_restore_BL.shape[1] - kept, width)
    return take_tokens(torch.cat([tokens_BKD, filler], dim=1), ids_restore_BL)


def _mask_of(ids_shuffle_BL: Tensor, keep: int) -> Mask:
    ids_restore_BL = ids_shuffle_BL.argsort(dim=1)
    return Mask(ids_shuffle_BL[:, :keep], ids_restore_BL, (ids_restore_BL >= keep).float())
