"""By what a file is known again without being read. Under the indexes of images and of checkpoints, which are made
again when it differs: an inode's last change (ctime) is set by the kernel alone, so that a file that was edited in
place, or replaced by another of its size, cannot have the old one, whatever the clock and `touch` say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

TICK_NS = 20_000_000
"""Longer than the steps of the clock that stamps files: a file this old gets another time from its next change."""


class Stamp(NamedTuple):
    """What of a file changes when it does: its size, the times of its content and of its inode, and its inode."""

    size: int
    time: int
    changed: int
    inode: int


def stamp_of(path: Path) -> Stamp:
    """OSError when the file is gone."""
    found = path.stat()
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def let_the_clock_tick(changed: int) -> None:
    """Wait until a change of a file that was last changed then would show in its times, which one within the same tick
    leaves as they are."""
    age = time.time_ns() - changed
    if 0 <= age < TICK_NS:
        time.sleep((TICK_NS - age) / 1e9)
