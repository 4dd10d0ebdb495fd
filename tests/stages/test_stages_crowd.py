"""Whether a machine was shared while something was timed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import namedtuple

import pytest

from stages import crowd
from stages.crowd import Crowd, others


@pytest.mark.parametrize(
    ("threads", "cores", "elsewhere", "lost"),
    [
        (2, 2, 0.0, 0.0),
        (2, 2, 10.0, 5.0),  # one of two cores was gone all the time
        (2, 2, 1.0, 0.5),
        (1, 2, 10.0, 0.0),  # others had the core that was free
        (1, 2, 15.0, 5.0),
        (4, 16, 100.0, 0.0),
        (4, 16, 160.0, 10.0),
        (2, 2, 90.0, 10.0),  # never more than the time there was
    ],
)
def test_what_was_lost_to_other_work(threads: int, cores: int, elsewhere: float, lost: float) -> None:
    clock = iter([7.0, 7.0 + elsewhere, 7.0 + elsewhere])
    timed = Crowd(threads, lambda: next(clock), cores)
    assert timed.lap(10.0) == pytest.approx(lost)
    assert timed.lap(1.0) == 0.0, "a lap counts from the last one"


def test_neither_idle_time_nor_this_process_is_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    times = namedtuple("times", "user nice system idle iowait irq softirq steal guest guest_nice")
    monkeypatch.setattr(crowd.psutil, "cpu_times", lambda: times(100, 10, 20, 5000, 300, 1, 2, 4, 30, 3))
    monkeypatch.setattr(crowd.time, "process_time", lambda: 25.0)
    assert others() == (100 + 10 + 20 + 1 + 2 + 4) - 25, "guests are in user and nice already"


def test_another_process_at_work_is_seen() -> None:
    before, started = others(), time.perf_counter()
    burn = "import time\nwhile time.process_time() < 1: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert others() - before >= 0.9, f"in {time.perf_counter() - started:.1f} s"
