"""What a batch of a cached stage takes in memory, known before anything is trained: so `cache.memory_mb` is refused at
once where two batches do not fit, and not when a stage begins. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from models.config import IMAGE_TARGETS, learning_heads
from models.spec import FeatureSpec
from pipeline.config import ConfigError
from pipeline.decide import Wanted, judge_stage
from pipeline.needs import Need
from stages.segment import Segment

FLOAT_BYTES = 4
"""Features are handed out in float32, whatever they are stored in."""


def read_bytes(spec: FeatureSpec, rows: int, whole: bool) -> int:
    """Bytes of some rows of a cache as they are read: all token groups of a view, or one."""
    parts = spec.groups if whole else 1
    tokens = parts * (spec.num_tokens // spec.groups + spec.prefix)
    pixels = spec.num_tokens * 3 * spec.patch_size**2 if spec.pixels else 0
    return rows * (tokens * spec.width * FLOAT_BYTES + pixels)


def batch_bytes(wanted: Wanted, stage: int, part: Segment) -> int:
    """Bytes that a batch of a cached stage's segment takes in the loader: features, teacher's features, images."""
    config, (features, *teachers) = wanted.config, wanted.needs(stage)
    targets = {head.target for head in learning_heads(wanted.heads, part.cut, part.entry)}
    whole = "features" in targets or (config.teacher.kind == "ema" and "teacher" in targets)
    rows, image = config.train.batch_size, 3 * config.model.image_size**2
    taught = sum(read_bytes(need.draft, rows, whole=True) for need in teachers)
    images = rows * image if targets & set(IMAGE_TARGETS) else 0
    return read_bytes(features.draft, rows, whole) + taught + images


def refuse_too_little_memory(wanted: Wanted, last: int, more: Sequence[Need] = ()) -> None:
    """Raise ConfigError when two batches of a stage up to `last` that is to be trained, or of what reads `more`, do not
    fit the half of `cache.memory_mb` that is for batches."""
    cache = wanted.config.cache
    for whose, size, which in _batches(wanted, last, more):
        if 2 * size > cache.memory:
            raise ConfigError(
                f"two batches of {size / 1e6:.1f} MB of {whose} do not fit the half of cache.memory_mb = "
                f"{cache.memory_mb}, {cache.memory / 1e6:.1f} MB, that is for batches; raise it to "
                f"{math.ceil(4 * size / 2**20)} or lower {which}"
            )


def _batches(wanted: Wanted, last: int, more: Sequence[Need]) -> Iterator[tuple[str, int, str]]:
    """Whose batch it is, its bytes, and the setting that makes it smaller."""
    for stage in range(1, last + 1):
        cached = not wanted.used_up(stage) and stage in wanted.cached_stages
        if cached and not judge_stage(wanted, stage).current:
            for part in wanted.asked(stage):
                yield f"stage {stage}", batch_bytes(wanted, stage, part), "train.batch_size"
    rows = wanted.config.finetune.batch_size
    for need in more:
        yield "fine-tuning", read_bytes(need.draft, rows, whole=True), "finetune.batch_size"
