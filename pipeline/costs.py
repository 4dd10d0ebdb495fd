"""`permafrost plan`: what would run, how long it would take, what it would put on disk, and when the caches have paid
for themselves. Step times are measured on this machine in a few seconds, on random data of the run's shapes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

from cache.buffers import FRESH, Buffers
from cache.config import Codec
from cache.errors import CacheError
from cache.manifest import atomic_write
from cache.size import cache_bytes
from models.batch import MaskedBatch
from models.config import IMAGE_TARGETS
from models.mim import MaskedModel
from models.vit import build_encoder
from pipeline.budget import budget_lines
from pipeline.decide import Wanted, judge_stage, new_needs
from pipeline.disk import refuse_what_does_not_fit
from pipeline.feeds import live_source, sampling, source_for
from pipeline.freezing import show_adaptive, show_events
from pipeline.job import Job
from pipeline.memory import refuse_too_little_memory
from pipeline.needs import Need
from pipeline.rates import fresh_model
from pipeline.show import console, table
from pipeline.speedup import break_even
from stages.config import TrainConfig
from stages.device import autocast, synchronize
from stages.segment import Segment, as_end_to_end
from stages.sources import Inputs, Sampling, Source, mask_features
from stages.train import train_step
from stages.views import image_batch


@dataclass(frozen=True)
class StageCost:
    """Predicted cost of a stage. Seconds of training by arm, of building its cache, and the cache's bytes."""

    stage: int
    cut: int
    epochs: float
    state: str
    e2e_seconds: float
    freeze_seconds: float
    cached_seconds: float
    cache_seconds: float
    cache_bytes: int
    live: bool = False
    """Whether it runs its frozen blocks live for want of disk, which `cached_seconds` then counts."""


def show_plan(job: Job) -> None:
    """Measure, predict, print, and write plan.json."""
    wanted = Wanted(job.config, job.paths)
    refuse_too_little_memory(wanted, wanted.candidates - 1)
    refuse_what_does_not_fit(wanted, wanted.candidates - 1)
    costs = [stage_cost(wanted, stage) for stage in range(len(wanted.segments))]
    rows = table("stage", "cut", "epochs", "state", "e2e s", "freeze s", "cached s", "cache s", "cache on disk")
    for cost in costs:
        rows.add_row(
            *(str(cost.stage), str(cost.cut), f"{cost.epochs:g}", cost.state),
            *(f"{s:.0f}" for s in (cost.e2e_seconds, cost.freeze_seconds, cost.cached_seconds, cost.cache_seconds)),
            f"{cost.cache_bytes / 1e6:,.0f} MB" if cost.cache_bytes else "live" if cost.live else "",
        )
    found = totals(costs)
    out = console()
    out.print(rows)
    even = found["break_even_epoch"]
    out.print(
        f"total: e2e {found['e2e_seconds']:.0f} s, freeze {found['freeze_seconds']:.0f} s, "
        f"cached {found['cached_seconds']:.0f} s with caches; speed-up {found['speedup_total']:.2f}; break-even "
        + ("not reached" if even is None else f"at epoch {even:.1f}")
        + f"; disk {found['cache_bytes'] / 1e6:,.0f} MB"
    )
    for line in budget_lines(wanted):
        out.print(line)
    events = show_events(wanted)
    show_adaptive(wanted)
    prices = choices(wanted) if len(costs) > 1 else {}
    for line in price_lines(prices):
        out.print(line)
    plan = {"stages": [asdict(cost) for cost in costs]} | found | prices | {"freeze_events": events}
    atomic_write(job.paths.plan, (json.dumps(plan, indent=2) + "\n").encode())


SHARES = (1.0, 0.5, 0.25)


def choices(wanted: Wanted) -> dict[str, Any]:
    """What two settings would cost otherwise, measured at the last cut.

    `decoder_share`: seconds of a cached step by the share of hidden tokens decoded; empty where a head needs all.
    `pixels`: bytes of storing the pixels that image targets need, all caches, and seconds of cutting one image again.
    """
    config, last = wanted.config, len(wanted.segments) - 1
    found: dict[str, Any] = {"decoder_share": {}}
    if all(head.scale >= 1 for head in wanted.heads):
        for share in SHARES:
            other = Wanted(replace(config, decoder=replace(config.decoder, share=share)), wanted.paths)
            found["decoder_share"][str(share)] = step_seconds(other, last, other.parts(last)[-1], "cached")
    found["codecs"] = codec_bytes(wanted)
    if sampling(wanted).targets(wanted.segments[last]) & set(IMAGE_TARGETS):
        values = config.model.num_tokens * config.model.patch_values
        rows = np.arange(min(RECUT_IMAGES, len(wanted.data.train)))
        size = config.model.image_size
        started = time.perf_counter()
        image_batch(wanted.data.train, rows, 0, config.data, size, config.seed)
        seconds = (time.perf_counter() - started) / len(rows)
        found["pixels"] = {
            "stored_bytes": last * config.cache.views * len(wanted.data.train) * values,
            "recut_seconds": seconds,
        }
    return found


RECUT_IMAGES = 64


def codec_bytes(wanted: Wanted) -> dict[str, int]:
    """Bytes of all caches of the stages by the codec of all of them, without a filter; exact but for metadata. A codec
    that does not fit the model is left out."""
    found, cache = {}, wanted.config.cache
    for codec in get_args(Codec):
        other = replace(cache, codec=codec, later_codec="", filter="none", over_budget="refuse")
        with suppress(CacheError):
            run = Wanted(replace(wanted.config, cache=other), wanted.paths)
            needs = [need for stage in range(1, len(run.segments)) for need in new_needs(run, stage)]
            found[codec] = sum(cache_bytes(run.layout(need)) for need in needs)
    return found


def price_lines(prices: dict[str, Any]) -> Iterator[str]:
    """The choices as people read them."""
    if shares := prices.get("decoder_share"):
        steps = ", ".join(
            f"{share} {1e3 * seconds:.0f} ms ({shares['1.0'] / seconds:.2f}×)" for share, seconds in shares.items()
        )
        yield f"a cached step at the last cut by decoder.share: {steps}"
    if codecs := prices.get("codecs"):
        sizes = ", ".join(f"{codec} {size / 1e6:,.0f} MB" for codec, size in codecs.items())
        yield f"caches by cache.codec: {sizes}; cache.filter = lz4 or zstd: at most that, how much less the data decide"
    if pixels := prices.get("pixels"):
        yield (
            f"image targets: cache.pixels=stored adds {pixels['stored_bytes'] / 1e6:,.0f} MB; "
            f"recut adds none and {1e3 * pixels['recut_seconds']:.2f} ms of a loader thread an image and step"
        )


def totals(costs: list[StageCost]) -> dict[str, Any]:
    """The plan as a whole. Evaluation is left out, as it is from training time."""
    slow, fast, epoch = [(0.0, 0.0)], [(0.0, 0.0)], 0.0
    for cost in costs:
        fast.append((epoch, fast[-1][1] + cost.cache_seconds))
        epoch += cost.epochs
        slow.append((epoch, slow[-1][1] + cost.e2e_seconds))
        fast.append((epoch, fast[-1][1] + cost.cached_seconds))
    return {
        "e2e_seconds": slow[-1][1],
        "freeze_seconds": sum(cost.freeze_seconds for cost in costs),
        "cached_seconds": fast[-1][1],
        "speedup_total": slow[-1][1] / fast[-1][1],
        "break_even_epoch": break_even(slow, fast),
        "cache_bytes": sum(cost.cache_bytes for cost in costs),
    }


def stage_cost(wanted: Wanted, stage: int) -> StageCost:
    """Measure a stage's steps and its encoding on this machine, and scale them to the stage's length."""
    segment, parts = wanted.segments[stage], wanted.parts(stage)
    verdict = judge_stage(wanted, stage)
    epochs = segment.steps / segment.steps_per_epoch
    freeze = sum(step_seconds(wanted, stage, part, "freeze") * part.steps for part in parts)
    if not stage:  # the same for all arms
        return StageCost(stage, 0, epochs, verdict.state, freeze, freeze, freeze, 0.0, 0)
    needs, images = new_needs(wanted, stage), wanted.data.train
    views = wanted.config.cache.views + wanted.generation(parts[-1], stage)  # a ring encodes one more at every turn
    return StageCost(
        stage=stage,
        cut=segment.cut,
        epochs=epochs,
        state=verdict.state,
        e2e_seconds=step_seconds(wanted, stage, as_end_to_end([segment])[0], "e2e") * segment.steps,
        freeze_seconds=freeze,
        cached_seconds=sum(step_seconds(wanted, stage, part, "cached") * part.steps for part in parts),
        cache_seconds=sum(encode_seconds(wanted, need) for need in needs) * views * len(images),
        cache_bytes=sum(cache_bytes(wanted.layout(need)) for need in needs),
        live=stage not in wanted.cached_stages,
    )


def step_seconds(wanted: Wanted, stage: int, segment: Segment, arm: str) -> float:
    """Seconds of one training step of an arm in a segment of a stage, its inputs in memory."""
    cached = arm == "cached" and stage in wanted.cached_stages
    model, optimizer = fresh_model(wanted, stage, segment.cut, cached, segment.entry)
    train = wanted.config.train
    if arm == "cached" and not cached:
        source = source_for(wanted, stage)
    else:
        source = step_source(wanted, stage if cached else 0, segment, model)
    inputs = source.load(segment, 0)
    return seconds_of(lambda: train_step(model, optimizer, source, inputs, train), train)


def step_source(wanted: Wanted, stage: int, segment: Segment, model: MaskedModel) -> Source:
    """What a step's inputs are made by where only its time counts: images for stage 0, imagined features for others."""
    if not stage:
        return live_source(wanted, segment)
    encoder = model.encoder
    return Imagined(sampling(wanted), encoder.width, encoder.num_prefix, wanted.teacher_blocks(stage))


def encode_seconds(wanted: Wanted, need: Need) -> float:
    """Seconds that the frozen blocks between a cache's parent and itself take for one view of one image."""
    config, spec = wanted.config, need.draft
    encoder = build_encoder(config.model, config.seed).to(config.train.device).eval()
    encoder.set_attention(config.train.device)
    tokens = torch.randn(config.cache.encode_batch, config.model.num_tokens, encoder.width).to(
        config.train.device
    )

    prefix = encoder.prefix(len(tokens)).repeat(1, spec.groups, 1)

    def encode() -> None:
        with torch.inference_mode(), autocast(config.train.device, config.train.precision):
            encoder.run_groups(tokens, prefix, spec.groups, need.start, spec.cut)

    return seconds_of(encode, config.train) / config.cache.encode_batch


def seconds_of(work: Callable[[], object], train: TrainConfig) -> float:
    """The median of three runs after one to warm up."""
    torch.set_num_threads(train.threads)
    device, times = torch.device(train.device), []
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


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
