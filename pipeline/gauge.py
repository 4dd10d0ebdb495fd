"""What this machine takes, measured in seconds: a device profile, training steps of the run's own shapes, and small
caches built by the very code that builds the large ones. Stands before `predict`, which makes stages of it."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from cache.backends import open_cache
from cache.buffers import FRESH, Buffers
from cache.codecs import codec_problem
from cache.config import Codec
from cache.layout import Layout, Shard, Stored
from cache.rounding import restore
from cache.writer import PIECE_VALUES, RowBlock, create_store, finish, stored_rows, write_stored
from models.batch import MaskedBatch
from models.config import ModelConfig
from models.mim import MaskedModel
from models.vit import Encoder, build_encoder
from pipeline.decide import Wanted
from pipeline.feeds import live_source, sampling, source_for
from pipeline.machine import available_cores, hardware
from pipeline.predict import GIGA, TERA, OnProfile
from pipeline.profile import ENDLESS, BlockRate, CodecRate, DeviceProfile
from pipeline.rates import fresh_model, unwatched
from pipeline.scratch import scratch
from stages.compiling import compiler
from stages.config import TrainConfig
from stages.device import autocast, synchronize
from stages.flops import block_flops
from stages.images import ImageList
from stages.segment import Segment
from stages.sources import Inputs, LiveImages, Sampling, Source, mask_features
from stages.train import loader, train_step
from stages.views import apply_crop, crop_params, image_batch

COMPILE_SECONDS, COMPILE_GAIN = 2.2, 0.92
"""Start-up of torch.compile for a learning block, and what a step then takes: as measured in `stages.compiling`."""
BLOCKS, FLOPS = 3, {"cpu": 2e10, "cuda": 4e12}
"""Blocks that are timed at once, and about how much they compute."""
IMAGES, ROWS = 64, 48
"""Images that are cut, and rows that are rounded, written and read."""
PATIENCE = 1.0
"""Seconds from which on a run says enough by itself."""
PHOTO = (500, 375)
"""Size of the JPEG that stands for images that are not here, ImageNet's usual one."""


def measure_profile(wanted: Wanted, folder: Path, images: ImageList | None, room: float) -> DeviceProfile:
    """This machine with the run's device, precision and threads. images: what views are cut of, None where they are not
    here; folder: on the disk whose speed counts; room: bytes that caches may have where they are to lie."""
    train = wanted.config.train
    torch.set_num_threads(train.threads)
    cpu = not train.device.startswith("cuda")
    codecs, write_rate, read_rate = measure_storing(wanted, folder)
    found = DeviceProfile(
        name="this machine",
        device=f"{train.device} ({hardware(train.device)}), {train.threads} threads, {train.precision}",
        origin="measured",
        assumptions=(
            "Measured in seconds, on blocks and rows of this run's own sizes, with what else the machine was doing.",
            "Reading is timed right after writing, from the system's memory; caches larger than that are read slower.",
            f"Images are {'the first of the data' if images else f'JPEGs of {PHOTO[0]} x {PHOTO[1]} pixels, noise'}.",
            f"torch.compile, not measured: {COMPILE_SECONDS} s of start-up a block, {COMPILE_GAIN} of the step's time.",
        ),
        blocks=tuple(measure_blocks(wanted)),
        codecs=codecs,
        embed_tflops=measure_embedding(wanted) / TERA,
        optimizer_rate=measure_optimizer(wanted),
        step_seconds=0.0,
        crop_seconds=measure_crop(wanted, images),
        write_rate=write_rate,
        read_rate=read_rate,
        disk_rate=read_rate * available_cores(),
        start_seconds=measure_start(wanted),
        compile_seconds=COMPILE_SECONDS if compiler() else 0.0,
        compile_gain=COMPILE_GAIN if compiler() else 1.0,
        cores=available_cores(),
        busy_cores=min(train.threads, available_cores()) if cpu else 0,
        memory_gb=device_memory(train) / GIGA,
        disk_gb=max(1e-3, min(room, ENDLESS) / GIGA),
    )
    last = len(wanted.segments) - 1
    part = wanted.parts(last)[-1]
    step = step_seconds(wanted, last, part, "cached", imagined=True)
    modelled = OnProfile(wanted, found).compute(last, part, "cached")
    return replace(found, step_seconds=max(0.0, step - modelled))


# --- computing --------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], train: TrainConfig, runs: int = 3) -> float:
    """The median of some runs after one to warm up; of one run where that is already PATIENCE seconds long. On a GPU a
    run is so short work several times over, handed to it without waiting in between, as training does."""
    torch.set_num_threads(train.threads)
    device, many = torch.device(train.device), 1
    times: list[float] = []
    while len(times) < 1 + (runs if not times or times[0] < PATIENCE else 1):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(many):
            work()
        synchronize(device)
        times.append((time.perf_counter() - started) / many)
        many = max(1, min(unwatched(train.device), int(PATIENCE / 10 / times[-1])))
    return statistics.median(times[1:])


def measure_blocks(wanted: Wanted) -> list[BlockRate]:
    """Encoder blocks over the tokens that a step sees and those of every mode's groups, the decoder's over its own."""
    work, prefix = wanted.work, wanted.identity["prefix"]
    config = wanted.config.model
    decoder_width, decoder_heads = wanted.config.decoder.sizes(work.width)
    seen = work.visible + prefix
    sizes = {seen} | {work.tokens // groups + prefix for groups in (1, 2, 4) if work.tokens % groups == 0}
    found = [block_rate(wanted, config, tokens, learning=tokens == seen) for tokens in sorted(sizes)]
    own = next(rate for rate in found if rate.tokens == seen)
    found = [replace(rate, learning=rate.frozen * own.learning / own.frozen) for rate in found]
    small = replace(config, name="vit_tiny", width=decoder_width, heads=decoder_heads, weights="", registers=0)
    return [*found, block_rate(wanted, small, work.decoded, learning=True)]


def block_rate(wanted: Wanted, model: ModelConfig, tokens: int, learning: bool) -> BlockRate:
    """The rate of a few blocks of a model over so many tokens; without `learning` forward only."""
    train = wanted.config.train
    encoder = build_encoder(replace(model, depth=BLOCKS), 0).to(train.device).train()
    encoder.set_attention(train.device, tokens)
    flops = BLOCKS * block_flops(tokens, encoder.width)
    most = FLOPS["cuda" if train.device.startswith("cuda") else "cpu"]
    rows = max(4, min(int(most / flops), train.batch_size // train.accumulate))
    inputs = torch.randn(rows, tokens, encoder.width, device=train.device)
    seconds = seconds_of(lambda: frozen_blocks(encoder, inputs, train), train)
    found = BlockRate(encoder.width, tokens, rows * flops / seconds / TERA, rows * flops / seconds / TERA)
    if not learning:
        return found
    given = inputs.requires_grad_()

    def both() -> None:
        with autocast(train.device, train.precision):
            out = encoder.run(given, 0, BLOCKS)
        out.sum().backward()

    return replace(found, learning=3 * rows * flops / seconds_of(both, train) / TERA)


def frozen_blocks(encoder: Encoder, tokens_BLD: torch.Tensor, train: TrainConfig) -> None:
    with torch.inference_mode(), autocast(train.device, train.precision):
        encoder.run(tokens_BLD, 0, BLOCKS)


def measure_embedding(wanted: Wanted) -> float:
    """FLOP/s of the patch embedding's forward."""
    model, train = wanted.config.model, wanted.config.train
    encoder = build_encoder(replace(model, depth=1), 0).to(train.device)
    images = torch.randn(IMAGES, 3, model.image_size, model.image_size, device=train.device)

    def embed() -> None:
        with torch.inference_mode(), autocast(train.device, train.precision):
            encoder.embed(images)

    return IMAGES * wanted.work.embedding / seconds_of(embed, train)


def measure_optimizer(wanted: Wanted) -> float:
    """Parameters that the optimiser updates in a second."""
    last = len(wanted.segments) - 1
    model, optimizer = fresh_model(wanted, last, wanted.segments[last].cut, cached=last > 0)
    model.train()
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for one in parameters:
        one.grad = torch.zeros_like(one)
    return sum(one.numel() for one in parameters) / seconds_of(optimizer.step, wanted.config.train)


# --- images and the disk ----------------------------------------------------------------------------------------------


def measure_crop(wanted: Wanted, images: ImageList | None) -> float:
    """Seconds of a thread for reading, checking, decoding and cutting one image."""
    data, size, seed = wanted.config.data, wanted.config.model.image_size, wanted.config.seed
    if images is None:
        pixels = np.random.default_rng(0).integers(0, 256, (PHOTO[1] // 4, PHOTO[0] // 4, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize(PHOTO, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)

        def cut() -> None:
            for number in range(IMAGES):
                image = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
                apply_crop(image, crop_params(seed, 0, str(number), image.height, image.width, data), size)

        return seconds_of(cut, wanted.config.train) / IMAGES
    rows = np.arange(min(IMAGES, len(images)))
    return seconds_of(lambda: image_batch(images, rows, 0, data, size, seed), wanted.config.train) / len(rows)


def measure_storing(wanted: Wanted, folder: Path) -> tuple[tuple[CodecRate, ...], float, float]:
    """Every codec's rates, and bytes a second written and read, on a small cache of noise that is removed again. A
    codec that does not fit the model counts as the slowest of the others."""
    config, train = wanted.config, wanted.config.train
    draft = replace(wanted.draft_spec(0), cut=1, views=1, weights="measured")
    rng = np.random.default_rng(0)
    features = rng.standard_normal((ROWS, draft.num_tokens, draft.width), np.float32)
    orders = np.tile(np.arange(draft.num_tokens), (ROWS, 1)) if draft.groups > 1 else None
    pixels = np.zeros((ROWS, draft.num_tokens, 3 * draft.patch_size**2), np.uint8) if draft.pixels else None
    kept = draft.groups * draft.prefix
    prefix = rng.standard_normal((ROWS, kept, draft.width), np.float32) if kept else None
    keys = tuple(f"{row:06d}" for row in range(ROWS))
    block = RowBlock(features, np.zeros((ROWS, 5), np.float32), keys, orders, pixels, prefix)
    rates, write_rate, read_rate = [], 0.0, 0.0
    for codec in reversed(get_args(Codec)):  # float16 last: its cache is written and read
        stored = replace(config.cache, codec=codec, filter="none").stored()
        if codec_problem(codec, draft.width, stored["block"], 0):
            continue
        layout = Layout(replace(draft, **stored), ROWS, ROWS, config.cache.backend)
        pieces, seconds = timed(partial(rounded, layout, block), train)
        _, back = timed(partial(restored, pieces, codec, torch.empty(features.shape[1:])), train)
        rates.append(CodecRate(codec, features.size / seconds / GIGA, features.size / back / GIGA))
        if codec == "float16":
            with scratch(folder) as own:
                write_rate, read_rate = written_and_read(own / "cache", layout, block, pieces, back)
    slowest = min(rates, key=lambda rate: rate.round)
    rates += [replace(slowest, codec=name) for name in get_args(Codec) if name not in [one.codec for one in rates]]
    return tuple(reversed(rates)), write_rate, read_rate


def rounded(layout: Layout, block: RowBlock) -> list[Stored]:
    """A block's rows as they are stored, so many at a time as the writer rounds."""
    many = max(1, PIECE_VALUES // (layout.spec.num_tokens * layout.spec.width))
    return [stored_rows(layout, 0, block, slice(first, first + many)) for first in range(0, ROWS, many)]


def restored(pieces: list[Stored], codec: str, out_LD: torch.Tensor) -> None:
    """The features of rows back in float32, row by row as the reader does it."""
    for piece in pieces:
        for place, values_LD in enumerate(piece["features"]):
            restore(values_LD, codec, piece["scale"][place] if "scale" in piece else None, out_LD)


def timed(work: Callable[[], Any], train: TrainConfig) -> tuple[Any, float]:
    """What it gives, and its median seconds."""
    found: list[Any] = []
    seconds = seconds_of(lambda: found.append(work()), train)
    return found[-1], seconds


def written_and_read(
    folder: Path, layout: Layout, block: RowBlock, pieces: list[Stored], restoring: float
) -> tuple[float, float]:
    """Bytes a second, of one thread, of writing a shard of rows that are rounded, and of reading it at random."""
    shard = Shard(0, 0, ROWS)
    size = sum(array.splits * array.chunk_bytes for array in layout.arrays) * ROWS
    create_store(folder, layout, np.zeros(ROWS, np.int64), block.keys, np.zeros((ROWS, 32), np.uint8))
    writing = []
    for _ in range(3):
        started = time.perf_counter()
        write_stored(folder, layout, shard, pieces, block.keys)
        writing.append(time.perf_counter() - started)
    finish(folder, layout)
    reader, order, reading = open_cache(folder), np.random.default_rng(0).permutation(ROWS), []
    for _ in range(4):
        started = time.perf_counter()
        reader.read(order)
        reading.append(time.perf_counter() - started)
    read = statistics.median(reading[1:])
    return size / statistics.median(writing), size / max(read - restoring, read / 10)


def measure_start(wanted: Wanted) -> float:
    """Seconds before the first shard of a cache: the workers, and a model for them."""
    from pipeline.cluster import task_runner

    started = time.perf_counter()
    with task_runner(wanted.config.cluster, wanted.config.train.device):
        build_encoder(wanted.config.model, 0)
    return time.perf_counter() - started


def device_memory(train: TrainConfig) -> float:
    """Bytes of the device; of a CPU what this process may have of the machine, which a container's limit bounds."""
    if train.device.startswith("cuda"):
        return float(torch.cuda.get_device_properties(torch.device(train.device)).total_memory)
    from distributed.system import memory_limit

    return float(memory_limit())


# --- training steps ---------------------------------------------------------------------------------------------------


def step_seconds(wanted: Wanted, stage: int, segment: Segment, arm: str, imagined: bool = False) -> float:
    """Seconds of one training step of an arm in a segment of a stage, its inputs in memory; `imagined`: without the
    images of the data."""
    cached = arm == "cached" and stage in wanted.cached_stages
    model, optimizer = fresh_model(wanted, stage, segment.cut, cached, segment.entry)
    train = wanted.config.train
    source: Source
    if imagined and not cached:
        source = ImaginedImages(sampling(wanted))
    else:
        source = step_source(wanted, stage if cached else 0, segment, model)
    inputs = source.load(segment, segment.steps // 2)  # a mask that changes is then as it is on average
    return seconds_of(lambda: train_step(model, optimizer, source, inputs, train), train)


def live_seconds(wanted: Wanted, stage: int, segment: Segment, arm: str) -> float:
    """Seconds of one training step that cuts its images beside it, as training does: on a CPU a loader that takes one
    core for a moment holds up the threads of all (13 % of a step where cutting took 5 % of two cores' time)."""
    model, optimizer = fresh_model(wanted, stage, segment.cut, False, segment.entry)
    train = wanted.config.train
    source = source_for(wanted, stage) if arm == "cached" else live_source(wanted, segment)
    numbers = (number % segment.steps for number in count(segment.steps // 2))
    with loader(source, segment, numbers, train, wanted.config.cache.memory) as batches:
        return seconds_of(lambda: train_step(model, optimizer, source, next(batches), train), train, LIVE_STEPS)


LIVE_STEPS = 7


def step_source(wanted: Wanted, stage: int, segment: Segment, model: MaskedModel) -> Source:
    """What a step's inputs are made by where only its time counts: images for stage 0, imagined features for others."""
    if not stage:
        return live_source(wanted, segment)
    encoder = model.encoder
    return Imagined(sampling(wanted), encoder.width, encoder.num_prefix, wanted.teacher_blocks(stage))


@dataclass(frozen=True)
class Imagined:
    """Random numbers in the shape of cached features, where no cache has been built yet."""

    sampling: Sampling
    width: int
    prefix: int
    teacher_blocks: tuple[int, ...]

    def load(self, segment: Segment, step: int, into: Buffers = FRESH) -> Inputs:
        how = self.sampling
        size = how.model.num_tokens if how.reads_all(segment) else how.group_tokens
        order = torch.rand(how.batch_size, how.model.num_tokens).argsort(1)
        side = how.model.image_size
        images = torch.randint(0, 256, (how.batch_size, 3, side, side), dtype=torch.uint8)
        inputs = how.inputs(segment, step, torch.randn(how.batch_size, size, self.width), how.group_tokens)
        prefix = torch.randn(how.batch_size, size // how.group_tokens * self.prefix, self.width)
        whole = (how.batch_size, how.model.num_tokens, self.width)
        teachers = {block: torch.randn(whole) for block in self.teacher_blocks}
        return replace(inputs, ids_BL=order[:, :size], images=images, prefix_BSD=prefix, teachers=teachers)

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch:
        return mask_features(model, self.sampling, inputs)


@dataclass(frozen=True)
class ImaginedImages:
    """Random images, where the data are not here."""

    sampling: Sampling

    def load(self, segment: Segment, step: int, into: Buffers = FRESH) -> Inputs:
        how, side = self.sampling, self.sampling.model.image_size
        images = torch.randint(0, 256, (how.batch_size, 3, side, side), dtype=torch.uint8)
        return how.inputs(segment, step, images, how.model.num_tokens)

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch:
        nothing = ImageList((), (), (), lambda entry: b"")
        return LiveImages(nothing, self.sampling).mask(model, inputs)
