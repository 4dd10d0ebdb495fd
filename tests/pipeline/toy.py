"""A run small enough to be trained in seconds: 96 images of 16 tokens, four blocks, three stages; and a study of such
runs, with two stages each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cache.manifest import read_manifest, write_manifest
from pipeline.config import PipelineConfig
from pipeline.grid import Request, read_study
from pipeline.job import Job
from pipeline.layout import RunPaths
from pipeline.machine import resolve
from pipeline.reading import parse
from pipeline.recipes import recipe
from pipeline.studies import Study, row

TOY = {
    "data.limit": 96,
    "model.image_size": 16,
    "model.patch_size": 4,
    "model.width": 32,
    "model.depth": 4,
    "model.heads": 2,
    "decoder.depth": 1,
    "decoder.width": 16,
    "decoder.heads": 2,
    "schedule.cuts": [0, 1, 3],
    "schedule.epochs": [1, 1, 2],
    "cache.views": 2,
    "cache.shard_rows": 40,
    "cache.encode_batch": 16,
    "train.batch_size": 16,
    "train.precision": "float32",
    "train.device": "cpu",
    "train.threads": 1,
    "eval.train_limit": 40,
    "eval.val_limit": 40,
}


SMALL = TOY | {"eval.every": 1, "train.lr_schedule": "constant", "schedule.cuts": [0, 3], "schedule.epochs": [1, 2]}


def toy(**changes: object) -> PipelineConfig:
    return resolve(parse(TOY | changes, recipe("sample")))


def job(root: Path, config: PipelineConfig | None = None, **more: Any) -> Job:
    return Job("toy", config or toy(), RunPaths(root), **more)


def sharing(root: Path, store: Path, config: PipelineConfig | None = None, **more: Any) -> Job:
    """A toy run whose caches lie in a store."""
    return replace(job(root, config, **more), paths=RunPaths(root, store))


def record(root: Path, name: str) -> dict:
    return json.loads((root / name / "stage.json").read_text())


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / name / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], start: str = "") -> bool:
    return all(torch.equal(a[name], b[name]) for name in a if name.startswith(start))


class StopAfter:
    """A stop that is set once it has been asked about `count` times."""

    def __init__(self, count: int) -> None:
        self.left = count

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def without_last_checksums(cache: Path) -> None:
    """Let a cache's manifest forget by what a whole shard of another cache is told from its own."""
    known = read_manifest(cache)
    write_manifest(cache, replace(known, shards=tuple(replace(entry, last_crc=0) for entry in known.shards)))


def tiny() -> Study:
    """Two views against one, and end to end."""
    return Study("Do views matter?", {"e2e": row("e2e"), "two": row(), "one": row(cache__views=1)}, "e2e", SMALL)


def ask(root: Path, *words: str) -> Request:
    return read_study(["tiny", "--run", str(root), *words])
