"""Run the frozen blocks once: images, or the cache of an earlier cut, become the cache of this cut. One task makes one
shard of one view, wherever it runs, and leaves a receipt; a build goes on at the first shard without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from cache import open_cache
from cache.errors import StaleCache
from cache.layout import Layout, Shard
from cache.loader import prefetch
from cache.size import check_space
from cache.zarr_writer import RowBlock, create_store, finish, missing_shards, write_rows
from models.config import ModelConfig
from models.masking import take_tokens
from models.targets import normalize_images, patchify
from models.vit import Encoder, build_encoder, frozen_hash
from stages.config import DataConfig
from stages.device import autocast
from stages.images import ImageList, open_data
from stages.views import image_batch, token_orders


@dataclass(frozen=True)
class EncodeJob:
    """All that a worker needs to make any shard of one cache; small, and picklable."""

    folder: str
    layout: Layout
    weights: str
    """model.safetensors of the stage whose blocks are frozen."""
    model: ModelConfig
    data: DataConfig
    index_folder: str
    parent: str | None
    """Folder of the cache that this one continues; None starts from images."""
    parent_cut: int
    batch: int
    device: str
    threads: int
    loader_threads: int


RunTasks = Callable[[Callable[[Any], Shard], Sequence[Any]], Iterator[Shard]]


def build(job: EncodeJob, images: ImageList, run: RunTasks) -> Iterator[tuple[int, int]]:
    """Build what is missing of a cache; yields (shards done, shards in all) after each. Raises CacheError.

    `run` maps `encode_shard` over tasks anywhere and yields as they are done. What it made so far stays when the caller stops.
    """
    folder = Path(job.folder)
    check_space(folder, job.layout)
    create_store(folder, job.layout, images.labels, images.keys)
    missing, total = missing_shards(folder, job.layout), len(job.layout.shards)
    for count, _ in enumerate(run(encode_shard, [(job, shard) for shard in missing]), start=1):
        yield total - len(missing) + count, total
    finish(folder, job.layout)


@lru_cache(maxsize=2)
def frozen_encoder(weights: str, weights_hash: str, cut: int, model: ModelConfig, device: str) -> Encoder:
    """The encoder that a cache is made with, built once per worker. Raises StaleCache when the file's weights differ."""
    encoder = build_encoder(model, seed=0)
    state = load_file(weights)
    found = frozen_hash(state, cut)
    if found != weights_hash:
        raise StaleCache(
            f"{weights} has weights={found[:8]}… up to cut {cut}, the cache wants weights={weights_hash[:8]}…; "
            "run `make explain`"
        )
    encoder.vit.load_state_dict(state)
    encoder.set_attention(device)
    return encoder.to(device).eval()


@lru_cache(maxsize=2)
def training_images(data: DataConfig, index_folder: str) -> ImageList:
    """The training images, indexed once per worker."""
    return open_data(data, Path(index_folder)).train


def encode_shard(task: tuple[EncodeJob, Shard]) -> Shard:
    """Compute and write one shard of one view: a pure function of its task, so it can run anywhere, and twice."""
    job, shard = task
    torch.set_num_threads(job.threads)
    spec = job.layout.spec
    encoder = frozen_encoder(job.weights, spec.weights, spec.cut, job.model, job.device)
    rows = np.arange(shard.first_row, shard.first_row + shard.rows)
    batches = [rows[start : start + job.batch] for start in range(0, len(rows), job.batch)]
    load = from_cache(job, shard.view) if job.parent else from_images(job, shard.view)
    blocks = []
    with prefetch(load, batches, job.loader_threads, 2) as loaded, torch.inference_mode():
        for inputs, block in loaded:
            with autocast(job.device, spec.dtype):
                features = frozen_forward(encoder, job, inputs.to(job.device), block)
            blocks.append(replace(block, features_NLD=features.float().cpu().numpy()))
    write_rows(Path(job.folder), job.layout, shard.view, shard.first_row, RowBlock.join(blocks))
    return shard


def frozen_forward(encoder: Encoder, job: EncodeJob, inputs: Tensor, block: RowBlock) -> Tensor:
    """The features at the cut, stored order, from images (B, 3, S, S) or from the parent's features (B, L, D)."""
    spec = job.layout.spec
    if job.parent:
        return encoder.run_groups(inputs, spec.groups, job.parent_cut, spec.cut)
    tokens = encoder.embed(normalize_images(inputs))
    if block.token_ids_NL is not None:
        tokens = take_tokens(tokens, torch.from_numpy(block.token_ids_NL).to(tokens.device))
    return encoder.run_groups(tokens, spec.groups, 0, spec.cut)


def from_images(job: EncodeJob, view: int) -> Callable[[np.ndarray], tuple[Tensor, RowBlock]]:
    """A function that cuts a view of some rows: images, and all that a shard holds of them but the features."""
    images, spec, size = training_images(job.data, job.index_folder), job.layout.spec, job.model.image_size

    def load(rows: np.ndarray) -> tuple[Tensor, RowBlock]:
        keys = tuple(images.keys[row] for row in rows)
        cut, crops = image_batch(images, rows, view, job.data, size, spec.seed)
        tensor = torch.from_numpy(cut)
        orders = token_orders(spec.seed, view, keys, spec.num_tokens, spec.groups) if spec.groups > 1 else None
        pixels = patchify(tensor, spec.patch_size).numpy() if spec.pixels else None
        return tensor, RowBlock(np.empty(0), crops, keys, orders, pixels)

    return load


def from_cache(job: EncodeJob, view: int) -> Callable[[np.ndarray], tuple[Tensor, RowBlock]]:
    """A function that reads some rows of the parent cache: features, and all else that the new shard takes over."""
    assert job.parent is not None
    parent, spec = open_cache(job.parent), job.layout.spec
    assert parent.manifest.fingerprint == spec.parent, "the spec names the cache that it continues"

    def load(rows: np.ndarray) -> tuple[Tensor, RowBlock]:
        batch = parent.read(rows, view)
        orders = batch.ids_BL.numpy() if spec.groups > 1 else None
        pixels = None if batch.pixels_BLP is None else batch.pixels_BLP.numpy()
        return batch.features_BLD, RowBlock(np.empty(0), parent.crops(rows, view), batch.keys, orders, pixels)

    return load
