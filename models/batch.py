"""What a masked step learns from, however it was made, and the loss that scores it. Stands between the sources of
training and the heads.

Shapes: B batch, K visible tokens (and the prefix in front of them), L all tokens, M hidden tokens that are decoded, C
hidden ones that decoders see beside them, D width, T values of a target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.masking import Mask, inverse, take_rows, take_tokens
from models.targets import TargetKey, Targets, as_scored


@dataclass(frozen=True)
class MaskedBatch:
    """The visible tokens at the cut, their mask, and the targets of all tokens."""

    visible_BKD: Tensor
    """Behind the class and register tokens, where the model has them."""
    mask: Mask
    scored_BL: Tensor
    """float32, how much a token counts in the loss: 0 for visible ones and all that visible ones have attended to."""
    targets: Targets
    """(B, L, T), raster order; at scales above 1 T holds all finer places of a token, at scale 0.5 L is a quarter."""
    ids_decode_BM: Tensor | None = None
    """The hidden tokens that are predicted, all that are scored among them; None for every token, in raster order."""
    ids_beside_BC: Tensor | None = None
    """Hidden tokens that decoders see as such and nobody asks for; None for no others."""

    @classmethod
    def of(cls, visible_BKD: Tensor, mask: Mask, scored_BL: Tensor, targets: Targets, seen: int) -> MaskedBatch:
        """All hidden tokens are decoded but those among the `seen` first in shuffled order, which are not scored."""
        beside = seen - mask.ids_keep.shape[1]
        ids = mask.ids_hide
        return cls(visible_BKD, mask, scored_BL, targets, ids[:, beside:], ids[:, :beside] if beside else None)

    @property
    def whole(self) -> MaskedBatch:
        """The same, of which every token is predicted, in raster order."""
        return replace(self, ids_decode_BM=None, ids_beside_BC=None)

    def scored_at(self, key: TargetKey) -> tuple[Tensor, Tensor]:
        """(target, weights) of what a head of this target and scale is asked for: (B, S, T) and (B, S)."""
        target, scored, ids = self.targets[key], self.scored_BL, self.ids_decode_BM
        if key[1] < 1:
            scored = coarse(scored)
        elif ids is not None:
            target, scored = take_rows(target, ids), scored.gather(1, ids)
        return as_scored(target, key), scored


def coarse(scored_BL: Tensor) -> Tensor:
    """(B, L / 4): mean over 2x2 tokens, as LocalMIM's mask of its coarse scale (`recal_mask`)."""
    batch, tokens = scored_BL.shape
    side = round(tokens**0.5)
    return scored_BL.reshape(batch, side // 2, 2, side // 2, 2).mean(dim=(2, 4)).flatten(1)


def masked_loss(prediction_BLT: Tensor, target_BLT: Tensor, scored_BL: Tensor) -> Tensor:
    """Weighted mean over scored tokens of a token's mean squared error, in float32."""
    error_BL = (prediction_BLT.float() - target_BLT.float()).square().mean(dim=-1)
    return (error_BL * scored_BL).sum() / scored_BL.sum()


def raster_order(stored_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    """Tokens in stored order put back where they belong in the image."""
    return take_tokens(stored_BLD, inverse(ids_BL))


def decode_ids(scored_BL: Tensor, noise_BL: Tensor, count: int) -> Tensor:
    """(B, M): `count` random ones of the scored tokens of every image, by the lowest noise.

    Counting them here would make the host wait for a GPU.
    """
    return torch.where(scored_BL > 0, noise_BL, 2.0).argsort(dim=1)[:, :count]
