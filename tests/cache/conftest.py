"""Tiny caches with known contents, built through the public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.layout import Layout, Shard
from cache.manifest import CacheManifest
from cache.verify import Damage
from cache.writer import RowBlock, amend, create_store, finish, missing_shards, write_rows
from models.spec import FeatureSpec

SPEC = FeatureSpec(
    model="vit_tiny",
    image_size=16,
    patch_size=4,
    width=6,
    depth=12,
    heads=3,
    weights="3f" * 32,
    cut=3,
    groups=4,
    mask_ratio=0.75,
    mask_block=1,
    views=2,
    view_transform="crop",
    data="d4" * 32,
    seed=0,
    dtype="float32",
    codec="float16",
    pixels=True,
    parent="",
    version=1,
)


@dataclass(frozen=True)
class Example:
    """What a cache of `layout` shall hold: V views, N samples."""

    layout: Layout
    features_VNLD: np.ndarray
    token_ids_VNL: np.ndarray
    crop_VN5: np.ndarray
    pixels_VNLP: np.ndarray
    labels_N: np.ndarray
    keys: tuple[str, ...]
    prefix_VNSD: np.ndarray
    digests_N: np.ndarray
    at: Callable[[Path], Path] = lambda folder: folder
    """Where a cache in a folder is reached: there, or by the URL of an object store over it."""

    @property
    def stored_VNLD(self) -> np.ndarray:
        return self.features_VNLD.astype(np.float16)

    def block(self, shard: Shard) -> RowBlock:
        view, rows = shard.view, slice(shard.first_row, shard.first_row + shard.rows)
        return RowBlock(
            self.features_VNLD[view, rows],
            self.crop_VN5[view, rows],
            self.keys[rows],
            self.token_ids_VNL[view, rows] if self.layout.spec.groups > 1 else None,
            self.pixels_VNLP[view, rows] if self.layout.spec.pixels else None,
            self.prefix_VNSD[view, rows] if self.layout.spec.prefix else None,
        )

    def build(self, folder: Path) -> tuple[CacheManifest, list[Shard]]:
        """Builds or resumes the cache; also returns the shards that had to be written."""
        folder = self.at(folder)
        create_store(folder, self.layout, self.labels_N, self.keys, self.digests_N)
        shards = missing_shards(folder, self.layout)
        for shard in shards:
            write_rows(folder, self.layout, shard.view, shard.first_row, self.block(shard))
        return finish(folder, self.layout), shards

    def mend(self, folder: Path, damages: Sequence[Damage]) -> list[Shard]:
        """Writes the damaged shards of a finished cache again, as stages.mend does; returns them."""
        folder, bad = self.at(folder), {damage.file for damage in damages}
        shards = [shard for shard in self.layout.shards if not bad.isdisjoint(self.layout.files(shard))]
        for shard in shards:
            write_rows(folder, self.layout, shard.view, shard.first_row, self.block(shard))
        assert amend(folder), "the same to the bit"
        return shards


def make_example(num_samples: int = 7, shard_rows: int = 3, **changes: Any) -> Example:
    spec = replace(SPEC, **changes)
    layout = Layout(spec, num_samples, shard_rows)
    random = np.random.default_rng(7)
    shape = spec.views, num_samples, spec.num_tokens
    ids = np.argsort(random.random(shape), axis=-1) if spec.groups > 1 else np.broadcast_to(np.arange(shape[-1]), shape)
    return Example(
        layout,
        random.normal(size=(*shape, spec.width)).astype(np.float32) * 3,
        ids,
        random.random((*shape[:2], 5)).astype(np.float32),
        random.integers(0, 256, (*shape, 3 * spec.patch_size**2), np.uint8),
        np.arange(num_samples) % 3 - 1,
        tuple(f"sämple/{row}" for row in range(num_samples)),
        random.normal(size=(*shape[:2], spec.groups * spec.prefix, spec.width)).astype(np.float32),
        random.integers(0, 256, (num_samples, 32), np.uint8),
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def example() -> Callable[..., Example]:
    """example(num_samples=7, shard_rows=3, **spec fields) -> Example."""
    return make_example


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """tree(folder) -> content of every file by relative name."""
    return files_of
