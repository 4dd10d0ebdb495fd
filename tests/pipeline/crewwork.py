"""What a rank of the command line does in tests: a verb, its words kept in a file. Imported by the ranks, so nothing
here is of pytest."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline.crew
import pipeline.work
import stages.train
from pipeline.__main__ import main
from pipeline.ranks import rank_here


def call(
    out: Path,
    args: list[str],
    more: dict[int, list[str]],
    dies: int | None = None,
    late: int | None = None,
    full: int | None = None,
) -> int:
    """The exit status of a call, `more` being what single ranks are asked besides. Rank `dies` is killed in its third
    step, rank `late` asks the ranks' store when the others may have ended, the disk of rank `full` takes no state."""
    rank = rank_here().rank
    file = os.open(out / f"rank-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if rank == dies:
        pipeline.work.train_arm.__globals__["train_step"] = Deadly(stages.train.train_step)
    if rank == late:
        pipeline.crew.store_of = after_a_second(pipeline.crew.store_of)
    if full is not None:
        pipeline.crew.PARTING = 1000.0  # nobody waits that long for who waits for him
    if rank == full:
        stages.train.save_state = no_space
    return main([*args, *more.get(rank, [])])


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class Deadly:
    """A training step that the third time ends the process as the kernel does when memory is out."""

    def __init__(self, step: Any) -> None:
        self.step, self.left = step, 2

    def __call__(self, *args: Any) -> Any:
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return self.step(*args)


def after_a_second(function: Callable[[], Any]) -> Callable[[], Any]:
    """What the function returns, the first time a second later."""
    delays = [1.0]

    def late() -> Any:
        found = function()
        if delays:
            time.sleep(delays.pop())
        return found

    return late
