"""Whether a machine was shared while something was timed. Threads that wait for a core make seconds longer, in one arm
perhaps and not in another, and nothing in the seconds tells."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil


def others() -> float:
    """Processor seconds since the machine started that went to anything but this process: to other processes, to the
    system, or, of a virtual machine, to its neighbours."""
    times = psutil.cpu_times()
    idle = sum(getattr(times, name, 0.0) for name in ("idle", "iowait"))
    counted_twice = sum(getattr(times, name, 0.0) for name in ("guest", "guest_nice"))  # Linux has them in user, too
    return float(sum(times)) - idle - counted_twice - time.process_time()


class Crowd:
    """Tells of stretches of time how much of them was lost to other work.

    threads: of the work that is timed; while they leave cores free, others take nothing from it. cores: of the machine.
    """

    def __init__(self, threads: int, others: Callable[[], float] = others, cores: int | None = None) -> None:
        self.threads, self.cores = threads, cores or psutil.cpu_count() or threads
        self._others, self._last = others, others()

    def lap(self, seconds: float) -> float:
        """Of the `seconds` since the last lap, those that the threads did not have because others had their cores, on
        the average over threads."""
        last, self._last = self._last, self._others()
        wanting = self._last - last + (self.threads - self.cores) * seconds
        return min(max(wanting / self.threads, 0.0), seconds)
