"""Masked image modelling: blocks that learn, heads that reconstruct, and a loss on hidden tokens. The model takes what
it learns from as a `MaskedBatch`, made from images (live training) or from features (cached training).

Shapes: B batch, C channels, H and W pixels, L all tokens, G tokens of a group, K kept tokens, R prefix tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.batch import MaskedBatch, raster_order
from models.config import IMAGE_TARGETS, HeadSpec
from models.learner import Learner, Part
from models.masking import keep_lowest, mask_group, take_tokens
from models.multiscale import Head
from models.targets import Targets, feature_target, image_target, target_std
from models.teacher import EmaTeacher, Teacher
from models.vit import Encoder, use_attention

COLLAPSED = 0.1
"""Standard deviation of a layer-normalised target over tokens below which it is of no use; data2vec's own bound."""


class MaskedModel(Learner):
    """An encoder frozen before block `cut`, and the heads that train what lies behind, in the order of their blocks.

    Features enter at block `entry`, the cut unless blocks before it freeze in place: those run without gradient.
    """

    teacher: Teacher | None = None
    """Gives some heads their targets, where these are not read from a cache."""

    def __init__(self, encoder: Encoder, heads: Sequence[Head], cut: int, entry: int | None = None) -> None:
        super().__init__()
        self.encoder, self.cut, self.entry = encoder, cut, cut if entry is None else entry
        self.heads = nn.ModuleDict({f"block{head.spec.block}": head for head in heads})
        assert len(self.heads) == len(heads), "two heads behind one block would have one name"
        encoder.freeze(cut)

    def forward(self, batch: MaskedBatch) -> Tensor:
        """(H,): the loss of every head."""
        latents = self.encode(batch.visible_BKD)
        return torch.stack([head(latents[head.spec.block], batch) for head in self.each_head])

    def encode(self, visible_BKD: Tensor) -> dict[int, Tensor]:
        """The visible patch tokens after every block that a head reads, those behind the last block normalised."""
        found, block = {}, self.cut
        for spec in self.specs:
            visible_BKD = self.encoder.run(visible_BKD, block, spec.block)
            found[spec.block], block = self.encoder.patches(visible_BKD), spec.block
        return found | {self.encoder.depth: self.encoder.norm(self.encoder.patches(visible_BKD))}

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
    def idles(self) -> bool:
        """Also where a decoder that could give pixels is asked for features, before the layer that makes pixels."""
        waits = (spec.matching and spec.target not in IMAGE_TARGETS for spec in self.specs)
        return super().idles or any(waits)

    @property
    def parts(self) -> Mapping[str, Part]:
        average = {"teacher": self.teacher} if isinstance(self.teacher, EmaTeacher) else {}
        return {"encoder": self.encoder.vit, "decoder": self.heads, **average}

    def after_step(self, step: int) -> None:
        """A teacher that is an average follows."""
        if isinstance(self.teacher, EmaTeacher):
            self.teacher.follow(self.encoder)

    @property
    def taught(self) -> dict[int, str]:
        """The blocks of the teacher that heads predict, ascending, and what their targets are called."""
        return dict(sorted({(spec.teacher, spec.key[0]) for spec in self.specs if spec.target == "teacher"}))

    @property
    def watch_names(self) -> tuple[str, ...]:
        """`target_std_teacher12`: falls towards 0 when the teacher gives all tokens the same features."""
        return tuple(f"target_std_{name}" for name in self.taught.values())

    def watch(self, batch: MaskedBatch) -> Tensor:
        """(W,): how much each teacher target varies from token to token."""
        stds = [target_std(batch.targets[name, 1.0]) for name in self.taught.values()]
        return torch.stack(stds) if stds else batch.visible_BKD.new_empty(0)

    def set_attention(self, kind: str, device: torch.device | str, visible: int) -> None:
        """Choose the attention kernel of every block, which sees `visible` tokens, and every decoder for a device."""
        use_attention(self.encoder, kind, device, visible)
        use_attention(self.heads, kind, device, self.encoder.num_tokens)

    def warning(self, watched: Mapping[str, float]) -> str:
        """Names the teacher's blocks whose features no longer tell tokens apart."""
        flat = [name for name in self.taught.values() if watched[f"target_std_{name}"] < COLLAPSED]
        return f"collapsed: {', '.join(flat)}" if flat else ""

    def from_images(self, images_BCHW: Tensor, noise_BL: Tensor, keep: int) -> MaskedBatch:
        """Masked before the first block: uint8 images, of which frozen blocks see the visible tokens only.

        Targets are made of the image; features of hidden tokens do not exist on this path.
        """
        mask = keep_lowest(noise_BL, keep)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cut == 0):
            tokens_BLD = self.encoder.embed(self.encoder.normalized(images_BCHW))
            prefix_BRD = self.encoder.prefix(len(images_BCHW))
            visible_BKD = self.encoder.with_prefix(take_tokens(tokens_BLD, mask.ids_keep), prefix_BRD)
            visible_BKD = self.encoder.run(visible_BKD, 0, self.cut)
        targets = {**self.image_targets(images_BCHW), **self.seen_in_images(images_BCHW)}
        return MaskedBatch.of(visible_BKD, mask, mask.hidden, targets, seen=keep)

    def from_features(
        self,
        features_BGD: Tensor,
        ids_BG: Tensor,
        noise_BG: Tensor,
        keep: int,
        targets: Targets,
        prefix_BRD: Tensor | None = None,
    ) -> MaskedBatch:
        """Masked after the frozen blocks: features of one token group, `ids` their raster positions.

        `prefix` is what the frozen blocks made of the group's class and register tokens, where the model has them.
        """
        chosen = mask_group(ids_BG, noise_BG, keep, self.encoder.num_tokens)
        visible_BKD = self.encoder.with_prefix(take_tokens(features_BGD, chosen.take_BK), prefix_BRD)
        with torch.no_grad():
            visible_BKD = self.encoder.run(visible_BKD, self.entry, self.cut)
        size = ids_BG.shape[1]
        seen = keep if size == self.encoder.num_tokens else size
        return MaskedBatch.of(visible_BKD, chosen.mask, chosen.scored_BL, targets, seen)

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

    def seen_in_images(self, images_BCHW: Tensor) -> Targets:
        """What the heads ask of the teacher, which sees all tokens of uint8 images."""
        return self.teacher_targets(self.teacher.of_images(images_BCHW, list(self.taught))) if self.teacher else {}

    def seen_in_features(self, stored_BLD: Tensor, ids_BL: Tensor, prefix_BRD: Tensor | None = None) -> Targets:
        """The same of a teacher that goes on from the features at `entry`, given of all tokens in stored order."""
        if self.teacher is None:
            return {}
        tokens_BLD = self.encoder.with_prefix(raster_order(stored_BLD, ids_BL), prefix_BRD)
        return self.teacher_targets(self.teacher.of_tokens(tokens_BLD, self.entry, list(self.taught)))

    def teacher_targets(self, features: Mapping[int, Tensor]) -> Targets:
        """Targets of the teacher's features (B, L, D), raster order, by its blocks."""
        return {(name, 1.0): feature_target(features[block]) for block, name in self.taught.items()}

    @torch.no_grad()
    def frozen_features(self, images_BCHW: Tensor, ids_BL: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """What a cache at `entry` holds of uint8 images before it is rounded: features (B, L, D) in stored order
        `ids`, and the prefix of every group, (B, groups * R, D)."""
        tokens_BLD = take_tokens(self.encoder.embed(self.encoder.normalized(images_BCHW)), ids_BL)
        prefix_BSD = self.encoder.prefix(len(images_BCHW)).repeat(1, groups, 1)
        return self.encoder.run_groups(tokens_BLD, prefix_BSD, groups, 0, self.entry)
