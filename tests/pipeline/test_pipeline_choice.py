"""Which caches deserve their disk, against every subset there is; which settings would be fastest or smallest."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.size import cache_bytes
from pipeline.choice import (
    Entry,
    Variant,
    choose_caches,
    events_of,
    least,
    recommended,
    selection_lines,
    variants,
    words_for,
)
from pipeline.layout import RunPaths
from pipeline.predict import OnPaper, OnProfile, on_paper, stage_costs
from pipeline.reading import parse
from tests.pipeline.test_pipeline_profile import PROFILE
from tests.pipeline.toy import toy

Table = dict[tuple[int, int], int]


def by_hand(events: int, train: Table, build: Table, size: list[int], budget: int, keep_all: bool, beside: int):
    """Every subset, one by one: (seconds, chosen, bytes at once) of the best."""
    found = []
    for count in range(events + 1):
        for chosen in combinations(range(1, events + 1), count):
            entry, seconds, held, most = 0, 0, 0, 0
            for event in range(1, events + 1):
                if event in chosen:
                    seconds += build[entry, event]
                    others = beside if not keep_all or event == chosen[0] else 0
                    most = max(most, held + size[event - 1] + others)
                    held = held + size[event - 1] + others if keep_all else size[event - 1]
                    entry = event
                seconds += train[entry, event]
            if most <= budget:
                found.append((seconds, len(chosen), most, chosen))
    return min(found)


@st.composite
def instances(draw: st.DrawFn) -> tuple[int, Table, Table, list[int], int, bool, int]:
    events = draw(st.integers(1, 5))
    pairs = [(a, b) for b in range(1, events + 1) for a in range(b + 1)]
    train = {pair: draw(st.integers(1, 30)) for pair in pairs}
    build = {pair: draw(st.integers(0, 30)) for pair in pairs}
    size = [draw(st.integers(1, 9)) for _ in range(events)]
    return events, train, build, size, draw(st.integers(0, 30)), draw(st.booleans()), draw(st.integers(0, 5))


@settings(max_examples=400, deadline=None)
@given(instances())
def test_the_choice_is_the_best_of_all_subsets(instance) -> None:
    events, train, build, size, budget, keep_all, beside = instance
    found = choose_caches(
        events,
        lambda entry, b: train[entry.event, b],
        lambda entry, b: build[entry.event, b],
        lambda entry, b: size[b - 1],
        budget,
        keep_all,
        beside,
    )
    seconds, count, most, _ = by_hand(*instance)
    assert (found.seconds, len(found.chosen)) == (seconds, count) and found.bytes <= budget
    if count:
        assert found.bytes >= min(size) and found.bytes <= max(most, found.bytes)


def test_a_choice_by_hand() -> None:
    """Live both cost 10; cached 4 and 2; the second is built in 1 from the first cache, in 5 from images."""
    train = {(0, 1): 10, (1, 1): 4, (0, 2): 10, (1, 2): 9, (2, 2): 2}
    build = {(0, 1): 3, (0, 2): 5, (1, 2): 1}

    def best(budget: float, keep_all: bool = True):
        seconds = (lambda entry, b: train[entry.event, b], lambda entry, b: build[entry.event, b])
        return choose_caches(2, *seconds, lambda entry, b: 6 + b, budget, keep_all)

    assert (best(15).seconds, best(15).chosen, best(15).bytes) == (10, (1, 2), 15), "3 + 4 + 1 + 2, 7 and 8 bytes"
    assert (best(14).seconds, best(14).chosen) == (16, (1,)), "3 + 4 + 9; the second alone: 10 + 5 + 2 = 17"
    assert (best(6).seconds, best(6).chosen, best(6).bytes) == (20, (), 0)
    assert best(15, keep_all=False).bytes == 15, "the second is built from the first, so both lie there"


# --- of a run ---------------------------------------------------------------------------------------------------------


def toy_on_paper(**changes: object) -> OnPaper:
    return on_paper(toy(**changes), 9600)


LONG = {"schedule.epochs": [1, 8, 9], "cache.views": 1, "train.compile": "off"}
FAST = replace(
    PROFILE,
    write_rate=1e10,
    read_rate=1e10,
    crop_seconds=1e-5,
    start_seconds=0.01,
    codecs=tuple(replace(one, round=1.0, restore=1.0) for one in PROFILE.codecs),
)
"""A machine on which caches pay: nothing but the frozen blocks takes time, and stages are long."""


def test_the_events_of_a_run_cost_what_its_stages_do() -> None:
    run = toy_on_paper(**LONG)
    events = events_of(run, FAST)
    costs = stage_costs(run, OnProfile(run, FAST))
    for event in (1, 2):
        before = Entry(event - 1, event > 2)
        assert events.train(Entry(event, event > 1), event) == pytest.approx(costs[event].cached_seconds)
        assert events.build(before, event) == pytest.approx(costs[event].cache_seconds)
        assert events.size(before, event) == costs[event].cache_bytes
    chosen = events.select(1e12)
    assert chosen.chosen == (1, 2) and words_for(run, events, chosen) == ""
    assert chosen.seconds == pytest.approx(sum(c.cached_seconds + c.cache_seconds for c in costs[1:]))
    (line,) = selection_lines(run, events, chosen, 1e12)
    assert line.startswith("caches that pay, in seconds, within 1e+03 GB: cut 1, cut 3; ") and "SET" not in line


def test_a_small_disk_gets_the_cache_that_saves_most_and_the_words_that_choose_it(tmp_path: Path) -> None:
    run = toy_on_paper(**LONG)
    events, size = events_of(run, FAST), cache_bytes(run.layout(run.features(2)))
    chosen = events.select(1.5 * size)
    assert chosen.chosen == (2,), "stage 2 is longer and has three frozen blocks"
    assert chosen.bytes == events.size(Entry(), 2)
    words = words_for(run, events, chosen)
    assert words.startswith("cache.over_budget=live cache.budget_gb=")
    values = dict(word.split("=") for word in words.split())
    assert OnPaper(parse(values, run.config), RunPaths(tmp_path), 9600).cached_stages == (2,), "the words do choose it"
    assert words_for(toy_on_paper(**LONG, **{"cache.refresh": 1}), events, chosen) == "none", "refused with live stages"
    none = events.select(10)
    assert words_for(run, events, none) == "cache.over_budget=live cache.budget_gb=1e-06", "0 would be no budget"
    assert none.chosen == () and "within 1e-08 GB: none; not cut 1, cut 3" in next(
        selection_lines(run, events, none, 10)
    )


def test_freezeout_s_choice_is_written_as_cuts() -> None:
    changes = {"schedule.kind": "freezeout", "schedule.caches": "given", "schedule.cuts": [0, 1, 3]}
    changes |= {"schedule.epochs": [12], "schedule.t0": 0.5, "train.warmup_epochs": 0.0}
    run = toy_on_paper(**changes)
    events = events_of(run, PROFILE)
    assert events.in_place and [mark.cut for mark in events.marks] == sorted({mark.cut for mark in events.marks})
    assert sum(mark.epochs for mark in events.marks) + events.marks[0].first_epoch == 12
    free = replace(PROFILE, start_seconds=0.0, write_rate=1e12, crop_seconds=1e-6, disk_gb=1e3)
    every = events_of(run, free).select(1e15)
    words = words_for(run, events, every)
    cuts = [0, *(events.marks[event - 1].cut for event in every.chosen)]
    assert words in ("", f"schedule.caches=given schedule.cuts={str(cuts).replace(' ', '')}") and every.chosen
    again = toy_on_paper(**changes | {"schedule.cuts": cuts})
    assert [stage.cut for stage in again.plan] == cuts, "the words do choose it"
    assert events_of(run, replace(PROFILE, start_seconds=1e9)).select(1e15).chosen == (), "no cache pays for a start"


# --- mode, codec, views -----------------------------------------------------------------------------------------------


def test_every_mode_codec_and_number_of_views_is_priced_and_named() -> None:
    run = toy_on_paper()
    found = variants(run, PROFILE)
    assert found[0].words == "" and (found[0].groups, found[0].codec, found[0].views) == (4, "float16", 2)
    assert len(found) == 3 * 3 * 2, "groups, codecs, one or two views: the longest cached stage has two epochs"
    by_words = {one.words: one for one in found}
    half = by_words["cache.views=1"]
    costs = stage_costs(run, OnProfile(run, PROFILE))
    build = sum(cost.cache_seconds for cost in costs)
    assert found[0].seconds == pytest.approx(sum(cost.cached_seconds for cost in costs) + build)
    assert half.seconds == pytest.approx(found[0].seconds - (build - 2 * PROFILE.start_seconds) / 2)
    assert half.bytes == pytest.approx(found[0].bytes / 2, rel=0.06), "keys, labels and digests are not halved"
    assert by_words["mask.groups=1 cache.codec=int8"].leaks and not by_words["mask.groups=2"].leaks
    scaled = variants(run, PROFILE, (2.0, 3.0))[0].seconds
    assert scaled == pytest.approx(2 * (found[0].seconds - build) + 3 * build)


def test_what_the_other_settings_forbid_is_not_offered() -> None:
    assert {one.codec for one in variants(toy_on_paper(**{"model.width": 40}), PROFILE)} == {"float16", "bfloat16"}
    bits = variants(toy_on_paper(**{"cache.filter": "bitround-6"}), PROFILE)
    assert {one.codec for one in bits} == {"float16", "bfloat16"}


def test_what_leaves_one_stage_that_cannot_predict_its_target_is_not_offered() -> None:
    """With more views no cache deserves its price, and without one there are no features to predict."""
    dear = {"schedule.kind": "freezeout", "schedule.t0": 0.3, "schedule.scale": "linear", "schedule.cuts": [0, 1]}
    dear |= {"schedule.epochs": [12], "train.warmup_epochs": 0.0, "schedule.caches": "cost"}
    pixels = [one.views for one in variants(toy_on_paper(**dear), PROFILE)]
    features = variants(toy_on_paper(**dear, **{"target.kind": "features"}), PROFILE)
    assert len(features) < len(pixels) and all(one.bytes for one in features)


def one(seconds: float, size: int, groups: int = 4, views: int = 1, words: str = "x=1") -> Variant:
    return Variant(words, groups, "float16", views, seconds, size)


def test_what_is_recommended_is_fast_small_or_honest() -> None:
    here, leaky, small = one(100, 50, words=""), one(80, 40, groups=1), one(120, 10)
    many, large = one(105, 90, views=4), one(50, 1000)
    found = dict(recommended([here, leaky, small, many, large], budget=500, bar=110))
    assert found == {
        "as set": here,
        "fastest": leaky,
        "fastest without a leak": here,
        "smallest": small,
        "smallest without a leak": small,
        "most views that pay": many,
    }
    assert dict(recommended([here], budget=10, bar=110)) == {"as set": here}


def test_of_what_is_alike_the_one_without_a_leak_and_nearest_to_the_settings_is_told() -> None:
    near, leaky = one(100.5, 50, words=""), one(100, 50, groups=1)
    assert least([leaky, near], "seconds") == near
    assert least([one(102, 50, words=""), leaky], "seconds") == leaky, "2 % are a difference"
