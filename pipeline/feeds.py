"""What stages and arms learn from: images, caches, or, where the budget leaves a stage none, what its cache would hold.
Stands between the verdicts of `decide` and the training in `work`, which asks for a source per segment."""

from __future__ import annotations

from cache import open_cache
from pipeline.decide import Wanted
from pipeline.ring import Ring
from stages.segment import Segment
from stages.sources import CachedFeatures, LiveFeatures, LiveImages, Sampling, Source


def stage_source(ring: Ring, segment: Segment) -> Source:
    """What a segment of a stage learns from; a ring of views turns as far as the segment asks for."""
    wanted = ring.desk.wanted
    if wanted.refresh(ring.stage):
        ring.turn(segment)
    return source_for(wanted, ring.stage)


def source_for(wanted: Wanted, stage: int) -> Source:
    """What a stage learns from, its caches as they are by now."""
    if stage in wanted.cached_stages:
        return cached_source(wanted, stage)
    if stage:
        return LiveFeatures(wanted.data.train, sampling(wanted), wanted.config.cache.views)
    return LiveImages(wanted.data.train, sampling(wanted))


def cached_source(wanted: Wanted, stage: int) -> CachedFeatures:
    """A stage's caches: its features and, where its teacher is frozen, the teacher's."""
    caches, needs = [], wanted.needs(stage)
    for need in needs:
        spec = wanted.spec(need)
        assert spec is not None, "ensure_cache comes first"
        caches.append(open_cache(wanted.cache_folder(spec), memory=wanted.config.cache.memory // len(needs)))
    teachers = dict(zip(wanted.teacher_blocks(stage), caches[1:], strict=True))
    return CachedFeatures(caches[0], sampling(wanted), wanted.data.train, teachers)


def live_source(wanted: Wanted, segment: Segment) -> Source:
    """Images masked before the first block, or, where the target is made of frozen features, those features live."""
    if wanted.reads_features(segment):
        fresh = wanted.plan[-1].first_epoch + wanted.plan[-1].epochs  # as many views as epochs: each is new
        return LiveFeatures(wanted.data.train, sampling(wanted), fresh)
    return LiveImages(wanted.data.train, sampling(wanted))


def sampling(wanted: Wanted) -> Sampling:
    config = wanted.config
    return Sampling(
        seed=config.seed,
        batch_size=config.train.batch_size,
        data=config.data,
        model=config.model,
        mask=config.mask,
        heads=wanted.heads,
        share=config.decoder.share,
        total_steps=wanted.total_steps,
        averages=config.teacher.kind == "ema",
        blocks=config.cache.blocks,
    )
