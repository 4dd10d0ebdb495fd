"""Masked image modelling: blocks that learn, heads that reconstruct, and a loss on hidden tokens. The model takes what
it learns from as a `MaskedBatch`, made from images (live training) or from features (cached training).

Shapes: B batch, C channels, H and W pixels, L all tokens, G tokens of a group, K kept tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.batch import MaskedBatch, raster_order
from models.config import IMAGE_TARGETS, HeadSpec
from models.learner import Learner
from models.masking import keep_lowest, mask_group, take_tokens
from models.multiscale import Head
from models.targets import Targets, feature_target, image_target, normalize_images
from models.vit import Encoder, use_attention


class MaskedModel(Learner):
    """An encoder frozen before block `cut`, and the heads that train what lies behind, in the order of their blocks.

    Features enter at block `entry`, the cut unless blocks before it freeze in place: those run without gradient.
    """

    def __init__(self, encoder: Encoder, heads: Sequence[Head], cut: int, entry: int | None = None) -> None:
        super().__init__()
        self.encoder, self.cut, self.entry = encoder, cut, cut if entry is None else entry
        self.heads = nn.ModuleDict({f"block{head.spec.block}": head for head in heads})
        encoder.freeze(cut)

    def forward(self, batch: MaskedBatch) -> Tensor:
        """(H,): the loss of every head."""
        latents = self.encode(batch.visible_BKD)
        return torch.stack([head(latents[head.spec.block], batch) for head in self.each_head])

    def encode(self, visible_BKD: Tensor) -> dict[int, Tensor]:
        """The visible tokens after every block that a head reads, those behind the last block normalised."""
        found, block = {}, self.cut
        for spec in self.specs:
            visible_BKD = self.encoder.run(visible_BKD, block, spec.block)
            found[spec.block], block = visible_BKD, spec.block
        return found | {self.encoder.depth: self.encoder.norm(visible_BKD)}

    @property
    def each_head(self) -> list[Head]:
        return [head for head in self.heads.values() if isinstance(head, Head)]

    @property
    def specs(self) -> tuple[HeadSpec, ...]:
        return tuple(head.spec for head in self.each_head)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """What the entries of a loss are called."""
        return tuple(spec.name for spec in self.specs)

    def loss_weights(self, progress: float) -> tuple[float, ...]:
        """How much each entry of a loss weighs when `progress` (0..1) of the run is done."""
        return tuple(spec.weight_at(progress) for spec in self.specs)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder.vit, "decoder": self.heads}

    def set_attention(self, kind: str, device: torch.device | str) -> None:
        """Choose the attention kernel of every block and decoder for a device."""
        use_attention(self, kind, device)

    def from_images(self, images_BCHW: Tensor, noise_BL: Tensor, keep: int) -> MaskedBatch:
        """Masked before the first block: uint8 images, of which frozen blocks see the visible tokens only.

        Targets are made of the image; features of hidden tokens do not exist on this path.
        """
        mask = keep_lowest(noise_BL, keep)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cut == 0):
            tokens_BLD = self.encoder.embed(normalize_images(images_BCHW))
            visible_BKD = self.encoder.run(take_tokens(tokens_BLD, mask.ids_keep), 0, self.cut)
        return MaskedBatch(visible_BKD, mask, mask.hidden, self.image_targets(images_BCHW))

    def from_features(
        self, features_BGD: Tensor, ids_BG: Tensor, noise_BG: Tensor, keep: int, targets: Targets
    ) -> MaskedBatch:
        """Masked after the frozen blocks: features of one token group, `ids` their raster positions."""
        chosen = mask_group(ids_BG, noise_BG, keep, self.encoder.num_tokens)
        with torch.no_grad():
            visible_BKD = self.encoder.run(take_tokens(features_BGD, chosen.take_BK), self.entry, self.cut)
        return MaskedBatch(visible_BKD, chosen.mask, chosen.scored_BL, targets)

    def image_targets(self, images_BCHW: Tensor) -> Targets:
        """What the heads ask of uint8 images."""
        patch = images_BCHW.shape[-1] // round(self.encoder.num_tokens**0.5)
        keys = {head.target for head in self.each_head if head.spec.target in IMAGE_TARGETS}
        return {key: image_target(images_BCHW, *key, patch) for key in sorted(keys)}

    def feature_targets(self, stored_BLD: Tensor, ids_BL: Tensor) -> Targets:
        """What the heads ask of the cut's features, given of all tokens in stored order."""
        if ("features", 1.0) not in {head.target for head in self.each_head}:
            return {}
        return {("features", 1.0): feature_target(raster_order(stored_BLD, ids_BL))}

    @torch.no_grad()
    def frozen_features(self, images_BCHW: Tensor, ids_BL: Tensor, groups: int) -> Tensor:
        """(B, L, D): what a cache at `entry` holds of uint8 images, in stored order `ids`, before it is rounded."""
        tokens_BLD = take_tokens(self.encoder.embed(normalize_images(images_BCHW)), ids_BL)
        return self.encoder.run_groups(tokens_BLD, groups, 0, self.entry)
