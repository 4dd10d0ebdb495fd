"""Where a training step's inputs come from: images cut live, cached features, or features computed live as a cache
would hold them. A source's `load` runs in the loader's threads and is a pure function of (segment, step); its `mask`
runs in the training step and makes what the masked model reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cache.buffers import FRESH, Buffers
from cache.order import Blocks, batch_rows, view_and_group
from cache.rank import ALONE, Rank
from cache.store import CacheReader, FeatureBatch
from models.batch import MaskedBatch, decode_ids
from models.config import IMAGE_TARGETS, PATCHES, HeadSpec, MaskConfig, ModelConfig, learning_heads
from models.masking import block_noise, distance_to_visible, kept_tokens, weigh_by_distance
from models.mim import MaskedModel
from models.spec import derive_seed
from models.targets import TargetKey
from stages.config import DataConfig
from stages.images import ImageList
from stages.replay import Reading, reading
from stages.segment import Segment
from stages.views import Crop, apply_crop, image_batch, token_orders


@dataclass(frozen=True)
class Inputs:
    """One step's inputs: uint8 images (B, 3, S, S) or cached features (B, tokens, D), and the noise that masks them.

    `progress` is the share of the run that is done, `step` the optimiser step, both counted from stage 0. `ids_BL` are
    the raster positions of the features' tokens in stored order, `images` the uint8 pixels behind features whose target
    needs them, or `pixels_BLP`, the patches that a cache stores, where heads predict such patches alone, `group` the
    token group that the step trains on, `decode_noise` what chooses the hidden tokens that are decoded, None for all,
    `prefix` the class and register tokens beside cached features, of the groups read.
    `teachers` are the teacher's features (B, L, D), raster order, that were read from caches, by its block.
    """

    values: Tensor
    noise: Tensor
    progress: float = 0.0
    ids_BL: Tensor | None = None
    images: Tensor | None = None
    pixels_BLP: Tensor | None = None
    group: int = 0
    decode_noise: Tensor | None = None
    prefix_BSD: Tensor | None = None
    step: int = 0
    teachers: Mapping[int, Tensor] = field(default_factory=dict)
    read: Reading | None = None
    """What was read, of all ranks."""

    def to(self, device: torch.device | str) -> Inputs:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list[Inputs]:
        """Equal micro-batches, in order."""

        def part_of(part: int) -> Callable[[Tensor], Tensor]:
            return lambda tensor: tensor.chunk(parts)[part]

        return [self._map(part_of(part)) for part in range(parts)]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        changed: dict[str, Any] = {k: change(value) for k, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, teachers={block: change(value) for block, value in self.teachers.items()}, **changed)


class StepInputs(Protocol):
    """What the training loop must know of a step's inputs, whatever is learned."""

    @property
    def progress(self) -> float: ...

    @property
    def step(self) -> int: ...

    @property
    def read(self) -> Reading | None: ...

    def to(self, device: torch.device | str) -> Any: ...

    def split(self, parts: int) -> Sequence[Any]: ...


class Source(Protocol):
    """What feeds the training loop: `load` makes a step's inputs, `mask` what the model learns from of each part."""

    def load(self, segment: Segment, step: int, into: Buffers = FRESH) -> StepInputs: ...

    def mask(self, model: Any, inputs: Any) -> Any: ...


@dataclass(frozen=True)
class Sampling:
    """What every source must know of the run: seed, batch size, the settings of data, model and mask, the heads."""

    seed: int
    batch_size: int
    data: DataConfig
    model: ModelConfig
    mask: MaskConfig
    heads: tuple[HeadSpec, ...]
    share: float = 1.0
    """Share of the hidden tokens that is decoded."""
    total_steps: int = 1
    averages: bool = False
    """Whether the teacher is an average of the student, which goes on from all features of a view."""
    blocks: Blocks | None = None
    """How rows are shuffled by shards; None shuffles all rows of an epoch."""
    rank: Rank = ALONE
    """Which rows of every batch are loaded here; `batch_size` is that of all ranks."""
    parts: int = 1
    """Micro-batches of a step, each of which all ranks share."""

    def keep(self, progress: float) -> int:
        """Visible tokens of an image when `progress` of the run is done."""
        return kept_tokens(self.model.num_tokens, self.mask.ratio_at(progress))

    @property
    def group_tokens(self) -> int:
        return self.model.num_tokens // self.mask.groups

    def targets(self, segment: Segment) -> set[str]:
        """Kinds of target that the heads which learn in a segment ask for."""
        return {head.target for head in learning_heads(self.heads, segment.cut, segment.entry)}

    def image_targets(self, segment: Segment) -> set[TargetKey]:
        """Those of them that images give, with their scales."""
        heads = learning_heads(self.heads, segment.cut, segment.entry)
        return {head.key for head in heads if head.target in IMAGE_TARGETS}

    def reads_all(self, segment: Segment) -> bool:
        """Whether a cached step reads all groups of a view, not only its own."""
        targets = self.targets(segment)
        return "features" in targets or (self.averages and "teacher" in targets)

    def rows(self, segment: Segment, step: int, num_samples: int) -> np.ndarray:
        """This rank's samples of a step: the same whatever the arm. CacheError when the ranks do not divide it."""
        return self.own(self.all_rows(segment, step, num_samples))

    def all_rows(self, segment: Segment, step: int, num_samples: int) -> np.ndarray:
        """The samples of all ranks."""
        place = step % segment.steps_per_epoch
        return batch_rows(self.seed, segment.epoch(step), place, num_samples, self.batch_size, self.blocks)

    def own(self, rows: np.ndarray) -> np.ndarray:
        """Of the samples of all ranks this rank's."""
        return rows[self.rank.places(self.batch_size, self.parts)]

    def slot(self, segment: Segment, step: int, views: int) -> tuple[int, int]:
        """(view, group) of a cache that a step trains on."""
        return view_and_group(segment.epoch(step), views, self.mask.groups)

    def views(
        self, images: ImageList, rows: np.ndarray, view: int, into: Buffers = FRESH
    ) -> tuple[Tensor, Tensor]:
        """uint8 images (B, 3, S, S) of one view, and the order (B, L) in which their tokens are stored."""
        size = self.model.image_size
        pixels_BCHW = into.take("images", (len(rows), 3, size, size), torch.uint8)
        image_batch(images, rows, view, self.data, size, self.seed, into=pixels_BCHW.numpy())
        keys = [images.keys[row] for row in rows]
        ids = token_orders(self.seed, view, keys, self.model.num_tokens, self.mask.groups, self.mask.block)
        return pixels_BCHW, torch.from_numpy(ids)

    def inputs(self, segment: Segment, step: int, values: Tensor, tokens: int) -> Inputs:
        """A step's inputs, its random numbers drawn: the noise over `tokens` tokens that masks them, and more."""
        place, every = segment.first_step + step, self.model.num_tokens
        noise = self._uniform("mask", place, every if self.mask.block > 1 else tokens)
        decode_noise = self._uniform("decode", place, every) if self.share < 1 else None
        noise = block_noise(noise, self.mask.block)
        return Inputs(values, noise, place / self.total_steps, decode_noise=decode_noise, step=place)

    def _uniform(self, what: str, place: int, tokens: int) -> Tensor:
        """(B, tokens): drawn for the batch of all ranks, of which this rank's rows are taken."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, what, place))
        drawn = torch.rand(self.batch_size, tokens, generator=generator)
        # numpy picks the rows: indexing a tensor would wake torch's pool of threads in the loader's, which spins.
        return torch.from_numpy(drawn.numpy()[self.rank.places(self.batch_size, self.parts)])

    def scored(self, batch: MaskedBatch, inputs: Inputs, seen: int) -> MaskedBatch:
        """The batch with what counts in its loss: a share of the hidden tokens, weighed by how far they are.

        seen: tokens of an image that do not count, since visible ones are among them or have attended to them.
        """
        mask, tokens = self.mask, self.model.num_tokens
        if inputs.decode_noise is not None:
            count = max(1, round((tokens - seen) * self.share))
            ids = decode_ids(batch.scored_BL, inputs.decode_noise, count)
            batch = replace(batch, ids_decode_BM=ids, ids_beside_BC=None)
        if mask.distance_power or mask.distance_start < 1:
            share = mask.distance_start + (1 - mask.distance_start) * inputs.progress
            distance = distance_to_visible(batch.mask.ids_keep, tokens)
            scored = batch.scored_BL
            if batch.ids_decode_BM is not None:  # only what is decoded can be weighed
                scored = torch.zeros_like(scored).scatter(1, batch.ids_decode_BM, 1.0)
            batch = replace(batch, scored_BL=weigh_by_distance(scored, distance, mask.distance_power, share))
        return batch


@dataclass(frozen=True)
class LiveImages:
    """Ordinary masked training: a fresh view of every image in every epoch, masked before the first block."""

    images: ImageList
    sampling: Sampling

    def load(self, segment: Segment, step: int, into: Buffers = FRESH) -> Inputs:
        every = self.sampling.all_rows(segment, step, len(self.images))
        view = segment.epoch(step)
        images, _ = self.sampling.views(self.images, self.sampling.own(every), view, into)
        inputs = self.sampling.inputs(segment, step, images, self.sampling.model.num_tokens)
        return replace(inputs, read=reading(every, view, 0, len(self.images)))

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch:
        keep = self.sampling.keep(inputs.progress)
        return self.sampling.scored(model.from_images(inputs.values, inputs.noise, keep), inputs, seen=keep)


@dataclass(frozen=True)
class CachedFeatures:
    """Cached training: a step reads its rows' features of one view, and only one group unless the target needs all.

    Image targets are made of the pixels that the cache stores, or, where it stores none, of `images`, cut again by the
    stored parameters of the very crop that the features come from. `teachers` are the caches of a frozen teacher's
    blocks, with the same rows and views.
    """

    cache: CacheReader
    sampling: Sampling
    images: ImageList | None = None
    teachers: Mapping[int, CacheReader] = field(default_factory=dict)

    def load(self, segment: Segment, step: int, into: Buffers = FRESH) -> Inputs:
        how = self.sampling
        every, spec = how.all_rows(segment, step, len(self.cache)), self.cache.manifest.spec
        rows = how.own(every)
        view, group = how.slot(segment, step, self.cache.manifest.views)
        batch = self.cache.read(rows, view, None if how.reads_all(segment) else group, into)
        asked = how.image_targets(segment)
        patches = batch.pixels_BLP if asked == {PATCHES} else None
        images = self._images(batch, rows, view, into) if asked and patches is None else None
        inputs = how.inputs(segment, step, batch.features_BLD, how.group_tokens)
        teachers = {
            block: cache.read(rows, view, into=into.part(f"teacher {block}")).features_BLD
            for block, cache in self.teachers.items()
        }
        inputs = replace(inputs, ids_BL=batch.ids_BL, images=images, pixels_BLP=patches, group=group, teachers=teachers)
        read = reading(every, spec.view_at(view), group, len(self.cache), spec.first_view)
        return replace(inputs, prefix_BSD=batch.prefix_BSD, read=read)

    def _images(self, batch: FeatureBatch, rows: np.ndarray, view: int, into: Buffers) -> Tensor:
        """uint8 (B, 3, S, S); numpy's copies, since torch would wake its pool of threads in the loader's."""
        size = self.sampling.model.image_size
        images_BCHW = into.take("images", (len(rows), 3, size, size), torch.uint8)
        if batch.pixels_BLP is not None:
            patch = self.sampling.model.patch_size
            side = size // patch
            grid = batch.pixels_BLP.numpy().reshape(-1, side, side, patch, patch, 3)
            places = images_BCHW.numpy().reshape(-1, 3, side, patch, side, patch)
            np.copyto(places, grid.transpose(0, 5, 1, 3, 2, 4))
            return images_BCHW
        assert self.images is not None, "a cache without pixels is read beside the images it was made of"
        images, crops = self.images.several(rows), self.cache.crops(rows, view)
        for place, image, crop in zip(images_BCHW.numpy(), images, crops, strict=True):
            place[:] = apply_crop(image, Crop(*crop), size).transpose(2, 0, 1)
        return images_BCHW

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch:
        return mask_features(model, self.sampling, inputs)


@dataclass(frozen=True)
class LiveFeatures:
    """What `CachedFeatures` reads, computed on the spot by the frozen blocks and never rounded to the cache's codec: of
    all groups where a target is made of them, otherwise of the step's group alone.

    Feeds stages that go without a cache, the freeze arm where the target is made of features, and the comparison of
    cached with live training.
    """

    images: ImageList
    sampling: Sampling
    views: int
    first_view: int = 0
    """The first of the views that a ring holds."""

    def load(self, segment: Segment, step: int, into: Buffers = FRESH) -> Inputs:
        every = self.sampling.all_rows(segment, step, len(self.images))
        rows = self.sampling.own(every)
        view, group = self.sampling.slot(segment, step, self.views)
        view = self.first_view + (view - self.first_view) % self.views  # that lies in the slot
        images, ids = self.sampling.views(self.images, rows, view, into)
        size = self.sampling.group_tokens
        if not self.sampling.reads_all(segment):
            ids = ids[:, group * size : (group + 1) * size]
        read = reading(every, view, group, len(self.images), self.first_view)
        inputs = self.sampling.inputs(segment, step, images, size)
        return replace(inputs, ids_BL=ids, images=images, group=group, read=read)

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch:
        assert inputs.ids_BL is not None
        groups = inputs.ids_BL.shape[1] // self.sampling.group_tokens
        features, prefix = model.frozen_features(inputs.values, inputs.ids_BL, groups)
        return mask_features(model, self.sampling, replace(inputs, values=features, prefix_BSD=prefix))


def mask_features(model: MaskedModel, sampling: Sampling, inputs: Inputs) -> MaskedBatch:
    """Mask features in stored order: those of all groups (B, L, D), or of the step's group alone (B, G, D)."""
    features, ids, noise, prefix = inputs.values, inputs.ids_BL, inputs.noise, inputs.prefix_BSD
    assert ids is not None
    size = sampling.group_tokens
    own_prefix = prefix
    if prefix is not None and features.shape[1] > size:
        own_prefix = prefix.unflatten(1, (sampling.mask.groups, -1))[:, inputs.group]
    targets: dict[TargetKey, Tensor] = {} if inputs.pixels_BLP is None else {PATCHES: inputs.pixels_BLP}
    if inputs.images is not None:
        targets |= model.image_targets(inputs.images)
    if features.shape[1] == sampling.model.num_tokens:
        targets |= model.feature_targets(features, ids)
    if inputs.teachers:
        targets |= model.teacher_targets(inputs.teachers)
    elif sampling.averages:
        targets |= model.seen_in_features(features, ids, own_prefix)
    elif inputs.images is not None:
        targets |= model.seen_in_images(inputs.images)
    if features.shape[1] > size:
        own = slice(inputs.group * size, (inputs.group + 1) * size)
        features, ids = features[:, own], ids[:, own]
    if noise.shape[1] > size:  # block-wise noise is drawn over the whole grid
        noise = noise.gather(1, ids)
    keep = sampling.keep(inputs.progress)
    batch = model.from_features(features, ids, noise, keep, targets, own_prefix)
    return sampling.scored(batch, inputs, seen=keep if size == sampling.model.num_tokens else size)
