"""When blocks freeze: FreezeOut's schedule, and plans of stages. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stages.config import ScheduleConfig

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


def plan_stages(
    schedule: ScheduleConfig, num_blocks: int, steps_per_epoch: int, warmup_epochs: float = 0.0
) -> tuple[StagePlan, ...]:
    """The stages that the settings ask for. Raises ScheduleError.

    With `freezeout`, cut k is reached at the first epoch that starts with layer k, and so all before it, frozen.
    """
    cuts = schedule.cuts
    if late := [cut for cut in cuts if cut >= num_blocks]:
        raise ScheduleError(
            f"schedule.cuts has {late[0]}, but one of the {num_blocks} blocks must learn; use 0..{num_blocks - 1}"
        )
    if schedule.kind == "adaptive":
        raise ScheduleError("schedule.kind=adaptive is not built yet in this version; use explicit or freezeout")
    epochs = (
        schedule.epochs
        if schedule.kind == "explicit"
        else _freezeout_epochs(schedule, num_blocks, steps_per_epoch, warmup_epochs)
    )
    starts = [sum(epochs[:index]) for index in range(len(cuts))]
    return tuple(StagePlan(index, *row) for index, row in enumerate(zip(cuts, epochs, starts, strict=True)))


def freezeout(schedule: ScheduleConfig, num_blocks: int, learning_steps: int, base_lr: float = 0.1) -> FreezeOut:
    """FreezeOut as the settings ask for it, over the steps after warm-up."""
    return FreezeOut(num_blocks, learning_steps, schedule.t0, schedule.scale, schedule.scale_lr, base_lr)


def _freezeout_epochs(
    schedule: ScheduleConfig, num_blocks: int, steps_per_epoch: int, warmup_epochs: float
) -> tuple[int, ...]:
    total, warmup = sum(schedule.epochs), round(warmup_epochs * steps_per_epoch)
    rule = freezeout(schedule, num_blocks, total * steps_per_epoch - warmup)
    reached = [0] + [_first_epoch_after(warmup + rule.freeze_step(cut), steps_per_epoch) for cut in schedule.cuts[1:]]
    epochs = tuple(end - start for start, end in zip(reached, [*reached[1:], total], strict=True))
    if min(epochs) < 1:
        cut = schedule.cuts[epochs.index(min(epochs))]
        raise ScheduleError(
            f"freezeout leaves the stage with cut {cut} no whole epoch of {total}; drop it from schedule.cuts, lower "
            f"schedule.t0={schedule.t0}, or raise schedule.epochs"
        )
    return epochs


def _first_epoch_after(step: float, steps_per_epoch: int) -> int:
    """The first epoch all of whose steps come after `step`, the last at which a layer may learn."""
    return math.floor(step) // steps_per_epoch + 1
