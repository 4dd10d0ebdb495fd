"""When blocks freeze: FreezeOut's schedule, its freeze events, and the plan of stages that the planner, the runner and
the training loop count with. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stages.config import ScheduleConfig
from stages.flops import Event, Work, choose_caches

SCALES = {"linear": 1, "squared": 2, "cubic": 3}


class ScheduleError(ValueError):
    """A schedule that cannot be carried out."""


@dataclass(frozen=True)
class FreezeOut:
    """FreezeOut's schedule: layer i learns for the first `lr_ratio(i)` of the run, its rate falling to 0 by a cosine.

    Layer 0 is the patch embedding, layers 1..num_layers are the blocks. Steps are optimiser steps after warm-up.
    Source: Brock et al., "FreezeOut", arXiv 1706.04983, layers spaced from t0 to 1 as in ViTFreeze, arXiv 2312.02194.
    """

    num_layers: int
    total_steps: int
    t0: float = 0.8
    scale: Literal["linear", "squared", "cubic"] = "cubic"
    scale_lr: bool = True
    base_lr: float = 0.1

    def lr_ratio(self, layer: int) -> float:
        """The share of the run during which the layer learns."""
        return float((self.t0 + (1 - self.t0) * layer / self.num_layers) ** SCALES[self.scale])

    def freeze_step(self, layer: int) -> float:
        """`total_steps * lr_ratio`: the layer learns at no step after it."""
        return self.total_steps * self.lr_ratio(layer)

    def lr(self, layer: int, step: int) -> float:
        """The layer's learning rate at a step; 0 once it is frozen."""
        if step >= self.freeze_step(layer):  # where the cosine reaches 0
            return 0.0
        peak = self.base_lr / self.lr_ratio(layer) if self.scale_lr else self.base_lr
        return peak / 2 * (1 + math.cos(math.pi * step / self.freeze_step(layer)))


@dataclass(frozen=True)
class StagePlan:
    """A stage: its cut, its epochs, and the epoch of the whole run that it begins with."""

    index: int
    cut: int
    epochs: int
    first_epoch: int
    freezes: tuple[Event, ...] = ()
    """Freeze events inside the stage that get no cache: from the event's epoch on the blocks before its cut are frozen
    as well, and go on running forward."""


def plan_stages(
    schedule: ScheduleConfig,
    num_blocks: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0.0,
    work: Work | None = None,
    taken: Sequence[int] = (),
) -> tuple[StagePlan, ...]:
    """The stages that the settings ask for. Raises ScheduleError.

    With `freezeout`, cut k is reached at the first epoch that starts with layer k, and so all before it, frozen. `work`
    prices the caches that `schedule.caches=cost` chooses from. With `adaptive`, `taken` are the epochs that the
    finished stages took; the stage after them takes what is left for as long as nothing has settled.
    """
    cuts = schedule.cuts
    if schedule.caches == "given" and (late := [cut for cut in cuts if cut >= num_blocks]):
        raise ScheduleError(
            f"schedule.cuts has {late[0]}, but one of the {num_blocks} blocks must learn; use 0..{num_blocks - 1}"
        )
    if schedule.kind == "adaptive":
        return _adaptive_stages(schedule, taken)
    if schedule.kind == "explicit":
        return _stages(cuts, schedule.epochs, ())
    events = freeze_events(schedule, num_blocks, steps_per_epoch, warmup_epochs)
    total = sum(schedule.epochs)
    if schedule.caches == "cost":
        assert work is not None, "only work tells what a cache costs"
        chosen = choose_caches(work, events, total)
        starts = [0, *(event.epoch for event in chosen)]
        cuts = (0, *(event.cut for event in chosen))
    else:
        starts = _cut_epochs(schedule, num_blocks, steps_per_epoch, warmup_epochs)
    epochs = [end - start for start, end in zip(starts, [*starts[1:], total], strict=True)]
    if min(epochs) < 1:
        cut = cuts[epochs.index(min(epochs))]
        raise ScheduleError(
            f"freezeout leaves the stage with cut {cut} no whole epoch of {total}; drop it from schedule.cuts, lower "
            f"schedule.t0={schedule.t0}, or raise schedule.epochs"
        )
    return _stages(cuts, epochs, events)


def freeze_events(
    schedule: ScheduleConfig, num_blocks: int, steps_per_epoch: int, warmup_epochs: float = 0.0
) -> tuple[Event, ...]:
    """FreezeOut's freeze events inside the run, by epoch; blocks that freeze within the same epoch are one event.

    Freezing waits for an epoch's start and loses nothing by it: a layer's rate is 0 from its freeze step on. Without
    `schedule.freeze_embed` there are none: backward has to reach layer 0, so no block can be left out of it.
    """
    if schedule.kind != "freezeout" or not schedule.freeze_embed:
        return ()
    rule, warmup = _rule(schedule, num_blocks, steps_per_epoch, warmup_epochs)
    found: dict[int, int] = {}
    for cut in range(1, num_blocks):
        found[_first_epoch_after(warmup + rule.freeze_step(cut), steps_per_epoch)] = cut
    return tuple(Event(epoch, cut) for epoch, cut in found.items() if epoch < sum(schedule.epochs))


def freezeout(schedule: ScheduleConfig, num_blocks: int, learning_steps: int, base_lr: float = 0.1) -> FreezeOut:
    """FreezeOut as the settings ask for it, over the steps after warm-up."""
    return FreezeOut(num_blocks, learning_steps, schedule.t0, schedule.scale, schedule.scale_lr, base_lr)


def _stages(cuts: Sequence[int], epochs: Sequence[int], events: Sequence[Event]) -> tuple[StagePlan, ...]:
    found, first = [], 0
    for index, (cut, length) in enumerate(zip(cuts, epochs, strict=True)):
        inside = tuple(event for event in events if first <= event.epoch < first + length and event.cut > cut)
        found.append(StagePlan(index, cut, length, first, inside))
        first += length
    return tuple(found)


def _adaptive_stages(schedule: ScheduleConfig, taken: Sequence[int]) -> tuple[StagePlan, ...]:
    """The finished stages, and the open one while epochs and cuts are left."""
    left, epochs = sum(schedule.epochs), []
    for index in range(min(len(schedule.cuts), len(taken) + 1)):
        if left:
            epochs.append(min(left, taken[index]) if index < len(taken) else left)
            left -= epochs[-1]
    return _stages(schedule.cuts[: len(epochs)], epochs, ())


def _rule(
    schedule: ScheduleConfig, num_blocks: int, steps_per_epoch: int, warmup_epochs: float
) -> tuple[FreezeOut, int]:
    """FreezeOut over the whole run, and the steps of warm-up before it begins."""
    warmup = round(warmup_epochs * steps_per_epoch)
    return freezeout(schedule, num_blocks, sum(schedule.epochs) * steps_per_epoch - warmup), warmup


def _cut_epochs(
    schedule: ScheduleConfig, num_blocks: int, steps_per_epoch: int, warmup_epochs: float
) -> list[int]:
    """The epoch at which each of the given cuts is reached."""
    rule, warmup = _rule(schedule, num_blocks, steps_per_epoch, warmup_epochs)
    return [0] + [_first_epoch_after(warmup + rule.freeze_step(cut), steps_per_epoch) for cut in schedule.cuts[1:]]


def _first_epoch_after(step: float, steps_per_epoch: int) -> int:
    """The first epoch all of whose steps come after `step`, the last at which a layer may learn."""
    return math.floor(step) // steps_per_epoch + 1
