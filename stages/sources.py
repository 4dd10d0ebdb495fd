"""Where a training step's inputs come from: images cut live, cached features, or features computed live as a cache
would hold them. A source's `load` runs in the loader's threads and is a pure function of (segment, step); its `mask`
runs in the training step and makes what the masked model reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cache.order import batch_rows, view_and_group
from cache.store import CacheReader
from models.config import MaskConfig, ModelConfig
from models.mim import MaskedBatch, MaskedModel, raster_order
from models.spec import derive_seed
from models.targets import feature_target, patchify, pixel_target
from stages.config import DataConfig
from stages.images import ImageList
from stages.segment import Segment
from stages.views import image_batch, token_orders


@dataclass(frozen=True)
class Inputs:
    """One step's inputs: uint8 images (B, 3, S, S) or cached features (B, tokens, D), and the noise that masks them.

    `ids_BL` are the raster positions of the features' tokens in stored order, `pixels_BLP` the uint8 pixels of every
    token in raster order, `group` the token group that the step trains on.
    """

    values: Tensor
    noise: Tensor
    ids_BL: Tensor | None = None
    pixels_BLP: Tensor | None = None
    group: int = 0

    def to(self, device: torch.device | str) -> Inputs:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list[Inputs]:
        """Equal micro-batches, in order."""

        def part_of(part: int) -> Callable[[Tensor], Tensor]:
            return lambda tensor: tensor.chunk(parts)[part]

        return [self._map(part_of(part)) for part in range(parts)]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        ids, pixels = (None if tensor is None else change(tensor) for tensor in (self.ids_BL, self.pixels_BLP))
        return Inputs(change(self.values), change(self.noise), ids, pixels, self.group)


class Source(Protocol):
    """What feeds the training loop."""

    def load(self, segment: Segment, step: int) -> Inputs: ...

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch: ...


@dataclass(frozen=True)
class Sampling:
    """What every source must know of the run: seed, batch size and the settings of data, model and mask."""

    seed: int
    batch_size: int
    data: DataConfig
    model: ModelConfig
    mask: MaskConfig
    target_kind: str

    @property
    def keep(self) -> int:
        """Visible tokens of an image, by MAE's rounding."""
        return int(self.model.num_tokens * (1 - self.mask.ratio))

    @property
    def group_tokens(self) -> int:
        return self.model.num_tokens // self.mask.groups

    def rows(self, segment: Segment, step: int, num_samples: int) -> np.ndarray:
        """The samples of a step: the same whatever the arm."""
        epoch = segment.epoch(step)
        return batch_rows(self.seed, epoch, step % segment.steps_per_epoch, num_samples, self.batch_size)

    def slot(self, segment: Segment, step: int, views: int) -> tuple[int, int]:
        """(view, group) of a cache that a step trains on."""
        return view_and_group(segment.epoch(step), views, self.mask.groups)

    def views(self, images: ImageList, rows: np.ndarray, view: int) -> tuple[Tensor, Tensor]:
        """uint8 images (B, 3, S, S) of one view, and the order (B, L) in which their tokens are stored."""
        pixels, _ = image_batch(images, rows, view, self.data, self.model.image_size, self.seed)
        keys = [images.keys[row] for row in rows]
        ids = token_orders(self.seed, view, keys, self.model.num_tokens, self.mask.groups)
        return torch.from_numpy(pixels), torch.from_numpy(ids)

    def noise(self, segment: Segment, step: int, tokens: int) -> Tensor:
        """Uniform noise (B, tokens) that draws a step's masks."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "mask", segment.first_step + step))
        return torch.rand(self.batch_size, tokens, generator=generator)


@dataclass(frozen=True)
class LiveImages:
    """Ordinary masked training: a fresh view of every image in every epoch, masked before the first block."""

    images: ImageList
    sampling: Sampling

    def load(self, segment: Segment, step: int) -> Inputs:
        rows = self.sampling.rows(segment, step, len(self.images))
        images, _ = self.sampling.views(self.images, rows, segment.epoch(step))
        return Inputs(images, self.sampling.noise(segment, step, self.sampling.model.num_tokens))

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch:
        return model.from_images(inputs.values, inputs.noise, self.sampling.mask.ratio)


@dataclass(frozen=True)
class CachedFeatures:
    """Cached training: a step reads its rows' features of one view, and only one group unless the target needs all."""

    cache: CacheReader
    sampling: Sampling

    def load(self, segment: Segment, step: int) -> Inputs:
        rows = self.sampling.rows(segment, step, len(self.cache))
        view, group = self.sampling.slot(segment, step, self.cache.manifest.views)
        batch = self.cache.read(rows, view, None if self.sampling.target_kind == "features" else group)
        noise = self.sampling.noise(segment, step, self.sampling.group_tokens)
        return Inputs(batch.features_BLD, noise, batch.ids_BL, batch.pixels_BLP, group)

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch:
        return mask_features(model, self.sampling, inputs)


@dataclass(frozen=True)
class LiveFeatures:
    """What `CachedFeatures` reads, computed on the spot by the frozen blocks and never rounded to the cache's codec.

    Feeds the freeze arm where the target is made of features, and the comparison of cached with live training.
    """

    images: ImageList
    sampling: Sampling
    views: int

    def load(self, segment: Segment, step: int) -> Inputs:
        rows = self.sampling.rows(segment, step, len(self.images))
        view, group = self.sampling.slot(segment, step, self.views)
        images, ids = self.sampling.views(self.images, rows, view)
        return Inputs(images, self.sampling.noise(segment, step, self.sampling.group_tokens), ids, group=group)

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch:
        assert inputs.ids_BL is not None
        features = model.frozen_features(inputs.values, inputs.ids_BL, self.sampling.mask.groups)
        pixels = patchify(inputs.values, self.sampling.model.patch_size)
        return mask_features(model, self.sampling, replace(inputs, values=features, pixels_BLP=pixels))


def mask_features(model: MaskedModel, sampling: Sampling, inputs: Inputs) -> MaskedBatch:
    """Mask features in stored order: those of all groups (B, L, D), or of the step's group alone (B, G, D)."""
    features, ids = inputs.values, inputs.ids_BL
    assert ids is not None
    if sampling.target_kind == "features":
        target = feature_target(raster_order(features, ids))
    else:
        assert inputs.pixels_BLP is not None, "a cache for pixel targets stores the pixels"
        target = pixel_target(inputs.pixels_BLP)
    size = sampling.group_tokens
    if features.shape[1] > size:
        own = slice(inputs.group * size, (inputs.group + 1) * size)
        features, ids = features[:, own], ids[:, own]
    return model.from_features(features, ids, inputs.noise, sampling.keep, target)
