"""The features that probes read, computed part by part on whatever workers there are, in the very batches in which one
process computes them. Beside `scores`, which then needs no forward of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.config import ModelConfig
from models.vit import ALL, Encoder, build_encoder
from stages.carried import frozen_state
from stages.images import ImageList
from stages.scores import Compute, Features, features

BATCHES = 8
"""Batches of a task."""

Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@dataclass(frozen=True)
class ProbeJob:
    """All that a worker needs to compute features: small, and picklable; the images of a part come with its task."""

    weights: str
    """model.safetensors of the encoder."""
    digest: str
    """Hash of all its weights."""
    model: ModelConfig
    batch: int
    image_size: int
    device: str
    precision: str
    tokens: bool
    threads: int


@lru_cache(maxsize=2)
def whole_encoder(weights: str, digest: str, model: ModelConfig, device: str) -> Encoder:
    """An encoder, built once per worker. Raises WeightsUnseen."""
    encoder = build_encoder(model, seed=0)
    encoder.vit.load_state_dict(frozen_state(weights, ALL, digest))
    encoder.set_attention(device)
    return encoder.to(device).eval()


def part_features(task: tuple[ProbeJob, int, ImageList]) -> tuple[int, np.ndarray, Tensor | None]:
    """(number of the part, (N, D) pooled features, (N, R + L, D) tokens where they are asked for)."""
    job, number, images = task
    torch.set_num_threads(job.threads)
    encoder = whole_encoder(job.weights, job.digest, job.model, job.device)
    found = features(encoder, images, job.batch, job.image_size, job.device, job.precision, job.tokens)
    return number, found.pooled_ND, found.tokens_NLD


def spread_features(run: Run, weights: str, digest: str, model: ModelConfig, threads: int) -> Compute:
    """`scores.features` on workers: `run` maps `part_features` over parts anywhere."""

    def compute(
        encoder: Encoder, images: ImageList, batch: int, image_size: int, device: str, precision: str, tokens: bool
    ) -> Features:
        job = ProbeJob(weights, digest, model, batch, image_size, device, precision, tokens, threads)
        size, listed = BATCHES * batch, replace(images, skipped=())
        starts = range(0, len(images), size)
        parts = ((job, start, listed.only(range(start, min(start + size, len(images))))) for start in starts)
        found = sorted(run(part_features, parts), key=lambda part: part[0])
        pooled = np.concatenate([part[1] for part in found])
        return Features(pooled, images.labels, torch.cat([part[2] for part in found]) if tokens else None)

    return compute
