"""Masked image modelling: blocks that learn, a decoder, and a loss on hidden tokens. The model takes what it learns
from as a `MaskedBatch`, made from images (live training) or from features (cached training).

Shapes: B batch, C channels, H and W pixels, L all tokens, G tokens of a group, K kept tokens, D width, T values of a
target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.decoder import Decoder
from models.masking import Mask, mask_group, random_mask, take_tokens
from models.targets import normalize_images, patchify, pixel_target
from models.vit import Encoder


@dataclass(frozen=True)
class MaskedBatch:
    """What a step learns from: the visible tokens at the cut, their mask, and the target of all tokens."""

    visible_BKD: Tensor
    mask: Mask
    scored_BL: Tensor
    """float32, 1 for tokens that count in the loss."""
    target_BLT: Tensor


class MaskedModel(nn.Module):
    """An encoder frozen before block `cut`, and the decoder that trains what lies behind."""

    def __init__(self, encoder: Encoder, decoder: Decoder, cut: int, target_kind: str) -> None:
        super().__init__()
        self.encoder, self.decoder, self.cut, self.target_kind = encoder, decoder, cut, target_kind
        encoder.freeze(cut)

    def forward(self, batch: MaskedBatch) -> Tensor:
        """The mean squared error over scored tokens."""
        latent_BKD = self.encoder.norm(self.encoder.run(batch.visible_BKD, self.cut, self.encoder.depth))
        prediction_BLT = self.predict(latent_BKD, batch.mask)
        return masked_loss(prediction_BLT, batch.target_BLT, batch.scored_BL)

    def predict(self, latent_BKD: Tensor, mask: Mask) -> Tensor:
        """The decoder's output for every token: features (B, L, D), or pixels (B, L, P) read from them."""
        features_BLD = self.decoder(latent_BKD, mask.ids_restore)
        return self.decoder.pixel_head(features_BLD) if self.target_kind == "pixels" else features_BLD

    def from_images(self, images_BCHW: Tensor, noise_BL: Tensor, ratio: float) -> MaskedBatch:
        """Masked before the first block: uint8 images, of which frozen blocks see the visible tokens only.

        The target is pixels; features of hidden tokens do not exist on this path.
        """
        assert self.target_kind == "pixels", "a feature target needs the frozen blocks' output for every token"
        mask = random_mask(noise_BL, ratio)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cut == 0):
            tokens_BLD = self.encoder.embed(normalize_images(images_BCHW))
            visible_BKD = self.encoder.run(take_tokens(tokens_BLD, mask.ids_keep), 0, self.cut)
        pixels_BLP = patchify(images_BCHW, images_BCHW.shape[-1] // round(self.encoder.num_tokens**0.5))
        return MaskedBatch(visible_BKD, mask, mask.hidden, pixel_target(pixels_BLP))

    def from_features(
        self, features_BGD: Tensor, ids_BG: Tensor, noise_BG: Tensor, keep: int, target_BLT: Tensor
    ) -> MaskedBatch:
        """Masked after the frozen blocks: features of one token group, `ids` their raster positions."""
        chosen = mask_group(ids_BG, noise_BG, keep, target_BLT.shape[1])
        return MaskedBatch(take_tokens(features_BGD, chosen.take_BK), chosen.mask, chosen.scored_BL, target_BLT)

    @torch.no_grad()
    def frozen_features(self, images_BCHW: Tensor, ids_BL: Tensor, groups: int) -> Tensor:
        """(B, L, D): what a cache at this cut holds of uint8 images, in stored order `ids`, before it is rounded."""
        tokens_BLD = take_tokens(self.encoder.embed(normalize_images(images_BCHW)), ids_BL)
        return self.encoder.run_groups(tokens_BLD, groups, 0, self.cut)


def masked_loss(prediction_BLT: Tensor, target_BLT: Tensor, scored_BL: Tensor) -> Tensor:
    """Mean over scored tokens of a token's mean squared error, in float32."""
    error_BL = (prediction_BLT.float() - target_BLT.float()).square().mean(dim=-1)
    return (error_BL * scored_BL).sum() / scored_BL.sum()


def raster_order(stored_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    """Tokens in stored order put back where they belong in the image."""
    return take_tokens(stored_BLD, ids_BL.argsort(dim=1))
