"""What a run would cost on a machine: seconds by stage and arm, disk, memory, money. A pure function of settings,
device profile and number of images: nothing is measured, read or written here, so that what is here and what is not
is planned by the same code. Stands between a profile, or what `gauge` has measured of this very run, and the plan
that `costs` shows. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cache.layout import Layout
from cache.size import cache_bytes
from models.config import IMAGE_TARGETS, learning_heads
from pipeline.config import PipelineConfig
from pipeline.decide import Wanted, new_needs
from pipeline.layout import RunPaths
from pipeline.memory import build_bytes, peak_bytes
from pipeline.needs import Need
from pipeline.profile import TERA, DeviceProfile
from pipeline.speedup import break_even
from stages.compiling import worth_compiling
from stages.flops import block_flops
from stages.images import Data, ImageList
from stages.segment import Segment, as_end_to_end

ARMS = ("e2e", "freeze", "cached")
NOWHERE = RunPaths(Path("no-run"))
GIGA = 1e9


@dataclass(frozen=True)
class Counted(ImageList):
    """Images of which only the number is known."""

    count: int = 0

    def __len__(self) -> int:
        return self.count

    @property
    def digest(self) -> str:
        return ""


def counted(images: int) -> Data:
    def read(entry: object) -> bytes:
        raise AssertionError("a plan on paper reads no image")

    listed = Counted((), (), (), read, count=images)
    return Data(listed, listed)


@dataclass(frozen=True)
class OnPaper(Wanted):
    """A run over so many training images that need not be there, before anything of it has run."""

    images: int = 1

    @cached_property
    def data(self) -> Data:
        return counted(self.images)


def on_paper(config: PipelineConfig, images: int) -> OnPaper:
    """The run that the settings ask for over so many images."""
    return OnPaper(config, NOWHERE, images)


@dataclass(frozen=True)
class StageCost:
    """Predicted cost of a stage. Seconds of training by arm, of building its caches, and the caches' bytes."""

    stage: int
    cut: int
    epochs: float
    state: str
    e2e_seconds: float
    freeze_seconds: float
    cached_seconds: float
    cache_seconds: float
    """With all turns of a ring of views, of which `turns` has the epochs of the stage before which they are, and what
    one of them takes."""
    cache_bytes: int
    turns: tuple[float, ...] = ()
    turn_seconds: float = 0.0
    waits: tuple[str, ...] = ()
    """The arms whose steps wait for their inputs, since loading takes longer."""
    live: bool = False
    """Whether it runs its frozen blocks live for want of disk, which `cached_seconds` then counts."""
    images: int = 0
    """Images trained on, views of one image counted as often as they are."""
    e2e_memory_bytes: int = 0
    """Most that training takes on the device at once: weights, gradients, moments, activations, a batch."""
    freeze_memory_bytes: int = 0
    cached_memory_bytes: int = 0
    build_memory_bytes: int = 0
    """The same of the host while its caches are built: two shards and their batches."""

    def seconds(self, arm: str) -> float:
        """Training, and for `cached` the caches."""
        return float(getattr(self, f"{arm}_seconds")) + (self.cache_seconds if arm == "cached" else 0.0)

    def images_per_second(self, arm: str) -> float | None:
        """Of training alone; None for a stage of no epoch."""
        seconds = float(getattr(self, f"{arm}_seconds"))
        return self.images / seconds if seconds else None

    def to_dict(self, profile: DeviceProfile) -> dict[str, Any]:
        """The stage as plan.json holds it, with rates and, where the price is known, money."""
        found = dict(vars(self)) | {f"{arm}_images_per_second": self.images_per_second(arm) for arm in ARMS}
        if profile.price_per_hour:
            found |= {f"{arm}_money": money(self.seconds(arm), profile) for arm in ARMS}
        return found


def money(seconds: float, profile: DeviceProfile) -> float:
    return seconds / 3600 * profile.price_per_hour


class Prices(Protocol):
    """What steps and caches cost: by a profile, or measured of the very run."""

    @property
    def profile(self) -> DeviceProfile: ...

    def compute(self, stage: int, part: Segment, arm: str) -> float:
        """Seconds of an optimiser step: on inputs in memory, or loading them as well."""
        ...

    def loads(self, stage: int, arm: str) -> bool:
        """Whether `compute` has the loading in it."""
        ...

    def build(self, need: Need, views: int) -> float:
        """Seconds of building so many views of a cache."""
        ...


def stage_costs(wanted: Wanted, prices: Prices, states: Sequence[str] = ()) -> list[StageCost]:
    """Every stage of the plan; `states` says how each stands, where there is a run."""
    return [
        stage_cost(wanted, prices, stage, states[stage] if states else "planned")
        for stage in range(len(wanted.segments))
    ]


def stage_cost(wanted: Wanted, prices: Prices, stage: int, state: str = "planned") -> StageCost:
    """One stage: its steps and its caches, scaled to its length."""
    segment, parts = wanted.segments[stage], wanted.parts(stage)
    ways = {"e2e": as_end_to_end([segment]), "freeze": parts, "cached": parts}
    if not stage:  # the same for all arms
        ways = {arm: parts for arm in ARMS}
        seconds = dict.fromkeys(ARMS, training(wanted, prices, stage, parts, "freeze"))
    else:
        seconds = {arm: training(wanted, prices, stage, ways[arm], arm) for arm in ARMS}
    needs, views = new_needs(wanted, stage), wanted.config.cache.views
    build = sum(prices.build(need, views) for need in needs)
    begun, *turned = wanted.starts(parts, stage).values()
    turns = tuple(epoch - begun for epoch in turned) if needs else ()
    turn = prices.build(needs[0], 1) if turns else 0.0  # a ring makes one view more at every turn
    memory = {arm: max(peak_bytes(wanted, stage, part, arm) for part in ways[arm]) for arm in ARMS}
    if turns and wanted.config.cache.refresh_ahead and not wanted.config.cluster.remote:
        memory["cached"] += build_bytes(wanted, needs[0]) if wanted.config.train.device == "cpu" else 0  # at once
    return StageCost(
        stage=stage,
        cut=segment.cut,
        epochs=segment.steps / segment.steps_per_epoch,
        state=state,
        e2e_seconds=seconds["e2e"],
        freeze_seconds=seconds["freeze"],
        cached_seconds=seconds["cached"],
        cache_seconds=build + len(turns) * turn,
        turns=turns,
        turn_seconds=turn,
        cache_bytes=sum(cache_bytes(wanted.layout(need)) for need in needs),
        waits=tuple(arm for arm in ARMS if any(waiting(wanted, prices, stage, part, arm) for part in ways[arm])),
        live=bool(stage) and stage not in wanted.cached_stages,
        images=segment.steps * wanted.config.train.batch_size,
        e2e_memory_bytes=memory["e2e"],
        freeze_memory_bytes=memory["freeze"],
        cached_memory_bytes=memory["cached"],
        build_memory_bytes=max((build_bytes(wanted, need) for need in needs), default=0),
    )


def training(wanted: Wanted, prices: Prices, stage: int, parts: Sequence[Segment], arm: str) -> float:
    """Seconds of training a stage's parts in an arm, loading beside the steps and, where it is on, compiling first."""
    return sum(
        part_seconds(
            wanted, prices.profile, stage, part, arm, prices.compute(stage, part, arm), prices.loads(stage, arm)
        )
        for part in parts
        if part.steps
    )


def waiting(wanted: Wanted, prices: Prices, stage: int, part: Segment, arm: str) -> bool:
    """Whether loading a step's inputs takes longer than the step."""
    train, profile = wanted.config.train, prices.profile
    load = load_of(wanted, profile, stage, part, arm)
    return bool(part.steps) and train.batch_size * load.alone(train.loader_threads, profile) > prices.compute(
        stage, part, arm
    )


def part_seconds(
    wanted: Wanted,
    profile: DeviceProfile,
    stage: int,
    part: Segment,
    arm: str,
    compute: float,
    loads: bool = False,
) -> float:
    """Seconds of a part whose step takes `compute` seconds on inputs in memory, or, if it `loads`, in all."""
    train, start = wanted.config.train, 0.0
    if worth_compiling(train, part.steps, bool(train.drop_path or train.layer_drop)):
        compute *= profile.compile_gain
        start = profile.compile_seconds * (wanted.identity["depth"] - part.cut)
    load = Load(0.0) if loads else load_of(wanted, profile, stage, part, arm)
    threads = (train.batch_size * load.seconds, train.loader_threads)
    return start + part.steps * beside(profile, compute, [threads], train.batch_size * load.bytes)


def beside(profile: DeviceProfile, compute: float, work: Sequence[tuple[float, int]], read: float = 0.0) -> float:
    """Seconds of computing while threads of the host do other work: the slowest of them bounds, and so do all cores
    together, of which computing on a CPU keeps some busy.

    work: seconds of one thread, and how many threads share them; read: bytes that the disk must give meanwhile.
    """
    bounds = [compute, read / profile.disk_rate, *(seconds / min(threads, profile.cores) for seconds, threads in work)]
    return max(*bounds, (compute * profile.busy_cores + sum(seconds for seconds, _ in work)) / profile.cores)


# --- what a step loads ------------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What loading one image takes."""

    seconds: float
    """Of one thread."""
    bytes: float = 0.0
    """From the disk of the caches."""

    def alone(self, threads: int, profile: DeviceProfile) -> float:
        """Seconds if nothing else ran."""
        return max(self.seconds / min(threads, profile.cores), self.bytes / profile.disk_rate)


def load_of(wanted: Wanted, profile: DeviceProfile, stage: int, part: Segment, arm: str) -> Load:
    """What loading an image of a step takes: cutting a view, or reading the row of every cache that the stage needs."""
    if arm != "cached" or stage not in wanted.cached_stages:
        return Load(profile.crop_seconds)
    targets = {head.target for head in learning_heads(wanted.heads_of(stage), part.cut, part.entry)}
    whole = "features" in targets or (wanted.config.teacher.kind == "ema" and "teacher" in targets)
    features, *teachers = wanted.needs(stage)
    rows = [read_row(profile, wanted.layout(features), whole)]
    rows += [read_row(profile, wanted.layout(need)) for need in teachers]
    recut = targets & set(IMAGE_TARGETS) and not features.draft.pixels
    seconds = sum(row.seconds for row in rows) + (profile.crop_seconds if recut else 0.0)
    return Load(seconds, sum(row.bytes for row in rows))


def read_row(profile: DeviceProfile, layout: Layout, whole: bool = True) -> Load:
    """Reading and restoring one image's row: all token groups or one."""
    spec = layout.spec
    share = 1.0 if whole else 1 / spec.groups
    size, values = row_bytes(layout, share), share * spec.num_tokens * spec.width
    return Load(size / profile.read_rate + values / (profile.codec(spec.codec).restore * GIGA), size)


def row_bytes(layout: Layout, share: float = 1.0) -> float:
    """Bytes of one image's row of one view; of arrays that are split by groups so large a share."""
    return sum(
        array.splits * array.chunk_bytes * (share if array.splits > 1 else 1.0) for array in layout.arrays
    )


# --- by a profile -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnProfile:
    """Prices by a device profile alone."""

    wanted: Wanted
    profile: DeviceProfile

    def compute(self, stage: int, part: Segment, arm: str) -> float:
        cached = arm == "cached" and stage in self.wanted.cached_stages
        live = arm == "cached" and stage > 0 and not cached
        frozen = self.frozen_step(stage, part, cached, live)
        return self.learning_step(stage, part) + self.wanted.config.train.batch_size * frozen

    def loads(self, stage: int, arm: str) -> bool:
        """See Prices."""
        return False

    def learning_step(self, stage: int, part: Segment) -> float:
        """Seconds of what learns in a step, and of what a step takes besides."""
        wanted, profile, work = self.wanted, self.profile, self.wanted.work
        tokens, learning = work.visible + wanted.identity["prefix"], work.depth - part.cut
        heads = learning_heads(wanted.heads_of(stage), part.cut, part.entry)
        rate, decoder = profile.rate(work.width, tokens), profile.rate(work.decoder_width, work.decoded)
        image = 3 * learning * block_flops(tokens, work.width) / (rate.learning * TERA)
        image += 3 * len(heads) * work.decoder / (decoder.learning * TERA)
        if wanted.config.teacher.kind == "ema" and any(head.teacher for head in heads):
            image += learning * self.block(work.tokens + wanted.identity["prefix"])
        update = learning_parameters(wanted, stage, part) / profile.optimizer_rate
        return wanted.config.train.batch_size * image + update + profile.step_seconds

    def frozen_step(self, stage: int, part: Segment, cached: bool, live: bool) -> float:
        """Seconds that one image's frozen blocks, embedding and frozen teacher take of a step."""
        wanted, work, prefix = self.wanted, self.wanted.work, self.wanted.identity["prefix"]
        if cached:
            return part.in_place * self.block(work.visible + prefix)
        seconds = self.embed * (1 if part.cut else 2)
        if wanted.reads_features(part) or live:
            groups = work.groups if wanted.reads_features(part) else 1
            seconds += part.cut * groups * self.block(work.tokens // work.groups + prefix)
        else:
            seconds += part.cut * self.block(work.visible + prefix)
        if stage and (taught := wanted.teacher_blocks(stage)):
            seconds += self.embed + taught[-1] * self.block(work.tokens + prefix)
        return seconds

    def block(self, tokens: int) -> float:
        """Seconds of a frozen block's forward over one image's tokens."""
        width = self.wanted.work.width
        return block_flops(tokens, width) / (self.profile.rate(width, tokens).frozen * TERA)

    @property
    def embed(self) -> float:
        return self.wanted.work.embedding / (self.profile.embed_tflops * TERA)

    def build(self, need: Need, views: int) -> float:
        return self.profile.start_seconds + views * len(self.wanted.data.train) * self.row_seconds(need)

    def row_seconds(self, need: Need) -> float:
        """Seconds for one view of one image: the frozen blocks, while other threads load the next batches, round the
        shard before, and checksum, hash and write it."""
        profile, spec, layout = self.profile, need.draft, self.wanted.layout(need)
        forward = 0.0 if need.parent else self.embed
        forward += (spec.cut - need.start) * spec.groups * self.block(spec.num_tokens // spec.groups + spec.prefix)
        parent = need.parent
        load = read_row(profile, self.wanted.layout(parent)) if parent else Load(profile.crop_seconds)
        stored = spec.num_tokens * spec.width / (profile.codec(spec.codec).round * GIGA)
        written = row_bytes(layout) / profile.write_rate
        threads = self.wanted.config.train.loader_threads
        return beside(profile, forward, [(load.seconds, threads), (stored, 1), (written, 1)], load.bytes)


def learning_parameters(wanted: Wanted, stage: int, part: Segment) -> int:
    """Parameters that learn: 12 D² a block, its biases and norms left out; those of every decoder; the embedding."""
    work = wanted.work
    heads = learning_heads(wanted.heads_of(stage), part.cut, part.entry)
    decoder = work.decoder_depth * 12 * work.decoder_width**2
    decoder += work.decoder_width * (2 * work.width + work.patch_values)
    embedding = 0 if part.cut else work.patch_values * work.width
    return (work.depth - part.cut) * 12 * work.width**2 + len(heads) * decoder + embedding


# --- the run as a whole -----------------------------------------------------------------------------------------------


def totals(costs: Sequence[StageCost]) -> dict[str, Any]:
    """The plan as a whole. Evaluation is left out, as it is from training time."""
    slow, fast, epoch = [(0.0, 0.0)], [(0.0, 0.0)], 0.0
    for cost in costs:
        before = fast[-1][1] + cost.cache_seconds - len(cost.turns) * cost.turn_seconds
        fast.append((epoch, before))
        for count, turn in enumerate(cost.turns):
            reached = before + cost.cached_seconds * turn / cost.epochs + count * cost.turn_seconds
            fast += [(epoch + turn, reached), (epoch + turn, reached + cost.turn_seconds)]
        epoch += cost.epochs
        slow.append((epoch, slow[-1][1] + cost.e2e_seconds))
        fast.append((epoch, before + cost.cached_seconds + len(cost.turns) * cost.turn_seconds))
    return {
        "e2e_seconds": slow[-1][1],
        "freeze_seconds": sum(cost.freeze_seconds for cost in costs),
        "cached_seconds": fast[-1][1],
        "speedup_total": slow[-1][1] / fast[-1][1] if fast[-1][1] else math.nan,
        "break_even_epoch": break_even(slow, fast),
        "cache_bytes": sum(cost.cache_bytes for cost in costs),
        "memory_bytes": {
            arm: max(getattr(cost, f"{arm}_memory_bytes") for cost in costs) for arm in ARMS
        },
    }


def predict(config: PipelineConfig, profile: DeviceProfile, images: int) -> list[StageCost]:
    """The plan of settings over so many images on a machine, stage by stage."""
    wanted = on_paper(config, images)
    return stage_costs(wanted, OnProfile(wanted, profile))
