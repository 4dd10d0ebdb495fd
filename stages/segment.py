"""A segment: the stretch of an arm's training between two freeze events, in epochs and optimiser steps. The planner,
the runner and the training loop all count with it. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stages.config import TrainConfig
from stages.schedule import StagePlan


@dataclass(frozen=True)
class Segment:
    """Training with a fixed cut. Steps are optimiser steps; `first_step` and `first_epoch` count from stage 0.

    Where `train.max_steps` ends stages early there are two clocks. Rows and views go by the plan's epochs, of `epoch`;
    what is told, scored or kept goes by the epochs that were `trained`.
    """

    cut: int
    first_epoch: int
    epochs: int
    first_step: int
    steps: int
    steps_per_epoch: int
    in_place: int = 0
    """How many of the frozen blocks no cache skips: they run forward, without gradient, on the visible tokens."""
    ends_stage: bool = True
    """False where the stage goes on with more blocks frozen in place."""

    @property
    def entry(self) -> int:
        """The block at which a step's inputs enter: the cut of the stage's cache, 0 for images."""
        return self.cut - self.in_place

    def epoch(self, step: int) -> int:
        """The epoch of the plan, counted from stage 0, in whose order the segment's `step` reads rows."""
        return self.first_epoch + step // self.steps_per_epoch

    def trained(self, step: int) -> float:
        """Epochs trained since stage 0 began once `step` steps of the segment are done."""
        return (self.first_step + step) / self.steps_per_epoch

    def completes(self, epoch: int, steps: int) -> bool:
        """Whether so many trained epochs are complete within the segment's first `steps`, and were not before it."""
        return self.first_step < epoch * self.steps_per_epoch <= self.first_step + steps


def segments_of(plan: Sequence[StagePlan], steps_per_epoch: int, train: TrainConfig) -> tuple[Segment, ...]:
    """The plan's stages as one segment each; `train.max_steps` bounds each."""
    found: list[Segment] = []
    first_step = 0
    for stage in plan:
        steps = stage.epochs * steps_per_epoch
        steps = min(steps, train.max_steps) if train.max_steps else steps
        found.append(Segment(stage.cut, stage.first_epoch, stage.epochs, first_step, steps, steps_per_epoch))
        first_step += steps
    return tuple(found)


def parts_of(stage: StagePlan, segment: Segment) -> tuple[Segment, ...]:
    """A stage's segment split at the freeze events inside it. The parts take the segment's very steps and epochs."""
    cuts = {stage.first_epoch: stage.cut} | {event.epoch: event.cut for event in stage.freezes}
    starts = sorted(cuts)
    found = []
    for start, end in zip(starts, [*starts[1:], stage.first_epoch + stage.epochs], strict=True):
        before = (start - stage.first_epoch) * segment.steps_per_epoch
        steps = min((end - start) * segment.steps_per_epoch, segment.steps - before)
        if steps > 0:
            found.append(
                replace(
                    segment,
                    cut=cuts[start],
                    first_epoch=start,
                    epochs=end - start,
                    first_step=segment.first_step + before,
                    steps=steps,
                    in_place=cuts[start] - stage.cut,
                    ends_stage=False,
                )
            )
    if not found:  # stage 0 of no epoch, which takes a checkpoint as it is
        return (segment,)
    return (*found[:-1], replace(found[-1], ends_stage=True))


def turned(parts: Sequence[Segment], every: int) -> tuple[Segment, ...]:
    """A stage's parts split after every so many epochs of the stage, where a ring of views turns; 0 splits nothing."""
    found: list[Segment] = []
    for part in parts if every else ():
        done, start = 0, part.first_epoch - parts[0].first_epoch
        while done < part.epochs and done * part.steps_per_epoch < part.steps:
            epochs = min(every - (start + done) % every, part.epochs - done)
            before = done * part.steps_per_epoch
            piece = replace(
                part,
                first_epoch=part.first_epoch + done,
                epochs=epochs,
                first_step=part.first_step + before,
                steps=min(epochs * part.steps_per_epoch, part.steps - before),
                ends_stage=False,
            )
            found.append(piece)
            done += epochs
    return (*found[:-1], replace(found[-1], ends_stage=True)) if found else tuple(parts)


def trained_epochs(segments: Sequence[Segment]) -> float:
    """Epochs that some segments train together."""
    return sum(segment.steps for segment in segments) / segments[0].steps_per_epoch


def as_end_to_end(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The same epochs and steps with nothing frozen: what the e2e arm trains."""
    return tuple(replace(segment, cut=0, in_place=0) for segment in segments)
