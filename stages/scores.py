"""What `permafrost probe` asks of an encoder: every probe of `eval.probes`, on features that are computed once, each
with the setting that won. The probes of training itself are in `probe`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from models.vit import Encoder
from stages.config import EvalConfig
from stages.errors import DataError
from stages.images import Data, ImageList, spread_by_class
from stages.probe import collapse, encoded, knn_top1, labelled, linear_top1
from stages.sweep import ATTENTIVE, LINEAR, Recipe, sweep

FEWEST = 3
"""Training images that a probe with a sweep needs: two to learn from and one to choose on."""


@dataclass(frozen=True)
class Score:
    """A probe's top-1 accuracy on the evaluation images, and the setting with which it was reached."""

    probe: str
    top1: float
    setting: dict[str, float]
    held_back: dict[str, float] = field(default_factory=dict)
    """top-1 on the held-back training images by learning rate; empty where nothing was chosen."""


@dataclass(frozen=True)
class Scores:
    """All that was asked for of one encoder. Without labels there are no scores, only the monitors."""

    scores: tuple[Score, ...]
    feature_std: float
    effective_rank: float
    images: int
    train_images: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "train_images": self.train_images,
            "feature_std": self.feature_std,
            "effective_rank": self.effective_rank,
            "probes": {
                one.probe: {"top1": one.top1, "setting": one.setting}
                | ({"held_back_top1": one.held_back} if one.held_back else {})
                for one in self.scores
            },
        }


@dataclass(frozen=True)
class Features:
    """What an encoder makes of some images: the mean over patch tokens and, where a probe reads them, all tokens."""

    pooled_ND: np.ndarray
    labels_N: np.ndarray
    tokens_NLD: Tensor | None
    """float16, on the CPU."""


Compute = Callable[[Encoder, ImageList, int, int, str, str, bool], Features]
"""`features`, or the same on other computers."""


def score(
    encoder: Encoder,
    data: Data,
    config: EvalConfig,
    image_size: int,
    device: str,
    precision: str,
    seed: int,
    compute: Compute | None = None,
) -> Scores:
    """Score an encoder with every probe that is asked for, on the images that have labels. Raises DataError. `compute`
    stands in for `features`."""
    train, val = labelled(data.train), labelled(data.val)
    train = train.only(spread_by_class(train.labels, config.train_limit))
    scored = len(train) > 0 and len(val) > 0
    watched = val if scored else data.val
    watched = watched.only(spread_by_class(watched.labels, config.val_limit))
    tokens = scored and ATTENTIVE in config.probes
    if tokens:
        refuse_what_does_not_fit(encoder, len(train) + len(watched))
    how = (config.batch_size, image_size, device, precision)
    compute = compute or features
    watched_x = compute(encoder, watched, *how, tokens)
    std, rank = collapse(watched_x.pooled_ND)
    if not scored:
        return Scores((), std, rank, len(watched), 0)
    if len(train) < FEWEST and set(config.probes) & {*LINEAR, ATTENTIVE}:
        raise DataError(
            f"{len(train)} labelled training images are too few for a probe with a sweep, which needs {FEWEST}; "
            "raise data.limit or eval.train_limit, or set eval.probes=[knn,logistic]"
        )
    train_x = compute(encoder, train, *how, tokens)
    found = tuple(
        one_score(probe, encoder, train_x, watched_x, config, device, seed) for probe in dict.fromkeys(config.probes)
    )
    return Scores(found, std, rank, len(watched), len(train))


def one_score(
    probe: str, encoder: Encoder, train: Features, val: Features, config: EvalConfig, device: str, seed: int
) -> Score:
    """One probe on features that are there."""
    train_x, train_y, val_x, val_y = train.pooled_ND, train.labels_N, val.pooled_ND, val.labels_N
    if probe == "knn":
        return Score(probe, knn_top1(train_x, train_y, val_x, val_y, config.knn_k), {"k": config.knn_k})
    if probe == "logistic":
        return Score(probe, linear_top1(train_x, train_y, val_x, val_y), {"C": 1.0})
    linear = probe in LINEAR
    attention = encoder.vit.blocks[0].get_submodule("attn")
    recipe = Recipe(
        kind=probe,
        rates={"sgd": config.probe_rates, "lars": config.lars_rates}.get(probe, config.attentive_rates),
        epochs=config.probe_epochs if linear else config.attentive_epochs,
        batch=config.probe_batch,
        heads=int(attention.num_heads),  # type: ignore[arg-type]
        seed=seed,
        device=device,
    )
    x, y = (torch.from_numpy(side.pooled_ND) if linear else side.tokens_NLD for side in (train, val))
    assert x is not None and y is not None, "an attentive probe comes with tokens"
    found = sweep(recipe, x, train_y, y, val_y, config.probe_hold_back)
    return Score(probe, found.top1, {"rate": found.rate}, {f"{rate:g}": top1 for rate, top1 in found.held_back.items()})


def features(
    encoder: Encoder, images: ImageList, batch: int, image_size: int, device: str, precision: str, tokens: bool
) -> Features:
    """One pass over some images; the tokens are kept only where they are asked for."""
    pooled, kept = [], []
    for part in encoded(encoder, images, batch, image_size, device, precision):
        pooled.append(encoder.patches(part).mean(dim=1).cpu())
        if tokens:
            kept.append(part.half().cpu())
    return Features(torch.cat(pooled).numpy(), images.labels, torch.cat(kept) if tokens else None)


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has free, or what a container's limit leaves of it."""
    from distributed.system import memory_limit  # not at the top: distributed takes as long to import as all the rest

    return min(psutil.virtual_memory().available, memory_limit() - psutil.Process().memory_info().rss)


def refuse_what_does_not_fit(encoder: Encoder, images: int) -> None:
    """Raise DataError when the tokens of so many images, kept as float16, do not fit the free memory."""
    needed = 2 * images * (encoder.num_prefix + encoder.num_tokens) * encoder.width
    free = free_memory()
    if 2 * needed > free:  # torch.cat holds both the parts and the whole for a moment
        raise DataError(
            f"eval.probes=attentive keeps {needed / 1e9:.1f} GB of tokens of {images} images and needs twice that, "
            f"{free / 1e9:.1f} GB of memory are free; lower eval.train_limit and eval.val_limit"
        )
