"""A segment: the stretch of an arm's training between two freeze events, in epochs and optimiser steps. The planner,
the runner and the training loop all count with it. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stages.config import TrainConfig
from stages.schedule import StagePlan


@dataclass(frozen=True)
class Segment:
    """Training with a fixed cut. Steps are optimiser steps; `first_step` and `first_epoch` count from stage 0."""

    cut: int
    first_epoch: int
    epochs: int
    first_step: int
    steps: int
    steps_per_epoch: int

    def epoch(self, step: int) -> int:
        """The epoch, counted from stage 0, that the segment's `step` belongs to."""
        return self.first_epoch + step // self.steps_per_epoch


def segments_of(plan: Sequence[StagePlan], steps_per_epoch: int, train: TrainConfig) -> tuple[Segment, ...]:
    """The plan's stages as segments; `train.max_steps` bounds each."""
    found: list[Segment] = []
    first_step = 0
    for stage in plan:
        steps = stage.epochs * steps_per_epoch
        steps = min(steps, train.max_steps) if train.max_steps else steps
        found.append(Segment(stage.cut, stage.first_epoch, stage.epochs, first_step, steps, steps_per_epoch))
        first_step += steps
    return tuple(found)


def as_end_to_end(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The same epochs and steps with nothing frozen: what the e2e arm trains."""
    return tuple(replace(segment, cut=0) for segment in segments)
