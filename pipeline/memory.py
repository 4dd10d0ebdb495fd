"""What training and building caches take in memory, known before anything runs: the batches of a cached stage, so that
`cache.memory_mb` is refused at once where two do not fit and not when a stage begins; and, for the plan, the peak of a
training step. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from models.config import IMAGE_TARGETS, PATCHES, PLAIN_TOKENS, learning_heads
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
    asked = {head.key for head in learning_heads(wanted.heads, part.cut, part.entry) if head.target in IMAGE_TARGETS}
    stored = bool(features.draft.pixels) and asked == {PATCHES}  # which become no images in between
    images = rows * image if asked and not stored else 0
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


# --- what the plan says of memory -------------------------------------------------------------------------------------

KEPT = {"float32": 64, "bfloat16": 36}
"""Bytes that a learning block keeps for its backward for every channel of a token, by precision: what autograd saves,
counted, with attention whose softmax is not kept. In float32 16 values: two norms' inputs and outputs, queries, keys,
values, what attention gives, and twice the four widths of the MLP."""
UPDATED = 16
"""Bytes of a parameter that learns: itself, its gradient and two moments, all float32."""


def block_bytes(tokens: int, width: int, heads: int, precision: str, device: str, attention: str = "auto") -> int:
    """Activations that a learning block keeps of one image. Written-out attention keeps its softmax as well."""
    values = 2 if precision == "bfloat16" else 4
    plain = attention == "plain" or (attention == "auto" and device == "cpu" and tokens <= PLAIN_TOKENS)
    softmax = heads * tokens * tokens * values if plain else 0
    return tokens * width * KEPT.get(precision, KEPT["float32"]) + softmax


def peak_bytes(wanted: Wanted, stage: int, part: Segment, arm: str) -> int:
    """About the most that a training step takes on the device: parameters, what backward needs of a micro-batch, the
    batch itself, and on a CPU the batches ahead. What libraries hold besides, some hundred MB, is left out."""
    config, work, identity = wanted.config, wanted.work, wanted.identity
    train, model, prefix = config.train, config.model, identity["prefix"]
    cached = arm == "cached" and stage in wanted.cached_stages
    heads = len(learning_heads(wanted.heads_of(stage), part.cut, part.entry))
    kind = (train.precision, train.device.partition(":")[0], model.attention)
    block = block_bytes(work.visible + prefix, work.width, identity["heads"], *kind)
    decoder = block_bytes(work.decoded, work.decoder_width, config.decoder.sizes(work.width)[1], *kind)
    image = (work.depth - part.cut) * block + heads * work.decoder_depth * decoder
    image += model.num_tokens * (model.patch_values + work.width) * FLOAT_BYTES  # targets, and tokens before the mask
    rows = train.batch_size // train.accumulate
    weights = work.depth * 12 * work.width**2
    learning = (work.depth - part.cut) * 12 * work.width**2 + heads * work.decoder_depth * 12 * work.decoder_width**2
    batch = batch_bytes(wanted, stage, part) if cached else train.batch_size * 3 * model.image_size**2
    ahead = min(config.cache.memory, train.prefetch * batch) if kind[1] == "cpu" else 0
    return weights * FLOAT_BYTES + learning * UPDATED + rows * image + batch + ahead


def build_bytes(wanted: Wanted, need: Need) -> int:
    """About the most that building a cache takes on the host: the features of two shards in float32, and pixels."""
    spec = need.draft
    rows = 2 * min(wanted.config.cache.shard_rows, len(wanted.data.train))
    return read_bytes(spec, rows, whole=True)
