"""Which freeze events deserve a cache, in seconds, and which mode, codec and number of views would be fastest or
smallest. Advice only: what runs is decided by settings alone, and every piece of advice comes with the settings
that choose it. Stands between `predict` and what `costs` prints. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

from cache.config import Codec
from cache.errors import CacheError
from cache.size import cache_bytes
from models.spec import FeatureSpec
from pipeline.budget import Candidate, candidate, choose, course_of_disk, sizes_of
from pipeline.checks import check
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted
from pipeline.needs import Need
from pipeline.predict import OnPaper, OnProfile, on_paper, part_seconds, stage_costs
from pipeline.profile import ENDLESS, DeviceProfile
from stages.schedule import freeze_events
from stages.segment import Segment

GROUPS = (1, 2, 4)
LEAK = "mask.groups=1 leaks: visible features have attended to hidden tokens; judge it by probes, never by its loss"


@dataclass(frozen=True)
class Selection:
    """Freeze events, counted from 1, that get a cache; what the run then takes after stage 0."""

    seconds: float
    chosen: tuple[int, ...]
    bytes: int
    """Caches that lie on disk at the same time, at most."""


class Entry(NamedTuple):
    """The last cache built."""

    event: int = 0
    """Whose it is; 0: there is none, only images."""
    later: bool = False
    """Whether there was one before it, so that its codec may be another."""


@dataclass(frozen=True)
class _Way:
    seconds: float = 0.0
    held: int = 0
    """Bytes that lie there when the next cache is built."""
    here: int = 0
    """The same while a stage trains, its ring at rest."""
    most: int = 0
    chosen: tuple[int, ...] = ()


def choose_caches(
    events: int,
    train: Callable[[Entry, int], float],
    build: Callable[[Entry, int], float],
    size: Callable[[Entry, int], int],
    budget: float,
    keep_all: bool = True,
    beside: int = 0,
    ring: Callable[[Entry, int], int] = lambda entry, event: 0,
    continued: bool = True,
) -> Selection:
    """The caches with which training and building take fewest seconds and never more than `budget` bytes at once.

    train(entry, event): seconds from an event to the next behind the last cache built, its own or an earlier event's.
    build(entry, event): seconds of building its cache after that one; size(entry, event): bytes of it; `beside` those
    of a frozen teacher. ring(entry, event): bytes that new views of the last cache take besides until the next event.
    Where only what is needed is kept, a cache lies beside the teacher's and, if it is `continued`, the one before; else
    beside all before it.

    Exact, by dynamic programming over the cuts: what may follow depends only on the last cache and on the bytes held,
    so of ways that end with the same cache one that is slower and holds no less is dropped. Among equals fewer caches.
    """
    ways: dict[Entry, list[_Way]] = {Entry(): [_Way()]}
    for event in range(1, events + 1):
        longer: dict[Entry, list[_Way]] = {}
        for entry, some in ways.items():
            whole, own = size(entry, event), Entry(event, entry.event > 0)
            for way in some:
                at_once = way.held + whole + (0 if keep_all and way.chosen else beside)
                here = at_once if keep_all else whole + beside
                held = at_once if keep_all else whole * continued
                seconds = way.seconds + build(entry, event)
                built = _Way(seconds, held, here, max(way.most, at_once), (*way.chosen, event))
                longer.setdefault(own, []).append(built)
        for entry, some in (ways | longer).items():
            seconds, more = train(entry, event), ring(entry, event)
            done = [replace(w, seconds=w.seconds + seconds, most=max(w.most, w.here + more)) for w in some]
            ways[entry] = _undominated(way for way in done if way.most <= budget)
    every = [way for some in ways.values() for way in some]
    best = min(every, key=lambda way: (way.seconds, len(way.chosen), way.most))
    return Selection(best.seconds, best.chosen, best.most)


def _undominated(ways: Iterable[_Way]) -> list[_Way]:
    """The ways of which none other is as fast and holds as little, fastest first."""
    found: list[_Way] = []
    for way in sorted(ways, key=lambda way: (way.seconds, way.held, len(way.chosen), way.most)):
        if not found or way.held < found[-1].held:
            found.append(way)
    return found


# --- the events of a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Events:
    """The freeze events of a run as the choice sees them."""

    wanted: OnPaper
    profile: DeviceProfile
    marks: tuple[Segment, ...]
    """Training from an event to the next."""
    in_place: bool
    """Whether blocks freeze in place behind an earlier cache; else a stage without its own cache runs them live."""
    train_scale: float = 1.0
    build_scale: float = 1.0
    """Measured over modelled seconds, of a run that is here."""

    def draft(self, event: int, later: bool) -> FeatureSpec:
        """An event's cache. Stages are those that have caches where blocks freeze in place, else every event's."""
        wanted = self.wanted
        stored = wanted.config.cache.stored(later=later if self.in_place else event > 1)
        return replace(wanted.draft_spec(0), cut=self.marks[event - 1].cut, **stored)

    def need(self, entry: Entry, event: int) -> Need:
        """The cache of an event after the last one built, which it continues unless it has a ring of views."""
        continues = entry.event and not self.refresh
        parent = Need("", 0, self.draft(*entry)) if continues else None
        return Need("", 0, self.draft(event, entry.event > 0), parent)

    def train(self, entry: Entry, event: int) -> float:
        """Seconds from an event to the next: cached, in place, or live; with the turns of an earlier event's ring."""
        wanted, part = self.wanted, self.marks[event - 1]
        prices, batch = OnProfile(wanted, self.profile), wanted.config.train.batch_size
        cached = entry.event == event or (self.in_place and entry.event > 0)
        if cached:
            part = replace(part, in_place=part.cut - self.marks[entry.event - 1].cut)
        else:
            part = replace(part, in_place=part.cut if self.in_place else 0)
        stage = event
        if self.in_place:  # stage 0 goes on until the first cache
            stage = min(1, len(wanted.segments) - 1) if cached else 0
        frozen = prices.frozen_step(stage, part, cached, live=not cached and not self.in_place)
        compute = prices.learning_step(stage, part) + batch * frozen
        arm = "cached" if cached and stage in wanted.cached_stages else "freeze"
        read = self.reading(entry.later) if self.in_place else wanted
        seconds = self.train_scale * part_seconds(read, self.profile, stage, part, arm, compute)
        if cached and entry.event < event and (turns := self.turns(entry.event, event)):
            seconds += self.build_scale * turns * prices.build(Need("", 0, self.draft(*entry)), 1)
        return seconds

    def reading(self, later: bool) -> OnPaper:
        """The run whose stage 1 reads what a later one does, or as it is."""
        config, cache = self.wanted.config, self.wanted.config.cache
        if not later or not cache.later_codec:
            return self.wanted
        return replace(self.wanted, config=replace(config, cache=replace(cache, codec=cache.later_codec)))

    def build(self, entry: Entry, event: int) -> float:
        """Seconds of building an event's cache, and of the turns of its ring until the next event; those of a frozen
        teacher come with the first."""
        prices, need, turns = OnProfile(self.wanted, self.profile), self.need(entry, event), self.turns(event, event)
        needs = (need, *(() if entry.event else self.teachers))
        seconds = sum(prices.build(one, self.wanted.config.cache.views) for one in needs)
        return self.build_scale * (seconds + (turns * prices.build(need, 1) if turns else 0.0))

    def size(self, entry: Entry, event: int) -> int:
        return cache_bytes(self.wanted.layout(self.need(entry, event)))

    def ring(self, entry: Entry, event: int) -> int:
        """Bytes of the views that the ring of the last cache has beside the others, at most, by the next event."""
        if not entry.event or not (self.in_place or entry.event == event):
            return 0
        turns = sum(self.turns(entry.event, one) for one in range(entry.event, event + 1))
        layout = self.wanted.layout(Need("", 0, self.draft(*entry)))
        ahead = max(1, self.wanted.config.cache.refresh_ahead)
        return min(turns, ahead) * cache_bytes(replace(layout, spec=replace(layout.spec, views=1)))

    @property
    def refresh(self) -> int:
        return self.wanted.config.cache.refresh

    def turns(self, entry: int, event: int) -> int:
        """How often the ring of the cache of `entry` turns between an event and the next; 0 where views stay."""
        mark = self.marks[event - 1]
        before = mark.first_epoch - self.marks[entry - 1].first_epoch
        after = before + -(-mark.steps // mark.steps_per_epoch)
        return (after - 1) // self.refresh - max(0, before - 1) // self.refresh if self.refresh else 0

    @property
    def teachers(self) -> list[Need]:
        wanted = self.wanted
        return list(wanted.teachers(wanted.cached_stages[0])) if wanted.cached_stages else []

    def select(self, budget: float) -> Selection:
        """The caches that deserve their disk."""
        beside = sum(cache_bytes(self.wanted.layout(need)) for need in self.teachers)
        keep_all = self.wanted.config.cache.keep == "all"
        sizes = (self.size, budget, keep_all, beside, self.ring, not self.refresh)
        return choose_caches(len(self.marks), self.train, self.build, *sizes)


def freeze_marks(wanted: Wanted) -> tuple[Segment, ...]:
    """Training from each freeze event to the next: of FreezeOut every event, of other schedules every later stage."""
    schedule, train = wanted.config.schedule, wanted.config.train
    if schedule.kind != "freezeout":
        return wanted.segments[1:]
    inside = freeze_events(schedule, wanted.work.depth, wanted.steps_per_epoch, train.warmup_epochs)
    cached = {(stage.first_epoch, stage.cut) for stage in wanted.plan[1:]}
    marks = sorted({*((event.epoch, event.cut) for event in inside), *cached})
    ends, steps = [*(epoch for epoch, _ in marks[1:]), sum(schedule.epochs)], wanted.steps_per_epoch
    return tuple(
        Segment(cut, epoch, end - epoch, epoch * steps, (end - epoch) * steps, steps)
        for (epoch, cut), end in zip(marks, ends, strict=True)
    )


def events_of(wanted: Wanted, profile: DeviceProfile, scales: tuple[float, float] = (1.0, 1.0)) -> Events:
    """The events of a run; every stage counts as one that could have a cache, whatever the budget."""
    cache = replace(wanted.config.cache, over_budget="refuse")
    open_run = on_paper(replace(wanted.config, cache=cache), len(wanted.data.train))
    in_place = wanted.config.schedule.kind == "freezeout"
    return Events(open_run, profile, freeze_marks(open_run), in_place, *scales)


def words_for(wanted: Wanted, events: Events, selection: Selection) -> str:
    """The settings that choose these caches; empty where the settings choose them as they are, and `none` where no
    settings do."""
    config, marks = wanted.config, events.marks
    cuts = [0, *(marks[event - 1].cut for event in selection.chosen)]
    if events.in_place:
        now = [stage.cut for stage in wanted.plan]
        return "" if now == cuts else f"schedule.caches=given schedule.cuts={str(cuts).replace(' ', '')}"
    if selection.chosen == tuple(wanted.cached_stages):
        return ""
    if len(selection.chosen) == len(marks):
        return "cache.over_budget=refuse"
    if config.cache.refresh:
        return "none"  # views that turn are refused with cache.over_budget=live
    keep_all, stages = config.cache.keep == "all", range(1, len(marks) + 1)
    candidates: list[Candidate] = [candidate(events.wanted, stage) for stage in stages]
    if choose(candidates, selection.bytes, keep_all) == selection.chosen:
        return f"cache.over_budget=live cache.budget_gb={max(selection.bytes, 1000) / 1e9 * (1 + 1e-9):.9g}"
    return "none"


def selection_lines(wanted: Wanted, events: Events, selection: Selection, budget: float) -> Iterator[str]:
    """Which freeze events deserve a cache, as people read it."""
    if not events.marks:
        return
    chosen = [f"cut {events.marks[event - 1].cut}" for event in selection.chosen]
    every = [f"cut {mark.cut}" for mark in events.marks]
    others = [cut for cut in every if cut not in chosen]
    within = f", within {budget / 1e9:,.3g} GB" if budget < ENDLESS else ""
    told = f"caches that pay, in seconds{within}: {', '.join(chosen) or 'none'}"
    told += f"; not {', '.join(others)}" if others else ""
    words = words_for(wanted, events, selection)
    told += f' (SET="{words}")' if words not in ("", "none") else " (no setting chooses just these)" * (words == "none")
    yield told + f"; {selection.bytes / 1e9:,.3g} GB at once"


# --- mode, codec, views -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """The run with another mode, codec or number of views: predicted seconds in all, and bytes of caches at once."""

    words: str
    """What to write in SET; empty for the settings as they are."""
    groups: int
    codec: str
    views: int
    seconds: float
    bytes: int

    @property
    def leaks(self) -> bool:
        return self.groups == 1


def variants(wanted: Wanted, profile: DeviceProfile, scales: tuple[float, float] = (1.0, 1.0)) -> list[Variant]:
    """What the run would cost with every mode, codec and number of views that its other settings allow, itself first.

    A view beyond the epochs of the longest cached stage is never read.
    """
    config, images = wanted.config, len(wanted.data.train)
    longest = max((-(-segment.steps // segment.steps_per_epoch) for segment in wanted.segments[1:]), default=0)
    views = sorted({count for count in (1, 2, 4, 8, 16) if count <= longest} | {config.cache.views})
    modes = [(groups, codec, count) for groups in GROUPS for codec in get_args(Codec) for count in views]
    own = (config.mask.groups, config.cache.codec, config.cache.views)
    found = [variant(config, profile, images, own, scales)]
    found += [variant(config, profile, images, mode, scales) for mode in modes if mode != own]
    return [one for one in found if one]


def variant(
    config: PipelineConfig, profile: DeviceProfile, images: int, mode: tuple[Any, Any, int], scales: tuple[float, float]
) -> Variant | None:
    """The run in a mode, with a codec and so many views; None where the settings do not allow it."""
    groups, codec, views = mode
    now = {"mask.groups": config.mask.groups, "cache.codec": config.cache.codec, "cache.views": config.cache.views}
    words = [f"{key}={value}" for key, value in zip(now, mode, strict=True) if now[key] != value]
    cache = config.cache
    if words:
        cache = replace(cache, codec=codec, views=views, over_budget="refuse", budget_gb=0.0)
    if codec != config.cache.codec and cache.later_codec:
        cache, words = replace(cache, later_codec=""), [*words, "cache.later_codec="]
    other = replace(config, mask=replace(config.mask, groups=groups), cache=cache)
    try:
        check(other)
        run = on_paper(other, images)
        run.refuse_targets_of_later_stages()
        costs = stage_costs(run, OnProfile(run, profile))
    except (ConfigError, CacheError):
        return None
    seconds = sum(scales[0] * cost.cached_seconds + scales[1] * cost.cache_seconds for cost in costs)
    needs = [run.needs(stage) for stage in range(1, len(run.segments))]
    most, _ = course_of_disk(needs, (), sizes_of(run), cache.keep == "all")
    return Variant(" ".join(words), groups, codec, views, seconds, most)


def recommended(found: Sequence[Variant], budget: float, bar: float) -> list[tuple[str, Variant]]:
    """The variants worth a line, by why: as set, fastest, fastest without a leak, smallest, most views that pay.

    budget: bytes; bar: seconds of the run without caches, which one that pays stays below.
    """
    fits = [one for one in found if one.bytes <= budget]
    honest = [one for one in fits if not one.leaks]
    paying = [one for one in honest if one.seconds < bar]
    most = max((one.views for one in paying), default=0)
    rows = [
        ("as set", found[:1], "seconds"),
        ("fastest", fits, "seconds"),
        ("fastest without a leak", honest, "seconds"),
        ("smallest", fits, "bytes"),
        ("smallest without a leak", honest, "bytes"),
        ("most views that pay", [one for one in paying if one.views == most], "seconds"),
    ]
    return [(why, least(some, by)) for why, some, by in rows if some]


ALIKE = 0.01


def least(some: Sequence[Variant], by: str) -> Variant:
    """The variant that takes least; of those within a per cent of it one without a leak, as near to the settings as can
    be, and then the one that takes least of the other kind."""
    smallest = min(getattr(one, by) for one in some)
    near = [one for one in some if getattr(one, by) <= (1 + ALIKE) * smallest]
    other = "bytes" if by == "seconds" else "seconds"
    return min(near, key=lambda one: (one.leaks, len(one.words.split()), getattr(one, other), getattr(one, by)))
