"""How much disk the caches of a run take at the same time, and which stages get one when `cache.budget_gb` bounds it:
those that save the most frozen FLOPs. A pure function of settings and sizes, never of the free space that there happens
to be. Stands between the needs of the stages and the runner. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cache.place import is_remote
from cache.size import cache_bytes
from models.config import learning_heads
from pipeline.needs import Need
from stages.flops import block_flops

if TYPE_CHECKING:
    from pipeline.decide import Wanted


@dataclass(frozen=True)
class Candidate:
    """What the caches of a stage take, in bytes, and save, in FLOPs."""

    stage: int
    features: int
    beside: int
    """The caches of its frozen teacher."""
    saving: int


@dataclass(frozen=True)
class Way:
    """A choice among the stages so far: what lies on disk when the next cache is built, and what is saved."""

    stages: tuple[int, ...] = ()
    held: int = 0
    saving: int = 0


def choose(candidates: Sequence[Candidate], budget: float, keep_all: bool) -> tuple[int, ...]:
    """The stages whose caches, never more than `budget` bytes at once, save the most; of equals those that hold less.

    Exact: what may follow depends only on the bytes that are held, so a choice that holds more and saves less than
    another is dropped. Where only what is needed is kept, a stage's caches lie beside the one that they continue; else
    beside all before them, and the teacher's caches of the first serve all.
    """
    ways = [Way()]
    for one in candidates:
        longer = []
        for way in ways:
            at_once = way.held + one.features + (0 if keep_all and way.stages else one.beside)
            if at_once <= budget:
                held = at_once if keep_all else one.features
                longer.append(Way((*way.stages, one.stage), held, way.saving + one.saving))
        ways = list(_best(ways + longer))
    return max(ways, key=lambda way: (way.saving, -way.held)).stages


def _best(ways: list[Way]) -> Iterator[Way]:
    most = -1
    for way in sorted(ways, key=lambda way: (way.held, -way.saving, way.stages)):
        if way.saving > most:
            most = way.saving
            yield way


def cached_stages(wanted: Wanted) -> tuple[int, ...]:
    """The stages that get caches, ascending; all, unless `cache.over_budget=live` lets some run live."""
    cache, stages = wanted.config.cache, range(1, wanted.candidates)
    if cache.over_budget == "refuse":
        return tuple(stages)
    return choose([candidate(wanted, stage) for stage in stages], cache.budget_gb * 1e9, cache.keep == "all")


def candidate(wanted: Wanted, stage: int) -> Candidate:
    """What the caches of a stage take and save: the forward of what is frozen, for every image that it trains on. How
    long an adaptive stage will be nobody knows; each counts with an equal share of the epochs."""
    features, *teachers = (wanted.draft_spec(stage), *wanted.teacher_drafts(stage))
    steps = wanted.total_steps // wanted.candidates if wanted.adaptive else wanted.segments[stage].steps
    work, cut, taught = wanted.work, wanted.cut(stage), wanted.teacher_blocks(stage)
    flops = work.prefix(cut, reads_all(wanted, stage))
    if taught:
        flops += work.embedding + taught[-1] * block_flops(work.tokens, work.width)
    return Candidate(
        stage=stage,
        features=cache_bytes(wanted.layout(Need("", stage - 1, features))),
        beside=sum(cache_bytes(wanted.layout(Need("", 0, teacher))) for teacher in teachers),
        saving=flops * steps * wanted.config.train.batch_size,
    )


def reads_all(wanted: Wanted, stage: int) -> bool:
    """Whether a step needs the features of all groups of a view, because a target is made of them."""
    targets = {head.target for head in learning_heads(wanted.heads, wanted.cut(stage))}
    return "features" in targets or (wanted.config.teacher.kind == "ema" and "teacher" in targets)


def still_needed(stages: Sequence[Sequence[Need]], there: Collection[Need]) -> set[Need]:
    """The caches that stages read, given by stage, and those from which the ones that are not there are built."""
    found: set[Need] = set()
    for need in (need for needs in stages for need in needs):
        while need not in found:
            found.add(need)
            if need in there or need.parent is None:
                break
            need = need.parent
    return found


@dataclass(frozen=True)
class Sizes:
    """Bytes of caches, by need."""

    whole: Callable[[Need], int]
    turn: Callable[[Need], int] = lambda need: 0
    """What the next turns of its ring of views take besides, until the cache before is removed."""
    begun: Mapping[Need, int] = field(default_factory=dict)
    """What lies on disk of those that are not finished: a part of `whole`."""


def sizes_of(wanted: Wanted) -> Sizes:
    """The sizes of a run's caches."""

    def turn(need: Need) -> int:
        beside = 0 if need.tunes else wanted.views_beside(need.stage)
        layout = wanted.layout(need)
        each = layout.spec.views if is_remote(wanted.paths.cache_root) else 1  # an object store has no links: copies
        return beside * cache_bytes(replace(layout, spec=replace(layout.spec, views=each)))

    return Sizes(lambda need: cache_bytes(wanted.layout(need)), turn)


def course_of_disk(
    stages: Sequence[Sequence[Need]], there: Collection[Need], sizes: Sizes, keep_all: bool
) -> tuple[int, list[Need]]:
    """The most bytes of caches at any moment while stages run, the caches of each given, and what is built on the way.

    `there` are those that lie on disk at the start. It does what the runner does: parents first, and, unless all are
    kept, nothing stays that no later stage needs. While a stage trains, its ring makes new views beside the others.
    """
    disk, built, begun = set(there), [], dict(sizes.begun)
    if not keep_all:
        disk &= still_needed(stages, disk)

    def taken() -> int:
        return sum(map(sizes.whole, disk)) + sum(begun.values())

    most = taken()

    def build(need: Need, left: Sequence[Sequence[Need]]) -> None:
        nonlocal disk, most
        if need in disk:
            return
        if need.parent:
            build(need.parent, left)
        disk.add(need)
        built.append(need)
        begun.pop(need, None)
        most = max(most, taken())
        if not keep_all:
            disk &= still_needed(left, disk)

    for place, needs in enumerate(stages):
        if not keep_all:
            disk &= still_needed(stages[place:], disk)
        for need in needs:
            build(need, stages[place:])
        most = max(most, taken() + sum(map(sizes.turn, needs)))
    return most, built


def budget_lines(wanted: Wanted) -> Iterator[str]:
    """Which stages go without a cache, and what the others take of the budget."""
    cache, stages = wanted.config.cache, [wanted.needs(stage) for stage in range(1, wanted.candidates)]
    if not cache.budget_gb:
        return
    most, _ = course_of_disk(stages, (), sizes_of(wanted), cache.keep == "all")
    yield (
        f"caches take {most / 1e9:,.3g} GB at once of cache.budget_gb = {cache.budget_gb:g} (cache.keep = {cache.keep})"
    )
    for stage in range(1, wanted.candidates):
        if stage not in wanted.cached_stages:
            one = candidate(wanted, stage)
            yield (
                f"stage {stage}: no cache, its {(one.features + one.beside) / 1e9:,.3g} GB do not fit beside "
                f"the others; the {wanted.cut(stage)} frozen blocks run live (cache.over_budget=live)"
            )
