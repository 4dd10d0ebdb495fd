"""How good an encoder is: kNN and linear probe on mean-pooled features of held-out images, and two numbers that fall
when features collapse. Evaluation is never counted as training time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from models.vit import Encoder
from stages.config import EvalConfig
from stages.device import autocast, best_batch
from stages.images import Data, ImageList, spread_by_class
from stages.views import centre_batch

TEMPERATURE = 0.07
"""Of kNN's votes, as in DINO."""

SIMILARITIES = 2**24
"""Values that kNN holds at once, 64 MB in float32: 50,000 images with 1,281,167 would be 256 GB."""


@dataclass(frozen=True)
class ProbeResult:
    """Scores in 0..1, None where images have no labels, and monitors of collapse over the held-out features.

    `images` is how many were scored: the standard error of a score p is sqrt(p (1 - p) / images).
    """

    knn_top1: float | None
    linear_top1: float | None
    feature_std: float
    effective_rank: float
    images: int

    def point(self) -> dict[str, float | None]:
        """As a point of the curve keeps it."""
        return {
            "knn_top1": self.knn_top1,
            "linear_top1": self.linear_top1,
            "feature_std": self.feature_std,
            "effective_rank": self.effective_rank,
            "probe_images": self.images,
        }


def evaluate(
    encoder: Encoder, data: Data, config: EvalConfig, image_size: int, device: str, precision: str
) -> ProbeResult:
    """Score an encoder on the images that have labels; without any there are no scores, only the monitors."""
    train, val = labelled(data.train), labelled(data.val)
    scored = len(train) > 0 and len(val) > 0
    watched = val if scored else data.val
    watched = watched.only(spread_by_class(watched.labels, config.val_limit))
    watched_x = pooled_features(encoder, watched, config.batch_size, image_size, device, precision)
    std, rank = collapse(watched_x)
    if not scored:
        return ProbeResult(None, None, std, rank, len(watched))
    train = train.only(spread_by_class(train.labels, config.train_limit))
    train_x = pooled_features(encoder, train, config.batch_size, image_size, device, precision)
    return ProbeResult(
        knn_top1=knn_top1(train_x, train.labels, watched_x, watched.labels, config.knn_k),
        linear_top1=linear_top1(train_x, train.labels, watched_x, watched.labels),
        feature_std=std,
        effective_rank=rank,
        images=len(watched),
    )


def labelled(images: ImageList) -> ImageList:
    """The images that have a label."""
    return images.only(np.flatnonzero(images.labels >= 0))


def pooled_features(
    encoder: Encoder, images: ImageList, batch: int, image_size: int, device: str, precision: str
) -> np.ndarray:
    """(N, D) float32: centre views, all tokens visible, mean over patch tokens behind the last norm."""
    found = [
        encoder.patches(tokens).mean(dim=1)
        for tokens in encoded(encoder, images, batch, image_size, device, precision)
    ]
    return torch.cat(found).cpu().numpy()


@torch.inference_mode()
def encoded(
    encoder: Encoder, images: ImageList, batch: int, image_size: int, device: str, precision: str
) -> Iterator[Tensor]:
    """(B, R + L, D) float32, batch after batch: every token of the centre views behind the last norm, prefix first."""
    learning = encoder.training
    encoder.eval()
    batch = best_batch(device, encoder.num_tokens, encoder.width, batch)
    for start in range(0, len(images), batch):
        views = centre_batch(images, range(start, min(start + batch, len(images))), image_size)
        with autocast(device, precision):
            tokens = encoder.tokens(encoder.normalized(torch.from_numpy(views).to(device)))
            tokens = encoder.norm(encoder.run(tokens, 0, encoder.depth))
        yield tokens.float()
    encoder.train(learning)


def knn_top1(train_x: np.ndarray, train_y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray, k: int) -> float:
    """Cosine neighbours vote with weight exp(similarity / 0.07). Source: `eval_knn` in facebookresearch/dino."""
    train, val, k = _unit(train_x), _unit(val_x), min(k, len(train_y))
    classes, train_y = np.unique(train_y, return_inverse=True)  # labels may be any numbers, however large
    rows = max(1, SIMILARITIES // max(len(train_y), len(classes)))
    right = 0
    for start in range(0, len(val_y), rows):
        similarity = val[start : start + rows] @ train.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / TEMPERATURE)
        votes = np.zeros((len(similarity), len(classes)))
        np.add.at(votes, (np.arange(len(votes))[:, None], train_y[nearest]), weights)
        right += int((classes[votes.argmax(axis=1)] == val_y[start : start + rows]).sum())
    return right / len(val_y)


def linear_top1(train_x: np.ndarray, train_y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray) -> float:
    """Logistic regression on standardised features. With one class there is nothing to separate: its share."""
    if len(np.unique(train_y)) < 2:
        return float((val_y == train_y[0]).mean())
    scaler = StandardScaler().fit(train_x)
    probe = LogisticRegression(max_iter=2000).fit(scaler.transform(train_x), train_y)
    return float(probe.score(scaler.transform(val_x), val_y))


def collapse(features: np.ndarray) -> tuple[float, float]:
    """(mean standard deviation of a unit feature's channels, effective rank): both fall towards 0 and 1 in a collapse.

    Effective rank is exp of the entropy of the normalised singular values (Roy and Vetterli, 2007).
    """
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    shares = values / max(float(values.sum()), 1e-12)
    shares = shares[shares > 0]
    return float(_unit(features).std(axis=0).mean()), float(np.exp(-(shares * np.log(shares)).sum()))


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
