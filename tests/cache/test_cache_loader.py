from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import pytest
import torch

from cache.buffers import FRESH, Buffers
from cache.errors import CacheError
from cache.loader import Prefetch, Spent, prefetch


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
    with Prefetch(lambda item, into: item, range(5), threads=1, ahead=2, now=lambda: next(ticks)) as batches:
        assert list(batches) == [0, 1, 2, 3, 4]
        assert batches.spent.wait_seconds == 5  # one tick from asking to having, per batch

    with prefetch(lambda item: time.sleep(0.05), range(2), threads=1, ahead=1) as slow:
        list(slow)
        assert 0.08 < slow.spent.wait_seconds < 1


def test_what_is_ready_costs_no_waiting() -> None:
    done = threading.Barrier(2, timeout=10)
    with prefetch(lambda item: done.wait(), [0], threads=1, ahead=1) as batches:
        done.wait()
        time.sleep(0.05)
        next(batches)
        assert batches.spent.wait_seconds < 0.04


def test_work_of_the_threads_is_counted() -> None:
    with prefetch(lambda item: time.sleep(0.02), range(6), threads=3, ahead=3) as batches:
        list(batches)
        assert batches.spent.batches == 6 and 0.12 <= batches.spent.busy_seconds < 1
        assert batches.spent.since(batches.spent) == Spent(0, 0, 0)


def fill(item: int, into: Buffers) -> torch.Tensor:
    batch = into.take("batch", (1000,), torch.int64)
    batch.fill_(item)
    return batch


def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for() -> None:
    with Prefetch(fill, range(40), threads=3, ahead=3) as batches:
        places = set()
        for item, batch in enumerate(batches):
            time.sleep(0.002)  # the threads have filled all that they may by now
            assert torch.equal(batch, torch.full((1000,), item))
            places.add(batch.data_ptr())
    assert len(places) == 4, "three ahead and the one in use: memory is used again"


@pytest.mark.parametrize(("memory", "ahead"), [(16_000, 1), (24_000, 2), (39_999, 3), (10**9, 5)])
def test_the_ring_keeps_within_its_memory(memory: int, ahead: int) -> None:
    places, made = set(), []

    def make(item: int, into: Buffers) -> torch.Tensor:
        made.append(item)
        return fill(item, into)

    with Prefetch(make, range(30), threads=2, ahead=5, memory=memory) as batches:
        for item, batch in enumerate(batches):
            time.sleep(0.002)
            assert batch[0] == item and len(made) <= item + 1 + ahead
            places.add(batch.data_ptr())
    assert len(places) == ahead + 1 and made == list(range(30))


def test_a_later_batch_may_be_larger() -> None:
    """8,000 bytes, of which 5 fit, then 16,000, of which 2 fit: the batches that are pending by then are used first."""

    def make(item: int, into: Buffers) -> torch.Tensor:
        return into.take("batch", (1000 if item < 1 else 2000,), torch.int64).fill_(item)

    with Prefetch(make, range(20), threads=2, ahead=4, memory=40_000) as batches:
        assert [int(batch[-1]) for batch in batches] == list(range(20))


@dataclass(frozen=True)
class FakeEvent:
    """Stands in for torch.cuda.Event, writing down what is asked of it."""

    told: list[str]

    def record(self, stream: str) -> None:
        self.told.append(f"record {stream}")

    def synchronize(self) -> None:
        self.told.append("synchronize")


def test_memory_is_filled_again_once_its_gpu_has_copied_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    plain = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")

    def empty(size: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        told.append(f"pin {pin_memory}")
        return plain(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)

    def make(item: int, into: Buffers) -> int:
        into.part("teacher").take("batch", (2,), torch.int64)
        told.append(f"fill {item}")
        return item

    with Prefetch(make, range(4), threads=1, ahead=1, device="cuda:1") as batches:
        for item in batches:
            while f"fill {min(item + 1, 3)}" not in told:
                time.sleep(0.001)
            told.append(f"use {item}")
    again = ["record stream of cuda:1", "synchronize"]
    assert told == [
        *("pin True", "fill 0", "pin True", "fill 1", "use 0"),
        *(*again, "fill 2", "use 1"),
        *(*again, "fill 3", "use 2"),
        *("record stream of cuda:1", "use 3", "record stream of cuda:1"),
    ]


def test_a_ring_too_small_for_two_batches_is_refused() -> None:
    batches = Prefetch(fill, range(30), threads=2, ahead=5, memory=15_999)
    with pytest.raises(CacheError, match=r"two batches of 0.0 MB do not fit .* raise it to 1 or lower"):
        next(batches)
    assert loader_threads() == []


def test_parts_and_sizes_of_buffers() -> None:
    into = Buffers()
    first = into.take("a", (2, 3), torch.float32)
    assert into.take("a", (3, 2), torch.float32).data_ptr() == first.data_ptr()
    assert into.take("a", (2,), torch.float32).data_ptr() == first.data_ptr()
    assert into.take("a", (2, 3), torch.int32).dtype == torch.int32
    assert into.part("b").take("a", (4,), torch.uint8).data_ptr() != into.take("a", (2, 3), torch.int32).data_ptr()
    assert into.nbytes == 24 + 4
    kept = FRESH.take("a", (2,), torch.uint8)
    assert kept.data_ptr() != FRESH.part("x").take("a", (2,), torch.uint8).data_ptr()
    assert FRESH.nbytes == 0
