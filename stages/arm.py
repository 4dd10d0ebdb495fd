"""What the training loop is given: an arm, which is what to train, and hooks, which are what it needs from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from models.learner import Learner
from stages.config import TrainConfig
from stages.crowd import others
from stages.endings import Settling
from stages.segment import Segment
from stages.sources import Source


class Pace(Protocol):
    """How fast everything learns at every step of the plan."""

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rates of a step; returns the one that is told."""
        ...


class Result(Protocol):
    """What an evaluation came to."""

    def point(self) -> dict[str, float | None]:
        """Its numbers by name, as a point of the curve keeps them."""
        ...


@dataclass(frozen=True)
class Arm:
    """What to train: the segments in turn, from a state on disk or from scratch, into a folder."""

    tag: dict[str, Any]
    """{"stage": 1} or {"arm": "e2e"}: how events and messages name it."""
    segments: tuple[Segment, ...]
    make: Callable[[Segment], Learner]
    """The model of a segment, on its device, its weights a pure function of the seed."""
    optimizer: Callable[[Learner], torch.optim.Optimizer]
    train: TrainConfig
    rates: Pace
    source: Callable[[Segment], Source]
    state: Path
    start: Path | None
    inputs: str
    """Digest of what the arm was asked to do; a saved state of anything else is not gone on from."""
    section: str = "train"
    """Where the settings of `train` stand for the user: train, or finetune."""
    eval_every: int = 0
    """Epochs between evaluations; each stage's end is evaluated in any case."""
    keep: Mapping[int, Path] = field(default_factory=dict)
    """Epochs of the whole run after which the encoder is kept, and where."""
    memory: float = float("inf")
    """Bytes that the batches ahead of the step may take."""
    settling: Settling | None = None
    """What ends an adaptive stage."""
    begin: Callable[[Learner], None] = lambda model: None
    """What is done to a model that starts from no state, such as loading a checkpoint file."""
    heads_of: Callable[[Segment], int] = lambda segment: 0
    """The stage that a segment's heads were drawn for, as `make` draws them; 0: they are those that all began with."""

    def renews_heads(self, place: int) -> bool:
        """Whether the segment at a place begins with new heads. What an arm starts from comes from another stage."""
        drawn = self.heads_of(self.segments[place])
        return drawn > 0 and (place == 0 or drawn != self.heads_of(self.segments[place - 1]))

    @property
    def label(self) -> str:
        return " ".join(str(part) for pair in self.tag.items() for part in pair)


@dataclass(frozen=True)
class Hooks:
    """The rim: what the loop needs from outside."""

    log: Callable[[dict[str, Any]], None]
    evaluate: Callable[[Any], Result]
    """Scores the model that is trained."""
    stop: Callable[[], bool] = lambda: False
    keep: Callable[[Path, Any], object] = lambda path, model: None
    """Writes the encoder of the model that is trained."""
    now: Callable[[], float] = time.perf_counter
    others: Callable[[], float] | None = others
    """Processor seconds that went to other work, since whenever; None where nobody can tell."""
