"""Supervised fine-tuning: what a step reads (views with labels, or the cached output of frozen blocks), how fast every
layer learns, and how well the heads classify. The loop is that of every stage, `train`.

Shapes: B batch, L patch tokens, R prefix tokens, D width, K classes, H and W pixels or tokens, S side of a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.buffers import FRESH, Buffers
from cache.order import Blocks, batch_rows
from cache.rank import ALONE, Rank
from cache.store import CacheReader
from models.classifier import Classifier, Head, LabelledBatch
from models.config import IMAGENET_MEAN, IMAGENET_STD, RGB
from models.targets import normalize_images
from stages.augment import Mixer, augmenter, smoothed
from stages.config import DataConfig, FinetuneConfig, TrainConfig
from stages.device import autocast
from stages.images import ImageList, spread_by_class
from stages.optim import PREFIX, layer_of, learning_rate
from stages.replay import Reading
from stages.segment import Segment
from stages.views import centre_batch, image_batch

MANY = 5
"""top-5 is told where there are more classes than this."""


# --- what a step reads ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lessons:
    """What both sources must know: seed and settings, and the classes."""

    seed: int
    config: FinetuneConfig
    data: DataConfig
    image_size: int
    classes: int
    blocks: Blocks | None = None
    """How rows are shuffled by shards; None shuffles all rows of an epoch."""
    rank: Rank = ALONE
    """Which rows of every batch are loaded here; `config.batch_size` is that of all ranks."""
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    """The encoder's: images are normalised before they are mixed."""

    def rows(self, segment: Segment, step: int, num_samples: int) -> np.ndarray:
        """This rank's samples of a step. CacheError when the ranks do not divide it.

        Mixing pairs the first image of a batch with the last, the second with the last but one: a rank takes whole
        pairs, so it mixes what one rank would mix, and by the same shares, which are drawn once for a step.
        """
        place = step % segment.steps_per_epoch
        batch = self.config.batch_size
        rows = batch_rows(self.seed, segment.epoch(step), place, num_samples, batch, self.blocks)
        return rows[self.places]

    @property
    def places(self) -> np.ndarray:
        """The places of the batch of all ranks that this rank takes."""
        config = self.config
        take = self.rank.paired_places if config.mixes else self.rank.places
        return take(config.batch_size, config.accumulate)

    def mix(self, values_BCHW: Tensor, labels_B: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed values, how much of each sample they are (B, B), and how much of each class (B, K)."""
        mixed_BCHW, samples_BB = Mixer(self.config, self.seed)(values_BCHW, step)
        classes_BK = smoothed(labels_B, self.classes, self.config.label_smoothing)
        return mixed_BCHW, samples_BB, samples_BB @ classes_BK


@dataclass(frozen=True)
class Labelled:
    """One step's inputs: uint8 images (B, 3, S, S), or features of the patches at the cut (B, L, D), with labels."""

    values: Tensor
    labels_B: Tensor
    step: int
    lessons: Lessons
    progress: float = 0.0
    prefix_BRD: Tensor | None = None
    """The class and register tokens at the cut, where the model has them and values are features."""
    read: Reading | None = None
    """Fine-tuning keeps no record of its order."""

    def to(self, device: torch.device | str) -> Labelled:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)

    def split(self, parts: int) -> list[Mixed]:
        """Equal micro-batches of the mixed batch, in order: mixing pairs images of the whole batch and comes first."""
        mixed = self.mixed()
        prefixes = [None] * parts if mixed.prefix_BRD is None else mixed.prefix_BRD.chunk(parts)
        return list(map(Mixed, mixed.values.chunk(parts), mixed.shares_BK.chunk(parts), prefixes))

    def mixed(self) -> Mixed:
        """Normalised images or features, mixed, with how much of each class they are.

        Features are mixed on the grid of their tokens. The prefix stands nowhere on it: it is blended as labels are.
        """
        how = self.lessons
        if self.values.ndim == 4:
            images_BCHW = normalize_images(self.values, how.mean, how.std)
            values, _, shares_BK = how.mix(images_BCHW, self.labels_B, self.step)
            return Mixed(values, shares_BK)
        batch, tokens, width = self.values.shape
        side = round(tokens**0.5)
        grid_BDHW = self.values.transpose(1, 2).reshape(batch, width, side, side)
        mixed_BDHW, samples_BB, shares_BK = how.mix(grid_BDHW, self.labels_B, self.step)
        prefix = None if self.prefix_BRD is None else torch.einsum("bc,crd->brd", samples_BB, self.prefix_BRD)
        return Mixed(mixed_BDHW.flatten(2).transpose(1, 2), shares_BK, prefix)


@dataclass(frozen=True)
class Mixed:
    """A micro-batch: normalised images (B, 3, S, S) or features (B, L, D), and the shares of classes."""

    values: Tensor
    shares_BK: Tensor
    prefix_BRD: Tensor | None = None


@dataclass(frozen=True)
class LiveViews:
    """A fresh view of every image in every epoch, augmented."""

    images: ImageList
    lessons: Lessons

    def load(self, segment: Segment, step: int, into: Buffers = FRESH) -> Labelled:
        rows = self.lessons.rows(segment, step, len(self.images))
        pixels = self.view(rows, segment.epoch(step), into)
        return Labelled(pixels, torch.from_numpy(self.images.labels[rows]), step, self.lessons)

    def view(self, rows: np.ndarray, view: int, into: Buffers = FRESH) -> Tensor:
        """uint8 (B, 3, S, S)."""
        how = self.lessons
        augment = augmenter(how.config.rand_augment, how.seed)
        pixels_BCHW = into.take("images", (len(rows), 3, how.image_size, how.image_size), torch.uint8)
        image_batch(self.images, rows, view, how.data, how.image_size, how.seed, augment, pixels_BCHW.numpy())
        return pixels_BCHW

    def mask(self, model: Classifier, inputs: Mixed) -> LabelledBatch:
        assert model.cut == 0, "behind frozen blocks features are mixed, not images"
        return LabelledBatch(model.at_cut(inputs.values), inputs.shares_BK)


@dataclass(frozen=True)
class CachedPrefix:
    """The output of the frozen blocks, one of the cached views in each epoch."""

    cache: CacheReader
    lessons: Lessons

    def load(self, segment: Segment, step: int, into: Buffers = FRESH) -> Labelled:
        rows = self.lessons.rows(segment, step, len(self.cache))
        batch = self.cache.read(rows, segment.epoch(step) % self.cache.manifest.views, into=into)
        return Labelled(batch.features_BLD, batch.labels_B, step, self.lessons, prefix_BRD=batch.prefix_BSD)

    def mask(self, model: Classifier, inputs: Mixed) -> LabelledBatch:
        return LabelledBatch(model.encoder.with_prefix(inputs.values, inputs.prefix_BRD), inputs.shares_BK)


def live_prefix(
    views: LiveViews, model: Classifier, segment: Segment, step: int, kept: int, precision: str
) -> Labelled:
    """What `CachedPrefix` loads from a cache of `kept` views, computed on the spot and never rounded to its codec."""
    rows = views.lessons.rows(segment, step, len(views.images))
    device = next(model.parameters()).device
    images = views.view(rows, segment.epoch(step) % kept).to(device)
    with torch.no_grad(), autocast(device, precision):
        tokens = model.at_cut(model.encoder.normalized(images)).float()
    prefix, patches = tokens.split([model.encoder.num_prefix, model.encoder.num_tokens], dim=1)
    labels = torch.from_numpy(views.images.labels[rows]).to(device)
    return Labelled(patches, labels, step, views.lessons, prefix_BRD=prefix if model.encoder.num_prefix else None)


# --- how fast every layer learns --------------------------------------------------------------------------------------


def layer_decay_groups(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """What learns, in groups by layer: a layer's rate is `scale` = layer_decay^(L + 1 - layer) of the heads'.

    Layer 0 is the patch embedding, layers 1..L are the blocks, L + 1 the heads; biases, norms and tokens do not decay.
    Source: `param_groups_lrd` in facebookresearch/mae, util/lr_decay.py, after BEiT. A frozen parameter is in no group.
    """
    behind = model.encoder.depth + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = behind if name.startswith("heads.") else max(0, layer_of(name))
            decays = parameter.ndim > 1 and not name.endswith(PREFIX)
            group = groups.setdefault(
                (layer, decays),
                {
                    "params": [],
                    "weight_decay": weight_decay if decays else 0.0,
                    "layer": layer,
                    "scale": layer_decay ** (behind - layer),
                },
            )
            group["params"].append(parameter)
    return list(groups.values())


@dataclass(frozen=True)
class FinetuneRates:
    """The learning rate of every group at every step: warm-up and cosine, times the group's scale."""

    config: FinetuneConfig
    total_steps: int
    steps_per_epoch: int

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rates of a step; returns that of the heads."""
        config = self.config
        warmup = min(round(config.warmup_epochs * self.steps_per_epoch), self.total_steps - 1)
        rate = learning_rate(step, self.total_steps, warmup, config.lr, config.min_lr, "cosine")
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        return rate


def loop_settings(config: FinetuneConfig, train: TrainConfig) -> TrainConfig:
    """The loop's settings: the machine's as for every stage, the rest fine-tuning's own."""
    return replace(
        train,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        max_steps=config.max_steps,
        lr=config.lr,
        min_lr=config.min_lr,
        lr_schedule="cosine",
        warmup_epochs=config.warmup_epochs,
        weight_decay=config.weight_decay,
        beta2=config.beta2,
        clip=config.clip,
    )


# --- how well the heads classify --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadScore:
    """Accuracy of a head on the evaluation images; top5 is None with 5 classes or fewer."""

    block: int
    top1: float
    top5: float | None


@dataclass(frozen=True)
class FinetuneResult:
    """The score of every head, in the order of their blocks, and how many images were scored."""

    heads: tuple[HeadScore, ...]
    images: int

    @property
    def best(self) -> HeadScore:
        """The head with the highest top-1; of equals the one behind most blocks."""
        return max(reversed(self.heads), key=lambda head: head.top1)

    def point(self) -> dict[str, float | None]:
        """As a point of the curve keeps it: `top1` and `top5` are those of the head behind the last block."""
        *others, last = self.heads
        found: dict[str, float | None] = {"top1": last.top1, "top5": last.top5, "images": self.images}
        return found | {f"top1_block{head.block}": head.top1 for head in others}


@torch.inference_mode()
def classify(
    model: Classifier, images: ImageList, limit: int, batch: int, image_size: int, precision: str
) -> FinetuneResult:
    """Score every head on centre views of images that all have labels; `limit` of them, evenly spread, 0 for all."""
    images = images.only(spread_by_class(images.labels, limit))
    learning, device = model.training, next(model.parameters()).device
    model.eval()
    places = [_places(model, views, labels, precision, device) for views, labels in _centre(images, batch, image_size)]
    model.train(learning)
    by_head = zip(model.in_order, zip(*places, strict=True), strict=True)
    return FinetuneResult(tuple(_head_score(head, torch.cat(found)) for head, found in by_head), len(images))


def _head_score(head: Head, places_N: Tensor) -> HeadScore:
    top1, top5 = (float((places_N < count).double().mean()) for count in (1, MANY))
    return HeadScore(head.block, top1, top5 if head.linear.out_features > MANY else None)


def _centre(images: ImageList, batch: int, image_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(images), batch):
        rows = np.arange(start, min(start + batch, len(images)))
        yield torch.from_numpy(centre_batch(images, rows, image_size)), torch.from_numpy(images.labels[rows])


def _places(model: Classifier, views: Tensor, labels: Tensor, precision: str, device: torch.device) -> list[Tensor]:
    """For every head and image, the place of the true class among the five likeliest; 5 where it is none of them."""
    with autocast(device, precision):
        tokens = model.at_cut(model.encoder.normalized(views.to(device)))
        logits = [found.float().cpu() for found in model.logits(tokens)]
    places = []
    for of_head in logits:
        hits = of_head.topk(min(MANY, of_head.shape[1])).indices == labels.unsqueeze(1)
        places.append(torch.where(hits.any(dim=1), hits.int().argmax(dim=1), MANY))
    return places
