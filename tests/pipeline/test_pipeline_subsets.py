"""Which caches deserve their disk, against every run that there could be: each set of freeze events given caches, with
the seconds and the course of the disk of that very run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations
from typing import NamedTuple

import pytest

from pipeline.budget import course_of_disk, sizes_of
from pipeline.choice import Events, events_of
from pipeline.predict import OnPaper, OnProfile, on_paper, stage_costs
from tests.pipeline.test_pipeline_choice import FAST
from tests.pipeline.toy import toy

PLAIN = {"cache.views": 2, "train.compile": "off", "train.warmup_epochs": 0.0}
FREEZEOUT = PLAIN | {
    **{"schedule.kind": "freezeout", "schedule.caches": "given", "schedule.cuts": [0, 1, 3]},
    **{"schedule.epochs": [30], "schedule.t0": 0.6, "model.depth": 6},
}
EXPLICIT = PLAIN | {"schedule.cuts": [0, 1, 2, 3, 4], "schedule.epochs": [1, 7, 2, 9, 1], "model.depth": 6}
WAYS = [
    {},
    {"cache.later_codec": "int8"},
    {"cache.codec": "int8", "cache.later_codec": "float16", "cache.keep": "needed"},
    {"cache.refresh": 1},
    {"cache.refresh": 2, "cache.refresh_ahead": 3, "cache.keep": "needed", "cache.later_codec": "int8"},
    {"cache.refresh": 3, "cache.refresh_ahead": 2},
    {"target.kind": "teacher", "teacher.kind": "frozen", "cache.later_codec": "int8"},
    {"target.kind": "teacher", "teacher.kind": "frozen", "cache.keep": "needed"},
]


class Choice(NamedTuple):
    seconds: float
    bytes: int
    chosen: tuple[int, ...]


def with_caches(run: OnPaper, events: Events, chosen: tuple[int, ...], changes: dict) -> OnPaper:
    """The run in which just these events have caches."""
    if events.in_place:
        return on_paper(toy(**changes | {"schedule.cuts": [0, *(events.marks[one - 1].cut for one in chosen)]}), 9600)
    other = on_paper(run.config, 9600)
    vars(other)["cached_stages"] = chosen
    return other


def every_choice(run: OnPaper, events: Events, changes: dict) -> Iterator[Choice]:
    numbers = range(1, len(events.marks) + 1)
    for chosen in chain.from_iterable(combinations(numbers, count) for count in range(len(numbers) + 1)):
        other = with_caches(run, events, chosen, changes)
        costs = stage_costs(other, OnProfile(other, FAST))
        needs = [other.needs(stage) for stage in range(1, len(other.segments))]
        most, _ = course_of_disk(needs, (), sizes_of(other), other.config.cache.keep == "all")
        yield Choice(sum(cost.cached_seconds + cost.cache_seconds for cost in costs), most, chosen)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("schedule", [FREEZEOUT, EXPLICIT], ids=["freezeout", "explicit"])
def test_the_choice_is_the_best_run_within_every_budget(schedule: dict, way: dict) -> None:
    changes = schedule | way
    run = on_paper(toy(**changes), 9600)
    events = events_of(run, FAST)
    assert len(events.marks) >= 4
    found = list(every_choice(run, events, changes))
    before = found[0].seconds - events.select(0).seconds  # what stage 0 takes until the first event
    assert found[0].chosen == () and before > 0
    for budget in sorted({one.bytes for one in found}):
        best = min(one.seconds for one in found if one.bytes <= budget)
        got = events.select(budget)
        assert before + got.seconds == pytest.approx(best, rel=1e-9)
        assert got.bytes == next(one.bytes for one in found if one.chosen == got.chosen) <= budget


def test_a_ring_turns_on_through_the_events_that_freeze_in_place() -> None:
    run = on_paper(toy(**FREEZEOUT | {"cache.refresh": 1}), 9600)
    events = events_of(run, FAST)
    epochs = [mark.epochs for mark in events.marks]
    turns = [events.turns(1, event) for event in range(1, len(epochs) + 1)]
    assert turns == [epochs[0] - 1, *epochs[1:]] and sum(turns) == sum(epochs) - 1


def test_the_codec_of_later_cuts_is_that_of_the_second_stage_on_and_of_the_second_cache_in_freezeout() -> None:
    first, later = ("float16", "int8")
    explicit = events_of(on_paper(toy(**EXPLICIT | {"cache.later_codec": later}), 9600), FAST)
    frozen = events_of(on_paper(toy(**FREEZEOUT | {"cache.later_codec": later}), 9600), FAST)
    assert [explicit.draft(event, False).codec for event in (1, 2, 3)] == [first, later, later]
    assert [frozen.draft(event, False).codec for event in (1, 2, 3)] == [first] * 3
    assert [frozen.draft(event, True).codec for event in (2, 3)] == [later] * 2
