"""How long a test may take: one that waits for what never comes fails after a while, saying where its threads stand."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 60.0
"""Seconds after which what cleans up behind a test that hung is ended as well."""


@contextmanager
def ended_within(seconds: float, what: str) -> Iterator[None]:
    """Within, TimeoutError is raised after so many seconds, whatever the main thread waits for; 0 bounds nothing."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        stacks = ("".join(traceback.format_stack(stack)) for stack in sys._current_frames().values())
        raise TimeoutError("\n".join((f"{what} has not ended in {seconds:g} s; its threads:", *stacks)))

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
