"""Jobs that build small caches: the spec and the job that tests of encoding share, of a ViT of 16 pixels, 24 wide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.layout import Layout
from cache.manifest import read_manifest
from models.config import ModelConfig
from models.spec import FeatureSpec
from stages.config import DataConfig
from stages.encode import EncodeJob
from stages.images import ImageList
from stages.views import view_transform_id


def tiny_spec(images: ImageList, data: DataConfig, weights: str, cut: int, **changes: Any) -> FeatureSpec:
    """Two views of some images in four token groups, without pixels, at a cut of blocks whose hash is `weights`."""
    settled: dict[str, Any] = {
        "model": "vit_tiny_patch16_224",
        "image_size": 16,
        "patch_size": 4,
        "width": 24,
        "depth": 4,
        "heads": 2,
        "weights": weights,
        "cut": cut,
        "groups": 4,
        "mask_ratio": 0.75,
        "mask_block": 1,
        "views": 2,
        "view_transform": view_transform_id(data, 16),
        "data": images.digest,
        "seed": 5,
        "dtype": "float32",
        "codec": "float16",
        "pixels": False,
        "parent": "",
        "version": 1,
    }
    return FeatureSpec(**(settled | changes))


def encode_job(
    folder: Path,
    layout: Layout,
    model: ModelConfig,
    data: DataConfig,
    weights: Path | str,
    batch: int,
    parent: Path | None = None,
    **changes: Any,
) -> EncodeJob:
    """A job for one thread that builds `folder`, from images or from the cache of an earlier cut."""
    settled: dict[str, Any] = {
        "index_folder": str(folder.parent / "index"),
        "parent_cut": read_manifest(parent).spec.cut if parent else 0,
        "device": "cpu",
        "threads": 1,
        "loader_threads": 1,
    }
    return EncodeJob(
        folder=str(folder),
        layout=layout,
        weights=str(weights),
        model=model,
        data=data,
        parent=str(parent) if parent else None,
        batch=batch,
        **(settled | changes),
    )
