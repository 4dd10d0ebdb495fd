"""How often what is measured runs: short work several times, long work hardly, a GPU's without waiting in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline import gauge
from pipeline.rates import unwatched
from stages.config import TrainConfig
from stages.train import LOG_EVERY


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], tuple[Callable[[], None], list[float]]]:
    """Work that takes so many seconds of a clock of its own, the first time twice as long; and when it ran."""

    def lasting(seconds: float) -> tuple[Callable[[], None], list[float]]:
        now, ran = [0.0], []

        def run() -> None:
            now[0] += seconds * (1 if ran else 2)
            ran.append(now[0])

        monkeypatch.setattr(gauge.time, "perf_counter", lambda: now[0])
        return run, ran

    return lasting


@pytest.mark.parametrize(("seconds", "runs"), [(0.01, 4), (0.4, 4), (0.6, 2), (30.0, 2)])
def test_work_that_takes_seconds_is_timed_once(work: Callable, seconds: float, runs: int) -> None:
    run, ran = work(seconds)
    assert gauge.seconds_of(run, TrainConfig(device="cpu", threads=1)) == pytest.approx(seconds)
    assert len(ran) == runs, "the first warms, and is left out of the median"


@pytest.mark.parametrize(("seconds", "runs"), [(0.001, 1 + 3 * LOG_EVERY), (0.04, 1 + 1 + 2 * 2), (0.3, 4)])
def test_a_gpu_is_handed_short_work_many_times_over(
    work: Callable, monkeypatch: pytest.MonkeyPatch, seconds: float, runs: int
) -> None:
    monkeypatch.setattr(gauge, "synchronize", lambda device: None)
    run, ran = work(seconds)
    assert gauge.seconds_of(run, TrainConfig(device="cuda", threads=1)) == pytest.approx(seconds)
    assert len(ran) == runs
    assert unwatched("cuda:1") == LOG_EVERY and unwatched("cpu") == 1


def test_a_containers_limit_is_the_memory_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed.system.memory_limit", lambda: 3_000_000_000)
    assert gauge.device_memory(TrainConfig(device="cpu")) == 3e9
