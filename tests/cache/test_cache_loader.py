from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from cache.loader import Prefetch, prefetch


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_results_keep_their_order() -> None:
    def late_first(item: int) -> int:
        time.sleep(0.01 if item % 3 == 0 else 0)
        return item * item

    with prefetch(late_first, range(30), threads=4, ahead=6) as batches:
        assert list(batches) == [item * item for item in range(30)]
    assert loader_threads() == []


def test_look_ahead_is_bounded() -> None:
    pulled = []

    def items() -> Iterator[int]:
        for item in range(20):
            pulled.append(item)
            yield item

    with prefetch(str, items(), threads=3, ahead=4) as batches:
        assert len(pulled) == 4
        for taken, _ in enumerate(batches, start=1):
            assert len(pulled) == min(taken + 4, 20)


def test_batches_are_made_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=10)
    with prefetch(lambda item: together.wait() >= 0, range(6), threads=3, ahead=3) as batches:
        assert list(batches) == [True] * 6


def test_an_exception_comes_in_its_turn() -> None:
    def make(item: int) -> int:
        if item == 3:
            raise OSError("row 3")
        return item

    taken = []
    with pytest.raises(OSError, match="row 3"), prefetch(make, range(10), threads=2, ahead=5) as batches:
        for batch in batches:
            taken.append(batch)
    assert taken == [0, 1, 2] and loader_threads() == []
    assert list(batches) == []


def test_a_consumer_that_stops_early_leaves_no_threads() -> None:
    made = []
    with prefetch(lambda item: made.append(item), count(), threads=2, ahead=3) as batches:
        for _ in zip(range(5), batches, strict=False):
            pass
    assert loader_threads() == [] and len(made) <= 5 + 3 + 1
    before = len(made)
    time.sleep(0.02)
    assert len(made) == before


def test_waiting_is_counted() -> None:
    ticks = count()
    with Prefetch(abs, range(5), threads=1, ahead=2, now=lambda: next(ticks)) as batches:
        assert list(batches) == [0, 1, 2, 3, 4]
        assert batches.wait_seconds == 5  # one tick from asking to having, per batch

    with prefetch(lambda item: time.sleep(0.05), range(2), threads=1, ahead=1) as slow:
        list(slow)
        assert 0.08 < slow.wait_seconds < 1


def test_what_is_ready_costs_no_waiting() -> None:
    done = threading.Barrier(2, timeout=10)
    with prefetch(lambda item: done.wait(), [0], threads=1, ahead=1) as batches:
        done.wait()
        time.sleep(0.05)
        next(batches)
        assert batches.wait_seconds < 0.04
