"""The cost model by hand, and the choice of caches against every subset there is."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.config import ScheduleConfig
from stages.flops import Event, Work, block_flops, choose_caches, run_flops
from stages.schedule import FreezeOut, freeze_events, plan_stages

# 4 blocks of width 8 over 16 tokens, 4 of them visible, patches of 12 values, a decoder block of width 4.
WORK = Work(
    depth=4,
    width=8,
    tokens=16,
    visible=4,
    groups=4,
    patch_values=12,
    decoded=16,
    decoder_depth=1,
    decoder_width=4,
    samples=100,
    views=1,
    images_per_epoch=96,
)
BLOCK = 24 * 4 * 64 + 4 * 16 * 8  # 6,144 + 512 over the visible tokens
# Keys and values of 16 tokens of width 4; queries, projection and MLP of the 12 hidden ones, which attend to all.
DECODER = 2 * (4 * 8 * 4 + 12 * 4 * 8 + 12 * 8 * 12) + (2 * 2 * 16 * 16 + 2 * 10 * 12 * 16 + 4 * 12 * 16 * 4)
EMBEDDING = 2 * 16 * 12 * 8


def test_a_block_by_hand() -> None:
    """One token of width 1: 12 weights, two FLOPs each, and 4 for attending to itself."""
    assert block_flops(1, 1) == 28
    assert block_flops(4, 8) == BLOCK == 6656
    assert block_flops(196, 768) == pytest.approx(2 * 196 * 12 * 768**2 + 2 * 2 * 196**2 * 768)


def test_a_moving_average_runs_over_all_tokens_from_where_a_step_begins() -> None:
    """A cache saves its blocks, too: block_flops(16, 8) = 24 * 16 * 64 + 4 * 256 * 8."""
    taught = replace(WORK, averaged=True)
    assert block_flops(16, 8) == 32_768
    assert taught.step(0, 2) - WORK.step(0, 2) == EMBEDDING + 4 * 32_768
    assert taught.step(3, 3) - WORK.step(3, 3) == 32_768


def test_a_step_by_hand() -> None:
    assert (WORK.decoder, WORK.embedding) == (DECODER, EMBEDDING)
    assert WORK.step(0, 0) == 12 * BLOCK + 3 * DECODER + 2 * EMBEDDING, "no gradient for the pixels"
    assert WORK.step(0, 2) == (2 + 6) * BLOCK + 3 * DECODER + EMBEDDING, "frozen in place from images"
    assert WORK.step(1, 2) == (1 + 6) * BLOCK + 3 * DECODER, "one block in place behind a cache at 1"
    assert WORK.step(2, 2) == 6 * BLOCK + 3 * DECODER, "all frozen blocks read"
    half = 2 * (4 * 8 * 4 + 6 * 4 * 8 + 6 * 8 * 12) + (2 * 2 * 10 * 16 + 2 * 10 * 6 * 16 + 4 * 6 * 10 * 4)
    assert replace(WORK, decoded=10).decoder == half, "four visible and half of twelve hidden tokens"


def test_a_cache_by_hand() -> None:
    """Four groups of four tokens cost what four masked forwards do; full mode pays for longer attention."""
    assert WORK.encode(0, 1) == 100 * (4 * BLOCK + EMBEDDING)
    assert WORK.encode(1, 3) == 100 * 2 * 4 * BLOCK, "from the cache at 1 only blocks 1 and 2 run"
    assert replace(WORK, views=3).encode(1, 3) == 3 * WORK.encode(1, 3)
    assert replace(WORK, groups=1).encode(1, 3) == 100 * 2 * (24 * 16 * 64 + 4 * 256 * 8)


def slow_total(work: Work, events: list[Event], cached: tuple[Event, ...], epochs: int) -> int:
    """Epoch by epoch: what is frozen, what is read, what is built."""
    flops = cut = entry = 0
    for epoch in range(epochs):
        for event in events:
            if event.epoch == epoch:
                cut = event.cut
                if event in cached:
                    flops += work.encode(entry, cut)
                    entry = cut
        flops += work.images_per_epoch * work.step(entry, cut)
    return flops


@settings(max_examples=60, deadline=None)
@given(
    epochs=st.integers(2, 40),
    starts=st.sets(st.integers(1, 39), max_size=7),
    views=st.integers(1, 8),
    groups=st.sampled_from([1, 2, 4]),
    visible=st.integers(1, 16),
)
def test_the_choice_is_the_cheapest_of_all_subsets(epochs, starts, views, groups, visible) -> None:
    work = replace(WORK, depth=8, views=views, groups=groups, visible=visible)
    events = [Event(epoch, cut) for cut, epoch in enumerate(sorted(e for e in starts if e < epochs), start=1)]
    subsets = [chosen for size in range(len(events) + 1) for chosen in combinations(events, size)]
    best = min(subsets, key=lambda chosen: (slow_total(work, events, chosen, epochs), len(chosen)))
    found = choose_caches(work, events, epochs)
    assert slow_total(work, events, found, epochs) == slow_total(work, events, best, epochs)
    assert len(found) == len(best)
    assert all(run_flops(work, events, one, epochs) == slow_total(work, events, one, epochs) for one in subsets)


def test_dear_views_get_no_cache_and_long_stages_get_one() -> None:
    """A cache at 1 costs 100 x (4 blocks + embedding), its epochs save 96 x (1 block + embedding)."""
    event = Event(1, 1)
    saved, cost = 96 * (BLOCK + EMBEDDING), 100 * (4 * BLOCK + EMBEDDING)
    assert cost / saved == pytest.approx(3.18, abs=0.01)
    assert choose_caches(WORK, [event], 4) == () and choose_caches(WORK, [event], 5) == (event,)
    assert choose_caches(replace(WORK, views=2), [event], 5) == ()


# --- plans of freeze events -------------------------------------------------------------------------------------------


def schedule(**changes: object) -> ScheduleConfig:
    return ScheduleConfig(**({"kind": "freezeout", "cuts": (0, 3, 6, 9), "epochs": (20,)} | changes))


def test_every_block_that_freezes_inside_the_run_is_an_event() -> None:
    """Cubic, 20 epochs: layer i freezes at 20 (.8 + .2 i / 12)^3, so layers 1 to 11 at 10.89 ... 19.01 epochs."""
    events = freeze_events(schedule(), 12, 100)
    assert events == tuple(
        Event(*pair) for pair in [(11, 1), (12, 2), (13, 3), (14, 5), (15, 6), (16, 7), (17, 8), (18, 9), (19, 10)]
    )
    rule = FreezeOut(12, 2000)
    assert rule.freeze_step(4) / 100 == pytest.approx(13.0, abs=0.3), "so 4 and 5 freeze in one epoch"
    for event in events:
        assert all(rule.lr(layer, event.epoch * 100) == 0 for layer in range(event.cut + 1))
        assert rule.lr(event.cut + 1, (event.epoch - 1) * 100) > 0
    assert freeze_events(schedule(t0=1.0), 12, 100) == ()
    assert freeze_events(schedule(freeze_embed=False), 12, 100) == ()
    assert freeze_events(schedule(kind="explicit"), 12, 100) == ()


def test_given_cuts_get_stages_and_the_other_events_freeze_in_place() -> None:
    plan = plan_stages(schedule(), 12, 100)
    assert [(stage.cut, stage.first_epoch) for stage in plan] == [(0, 0), (3, 13), (6, 15), (9, 18)]
    assert [[(event.epoch, event.cut) for event in stage.freezes] for stage in plan] == [
        [(11, 1), (12, 2)],
        [(14, 5)],
        [(16, 7), (17, 8)],
        [(19, 10)],
    ]


def test_cost_decides_which_events_become_stages() -> None:
    work = replace(WORK, depth=12)
    plan = plan_stages(schedule(epochs=(60,), caches="cost", cuts=(0, 3)), 12, 100, work=work)
    events = freeze_events(schedule(epochs=(60,)), 12, 100)
    chosen = choose_caches(work, events, 60)
    assert 0 < len(chosen) < len(events)
    assert [(stage.cut, stage.first_epoch) for stage in plan[1:]] == [(event.cut, event.epoch) for event in chosen]
    inside = [event for stage in plan for event in stage.freezes]
    assert sorted([*inside, *chosen], key=lambda event: event.epoch) == list(events)
    assert sum(stage.epochs for stage in plan) == 60
