"""What a way to keep features is to the cache benchmark, and what all ways keep."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline import peers
from pipeline.config import BenchConfig

SHAPE = 196, 768
GROUPS = 4


@dataclass(frozen=True)
class Way:
    """One way to keep features: what a round times, and what it is."""

    write: Callable[[], float]
    """Seconds of writing all rows."""
    read: Callable[[int], float] | None
    """Seconds of reading all rows in the order of a seed; None where another way reads the same files."""
    stored: str
    out: str
    checksums: bool
    value_bytes: int
    """Of a value that a reader gets."""
    share: float = 1.0
    """Of a row's values that are read."""
    note: str = ""


class Rounds(NamedTuple):
    """Seconds of a way, one a round."""

    write: list[float]
    read: list[float]


@dataclass(frozen=True)
class Setting:
    """What all ways keep, and how they are read."""

    given_NLD: np.ndarray
    """float32"""
    folder: Path
    config: BenchConfig
    half_NLD: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "half_NLD", torch.from_numpy(self.given_NLD).half().numpy())

    def epoch(self, read: Callable[[], peers.Read], seed: int) -> float:
        """Seconds of an epoch by batches, on the threads of the benchmark, each with a `read` of its own, after one
        that maps files and memory."""
        readers = [read() for _ in range(self.config.threads)]
        epoch = peers.by_rows(readers, len(self.given_NLD), self.config.batch)
        epoch(seed)
        return epochs(epoch, seed)


def epochs(epoch: Callable[[int], None], seed: int) -> float:
    """Seconds of one epoch, of several in turn."""
    started = time.perf_counter()
    for number in range(peers.EPOCHS):
        epoch(seed * peers.EPOCHS + number)
    return (time.perf_counter() - started) / peers.EPOCHS


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
