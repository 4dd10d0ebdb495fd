"""A rehearsal of a run on the machine that it is to run on: every kind of training step once, and of every cache a
few shards, built by the code that builds the real one, in a folder that is removed again. What `plan` prices a run
by that is here; `predict` makes stages of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from cache.layout import Layout
from cache.writer import NO_LIMIT
from models.spec import FeatureSpec
from models.vit import build_encoder, frozen_hash
from pipeline.building import job_of
from pipeline.cluster import task_runner
from pipeline.decide import Wanted, new_needs
from pipeline.gauge import live_seconds, step_seconds
from pipeline.needs import Need
from pipeline.predict import OnProfile
from pipeline.profile import DeviceProfile
from pipeline.scratch import disk_folder, scratch
from stages.encode import build
from stages.segment import Segment

SHARD_SECONDS, SHARDS = 0.5, 3
"""About how long a shard of a rehearsal takes, if those of the run are no smaller, and how many there are: the first
fills the line, the others tell its pace."""


class Built(NamedTuple):
    """What building a small cache took."""

    rows: int
    seconds: float
    row_seconds: float
    """Of one more row, once the line is full."""

    def total(self, rows: int) -> float:
        """Seconds of so many rows."""
        return max(0.0, self.seconds + (rows - self.rows) * self.row_seconds)

    @property
    def start(self) -> float:
        """What it takes besides its rows."""
        return self.total(0)


@dataclass(frozen=True)
class Rehearsed:
    """Prices of this very run on this very machine."""

    wanted: Wanted
    profile: DeviceProfile
    builds: dict[FeatureSpec, Built]
    """By draft of a cache."""
    steps: dict[tuple[Any, ...], float] = field(default_factory=dict)
    """Seconds of the steps that were measured: stages and arms whose steps are the same share one."""

    def compute(self, stage: int, part: Segment, arm: str) -> float:
        wanted = self.wanted
        cached, live = arm == "cached" and stage in wanted.cached_stages, arm == "cached" and stage > 0
        taught = wanted.teacher_blocks(stage) if stage else ()
        masked = part.first_step + part.steps // 2 if wanted.config.mask.changes else 0
        key = (part.cut, part.entry, cached, live, taught, masked, wanted.heads_of(stage), wanted.reads_features(part))
        if key not in self.steps:
            measure = live_seconds if self.loads(stage, arm) else step_seconds
            self.steps[key] = measure(wanted, stage, part, arm)
        return self.steps[key]

    def loads(self, stage: int, arm: str) -> bool:
        """Images are here and are cut beside the steps; features are not here yet."""
        return arm != "cached" or not stage or stage not in self.wanted.cached_stages

    def build(self, need: Need, views: int) -> float:
        found = self.builds.get(need.draft)
        rows = views * len(self.wanted.data.train)
        return found.total(rows) if found else OnProfile(self.wanted, self.profile).build(need, views)


def rehearse(wanted: Wanted, profile: DeviceProfile) -> Rehearsed:
    """Build a little of every cache that the stages need; steps are measured as they are asked for. The profile's
    start-up of a cache becomes what it then was."""
    builds = {} if wanted.config.cluster.address else measure_builds(wanted, profile)
    if builds:
        starts = [built.start for built in builds.values()]
        profile = replace(profile, start_seconds=sum(starts) / len(starts))
    return Rehearsed(wanted, profile, builds)


def measure_builds(wanted: Wanted, profile: DeviceProfile) -> dict[FeatureSpec, Built]:
    """What a small cache of every need takes, each continuing the small one of its parent. The weights are a fresh
    encoder's: speed only."""
    needs = [need for stage in range(1, len(wanted.segments)) for need in new_needs(wanted, stage)]
    if not needs:
        return {}
    found: dict[FeatureSpec, Built] = {}
    model = OnProfile(wanted, profile)
    slowest = max(model.row_seconds(need) for need in needs)
    rows = max(1, min(wanted.config.cache.shard_rows, round(SHARD_SECONDS / slowest)))
    count = min(len(wanted.data.train), SHARDS * rows)
    with scratch(disk_folder(wanted)) as folder:
        state = build_encoder(wanted.config.model, wanted.config.seed).vit.state_dict()
        weights = folder / "model.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, weights)
        specs: dict[FeatureSpec, FeatureSpec] = {}
        for number, need in enumerate(needs):
            own = replace(need.draft, views=1, weights=frozen_hash(state, need.draft.cut))
            parent = specs[need.parent.draft] if need.parent else None
            spec = specs[need.draft] = replace(own, parent=parent.fingerprint if parent else "")
            layout = replace(wanted.layout(need), spec=spec, num_samples=count, shard_rows=rows)
            before = needs.index(need.parent) if need.parent else -1
            found[need.draft] = built(wanted, need, layout, folder, number, before, weights)
    return found


def built(
    wanted: Wanted, need: Need, layout: Layout, folder: Path, number: int, parent: int, weights: Path
) -> Built:
    """Build a small cache in `folder`, as number so and so, from the one before of a number (-1: from images)."""
    continued = str(folder / str(parent)) if parent >= 0 else None
    job = job_of(wanted, need, layout, str(weights.absolute()), str(folder / str(number)), continued)
    job = replace(job, limit=NO_LIMIT)  # what a fresh encoder's features lose says nothing of a trained one's
    images = wanted.data.train.only(range(layout.num_samples))
    started, marks = time.perf_counter(), []
    with task_runner(wanted.config.cluster, wanted.config.train.device) as run:
        for done, _ in build(job, images, run):
            marks.append((rows_of(layout, done), time.perf_counter()))
    return paced(layout.num_samples, time.perf_counter() - started, marks)


def rows_of(layout: Layout, shards: int) -> int:
    return sum(shard.rows for shard in layout.shards[:shards])


def paced(rows: int, seconds: float, marks: Sequence[tuple[int, float]]) -> Built:
    """marks: (rows done, when) after every shard. The pace is that from the first mark to the last."""
    (first, begun), (last, ended) = marks[0], marks[-1]
    pace = (ended - begun) / (last - first) if last > first else math.nan
    if not pace > 0:
        pace = seconds / rows
    return Built(rows, seconds, min(pace, seconds / rows))
