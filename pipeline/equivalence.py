"""`permafrost equivalence`: is training from the cache the same as training live? Recomputes a batch of every cache
from the images with the frozen blocks, and compares features, prefix tokens and the first step's loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cache.store import CacheReader
from pipeline.config import ConfigError
from pipeline.decide import Wanted, judge_cache
from pipeline.feeds import cached_source, sampling
from pipeline.finetuning import checked_start, make_classifier, source_of
from pipeline.job import Job, RunFailed
from pipeline.show import console, table
from pipeline.tuned import Tuning, last_tuning
from pipeline.work import masked_build, optimizer_of
from stages.checkpoint import apply_tensors, read_state, without_heads
from stages.device import autocast
from stages.finetune import CachedPrefix, Labelled, LiveViews, live_prefix
from stages.sources import LiveFeatures, Source
from stages.train import build_model

FEATURE_BOUND = {"float32": 1e-3, "bfloat16": 1e-2}
"""Largest relative RMSE of cached against live features. float16 alone rounds by 2^-12 of a value on average; under
bfloat16 autocast such a difference can flip a rounding of 2^-9 in every later block."""
CODEC_SHARE = 2.0
"""How much of what a cache loses against the images may be found in a batch, as a multiple: of a cache that continues
another it was measured on other samples, and few."""
LOSS_BOUND = 1e-3
"""Largest relative difference of the first step's loss."""


@dataclass(frozen=True)
class Comparison:
    """Cached against live, at one stage or in fine-tuning."""

    stage: int | str
    cut: int
    feature_rmse: float
    feature_max: float
    cached_loss: float
    live_loss: float
    stored_error: float
    """What the manifest says that it loses against the images."""

    @property
    def loss_difference(self) -> float:
        return abs(self.cached_loss - self.live_loss) / abs(self.live_loss)


def run_equivalence(job: Job) -> None:
    """Compare every cache of the run that is there; RunFailed when one differs by more than its bound."""
    wanted = Wanted(job.config, job.paths)
    stages = [
        stage
        for stage in range(1, len(wanted.segments))
        if stage in wanted.cached_stages and all(judge_cache(wanted, need).current for need in wanted.needs(stage))
    ]
    tuning = last_tuning(wanted)
    tuned = tuning if tuning and tuning.need and judge_cache(wanted, tuning.need).current else None
    if not stages and not tuned:
        raise ConfigError(
            f"{job.paths.root} has no current cache to compare; run `make cache-1` first, or see `make explain`"
        )
    found = [compare_stage(wanted, stage) for stage in stages] + ([compare_finetune(tuned)] if tuned else [])
    rows = table("stage", "cut", "features: rel. RMSE", "max |diff|", "loss cached", "loss live", "rel. difference")
    for one in found:
        rows.add_row(
            *(str(one.stage), str(one.cut), f"{one.feature_rmse:.2e}", f"{one.feature_max:.2e}"),
            *(f"{one.cached_loss:.6f}", f"{one.live_loss:.6f}", f"{one.loss_difference:.2e}"),
        )
    console().print(rows)
    for one in found:
        bound = FEATURE_BOUND[job.config.train.precision] + CODEC_SHARE * one.stored_error
        loss_bound = LOSS_BOUND + one.stored_error
        if not (one.feature_rmse <= bound and one.loss_difference <= loss_bound):
            raise RunFailed(
                f"cache {one.stage} is not what the frozen blocks compute: features differ by {one.feature_rmse:.2e} "
                f"(bound {bound:g}), the loss by {one.loss_difference:.2e} (bound {loss_bound:g}); run `make verify`"
            )


def compare_stage(wanted: Wanted, stage: int) -> Comparison:
    """The first batch of a stage, read and recomputed, under the stage's starting weights."""
    config, segment = wanted.config, wanted.segments[stage]
    torch.set_num_threads(config.train.threads)
    drawn, build = wanted.renewed(segment), masked_build(wanted, stage, cached=False)
    model = build_model(build, segment.cut, config.train.device, stage=drawn)
    optimizer = optimizer_of(wanted, model)
    start = read_state(wanted.paths.stage(stage - 1).state)[2]
    apply_tensors(model, optimizer, without_heads(start) if drawn else start)
    model.eval()  # what is dropped at random would differ between the two
    cached = cached_source(wanted, stage)
    ring = cached.cache.manifest.spec
    live = LiveFeatures(wanted.data.train, sampling(wanted), config.cache.views, ring.first_view)

    def loss(source: Source) -> float:
        with torch.no_grad(), autocast(config.train.device, config.train.precision):
            return float(model(source.mask(model, source.load(segment, 0).to(config.train.device))).sum())

    rows = live.sampling.rows(segment, 0, len(cached.cache))
    slot, _ = live.sampling.slot(segment, 0, config.cache.views)
    views = live.sampling.views(live.images, rows, ring.view_at(slot))
    images, ids = (part.to(config.train.device) for part in views)
    with autocast(config.train.device, config.train.precision):
        found = model.frozen_features(images, ids, config.mask.groups)
    read = cached.cache.read(rows, slot)
    wants = torch.cat(found, dim=1).float().cpu()
    has = torch.cat([read.features_BLD, *([] if read.prefix_BSD is None else [read.prefix_BSD])], dim=1)
    return comparison(stage, cached.cache, has, wants, loss(cached), loss(live))


def compare_finetune(tuning: Tuning) -> Comparison:
    """The first batch of fine-tuning behind frozen blocks, read and recomputed.

    Its heads start so near to 0 that any features would have the same loss; here they have weights of usual size.
    """
    wanted, config, segment = tuning.wanted, tuning.wanted.config, tuning.segment
    device, precision = config.train.device, config.train.precision
    torch.set_num_threads(config.train.threads)
    model = make_classifier(tuning, checked_start(tuning)).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(config.seed)
        for head in model.in_order:
            weight = head.linear.weight
            weight.copy_(torch.randn(weight.shape) / weight.shape[1] ** 0.5)
    cached = source_of(tuning)
    assert isinstance(cached, CachedPrefix)
    views = LiveViews(wanted.data.train, cached.lessons)
    read = cached.load(segment, 0).to(device)
    computed = live_prefix(views, model, segment, 0, config.finetune.views, precision)

    def loss(inputs: Labelled) -> float:
        (whole,) = inputs.split(1)
        with torch.no_grad(), autocast(device, precision):
            return float(model(cached.mask(model, whole)).sum())

    has, wants = (
        torch.cat([inputs.values, *([] if inputs.prefix_BRD is None else [inputs.prefix_BRD])], dim=1).float().cpu()
        for inputs in (read, computed)
    )
    return comparison("finetune", cached.cache, has, wants, loss(read), loss(computed))


def comparison(
    what: int | str, cache: CacheReader, has: Tensor, wants: Tensor, cached_loss: float, live_loss: float
) -> Comparison:
    """Features as they are cached against those that are wanted, and the losses of both."""
    difference = has - wants
    rmse, largest = float(difference.norm() / wants.norm()), float(difference.abs().max())
    manifest = cache.manifest
    return Comparison(what, manifest.spec.cut, rmse, largest, cached_loss, live_loss, manifest.accumulated_error)
