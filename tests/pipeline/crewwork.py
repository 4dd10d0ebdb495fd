"""What a rank of the command line does in tests: a verb, its words kept in a file. Imported by the ranks, so nothing
here is of pytest."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pipeline.work
import stages.train
from pipeline.__main__ import main
from pipeline.ranks import rank_here


def call(out: Path, args: list[str], more: dict[int, list[str]], dies: int | None = None) -> int:
    """The exit status of a call, `more` being what single ranks are asked besides. Rank `dies` is killed in its third
    step."""
    rank = rank_here().rank
    file = os.open(out / f"rank-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if rank == dies:
        pipeline.work.train_arm.__globals__["train_step"] = Deadly(stages.train.train_step)
    return main([*args, *more.get(rank, [])])


class Deadly:
    """A training step that the third time ends the process as the kernel does when memory is out."""

    def __init__(self, step: Any) -> None:
        self.step, self.left = step, 2

    def __call__(self, *args: Any) -> Any:
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return self.step(*args)
