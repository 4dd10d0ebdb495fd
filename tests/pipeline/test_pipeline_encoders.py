"""Encoders that make views ahead, without a run: how they and training hold each other back, what they are refused, the
disk that they take, and what the plan says of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.ahead import Ahead
from pipeline.budget import course_of_disk, sizes_of
from pipeline.checks import check
from pipeline.config import ConfigError
from pipeline.decide import Wanted
from pipeline.encoders import ring_lines
from pipeline.job import Interrupted
from pipeline.layout import RunPaths
from pipeline.predict import StageCost, on_paper
from tests.pipeline.toy import toy

RING = {"cache.refresh": 1, "schedule.epochs": [1, 3, 2]}
AHEAD = RING | {"cache.refresh_ahead": 1}



@contextmanager
def making(make: object, told: list[str] | None = None) -> Iterator[tuple[Ahead, threading.Event]]:
    stop = threading.Event()
    ahead: Ahead = Ahead(nullcontext, make, (told if told is not None else []).append, stop)
    try:
        yield ahead, stop
    finally:
        ahead.close()


def test_nothing_is_made_beyond_what_is_allowed() -> None:
    made: list[int] = []
    with making(lambda generation, _: made.append(generation)) as (ahead, _):
        ahead.wait(0)
        ahead.allow(1, 2)
        ahead.wait(2)
        assert made == [1, 2]
        assert not threading.Event().wait(0.3) and made == [1, 2]
        ahead.allow(3, 3)
        ahead.wait(3)
        ahead.wait(4)  # was never allowed: whoever needs it makes it
    assert made == [1, 2, 3]


def test_who_waits_is_let_go_by_success_failure_and_stop() -> None:
    go, told, made = threading.Event(), [], []

    def make(generation: int, _: object) -> None:
        assert go.wait(10)
        if generation == 2 and 2 not in made:
            made.append(2)
            raise RuntimeError("the disk\nis full")
        made.append(generation)

    with making(make, told) as (ahead, stop):
        ahead.allow(1, 3)
        waiting = threading.Thread(target=ahead.wait, args=(1,))
        waiting.start()
        assert not made and waiting.is_alive()
        go.set()
        waiting.join(10)
        assert not waiting.is_alive() and made[0] == 1
        ahead.wait(2)
        ahead.wait(3)  # nothing is made after a failure, until more is allowed
        assert made == [1, 2]
        assert told == ["generation 2 of the ring of views: the disk is full; tried again when training needs it"]
        go.clear()
        ahead.allow(3, 3)
        stop.set()
        with pytest.raises(Interrupted, match=r"waiting for generation 3 .* the same command goes on"):
            ahead.wait(3)
        go.set()


# --- settings and sizes -----------------------------------------------------------------------------------------------


def test_ahead_without_a_ring_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache.refresh_ahead = 2 .* set cache.refresh=1 or cache.refresh_ahead=0"):
        check(toy(**{"cache.refresh_ahead": 2}))


@pytest.mark.parametrize(("ahead", "views"), [(0, 3), (1, 3), (2, 4), (9, 4)])
def test_disk_counts_the_views_made_ahead(tmp_path: Path, ahead: int, views: int) -> None:
    """Stage 1 has three generations of two views, so that at most two more views are ever there."""
    wanted = Wanted(toy(**RING | {"cache.refresh_ahead": ahead}), RunPaths(tmp_path / "toy"))
    most, _ = course_of_disk([wanted.needs(1)], (), sizes_of(wanted), keep_all=True)
    whole, one = sizes_of(wanted).whole(wanted.needs(1)[0]), sizes_of(wanted).turn(wanted.needs(1)[0])
    assert most == whole + one
    assert most / whole == pytest.approx(views / 2, rel=0.02), "labels and keys are there once"


@pytest.mark.parametrize(
    ("trains", "changes", "told"),
    [
        (30.0, {"cluster.workers": 1}, "10.0 s, training between two turns 10.0 s: encoders keep up"),
        (15.0, {"cluster.workers": 1}, "training between two turns 5.0 s: it waits about 5.0 s at each of 2 turns"),
        (30.0, {}, "10.0 s: on the same cores one slows the other, unless cluster.workers"),
    ],
)
def test_plan_says_whether_encoders_keep_up(trains: float, changes: dict, told: str) -> None:
    """40 s for four views, the two of the first generation and one for each of two turns; three epochs."""
    wanted = on_paper(toy(**AHEAD | changes), 96)
    cost = StageCost(1, 1, 3.0, "planned", 0.0, 0.0, cached_seconds=trains, cache_seconds=40.0, cache_bytes=0)
    (line,) = ring_lines(wanted, [replace(cost, stage=0, cache_seconds=0.0), cost])
    assert line.startswith("stage 1: a new view takes 10.0 s, training") and told in line
    assert not list(ring_lines(on_paper(toy(**RING), 96), [cost]))
