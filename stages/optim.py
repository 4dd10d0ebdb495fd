"""The optimiser: AdamW over what learns, plain or schedule-free, and its learning rate at every step of the plan. The
training loop steps it, `checkpoint` keeps what it remembers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from schedulefree import AdamWScheduleFree

from models.learner import Learner
from stages.config import ScheduleConfig, TrainConfig
from stages.schedule import freezeout

BETA1 = 0.9
PREFIX = ("cls_token", "reg_token")
"""timm's names of the tokens in front of the patches: they freeze with the patch embedding, and no decay pulls them."""
LAYER_0 = ("patch_embed.", "norm_pre.", "pos_embed", *PREFIX)
SCALARS = ("k", "weight_sum", "lr_max", "train_mode")
"""What a group of schedule-free AdamW remembers: steps, sum of the average's weights, largest rate, which weights."""


def parameter_groups(model: Learner, weight_decay: float, by_layer: bool = False) -> list[dict[str, Any]]:
    """What learns, in groups: weights decay; biases, norms and tokens do not. A frozen parameter is in none.

    `by_layer` splits further by FreezeOut's layers, 0 the patch embedding, i the i-th block; what stands behind the
    blocks has layer -1.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, decays = layer_of(name) if by_layer else -1, parameter.ndim > 1 and not name.endswith(PREFIX)
            group = groups.setdefault(
                (layer, decays), {"params": [], "weight_decay": weight_decay if decays else 0.0, "layer": layer}
            )
            group["params"].append(parameter)
    return list(groups.values())


def layer_of(name: str) -> int:
    """FreezeOut's layer of a parameter of a learner. Layer 0 is all that makes the first block's input."""
    if name.startswith("encoder.vit.blocks."):
        return int(name.split(".")[3]) + 1
    return 0 if name.startswith(tuple(f"encoder.vit.{part}" for part in LAYER_0)) else -1


def build_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of `train.lr_schedule`; its rates are set step by step by `Rates`."""
    return build_schedule_free(groups, train) if train.lr_schedule == "schedule_free" else build_adamw(groups, train)


def build_adamw(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW whose step is fused over all parameters."""
    return torch.optim.AdamW(groups, lr=train.lr, betas=(BETA1, train.beta2), fused=True)


def build_schedule_free(groups: list[dict[str, Any]], train: TrainConfig) -> ScheduleFree:
    """Schedule-free AdamW, ready to train."""
    optimizer = ScheduleFree(groups, lr=train.lr, betas=(BETA1, train.beta2))
    optimizer.train()
    return optimizer


class ScheduleFree(AdamWScheduleFree):
    """Schedule-free AdamW: parameters hold the point y at which gradients are taken while it trains, and the average x
    of the points z, which is the result, in between. The warm-up is that of `Rates`, not its own.

    Source: Defazio et al., "The Road Less Scheduled", arXiv 2405.15682, as in facebookresearch/schedule_free.
    """

    param_groups: list[dict[str, Any]]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. A group of rate 0 rests: the average would otherwise go on drifting towards z."""
        for group in self.param_groups:
            if group["lr"] == 0:
                for parameter in group["params"]:
                    parameter.grad = None
        loss: float | None = super().step(closure)
        return loss

    def scalars(self) -> dict[torch.nn.Parameter, tuple[float, ...]]:
        """What a group remembers, `SCALARS`, for each of its parameters."""
        return {
            parameter: tuple(float(group[name]) for name in SCALARS)
            for group in self.param_groups
            for parameter in group["params"]
        }

    def take_up(self, scalars: dict[torch.nn.Parameter, tuple[float, ...]]) -> None:
        """Go on from `scalars`. A group whose parameters remember different things, since some are new in it, is split;
        the oldest come first, so that the order does not depend on when a run was resumed.

        In weights that were handed on, a parameter without z is new: it has not learnt in the segments before.
        """
        found: list[dict[str, Any]] = []
        training = all(mode for *_, mode in scalars.values())
        fresh = (0.0, 0.0, -1.0, float(training))
        if not training:
            scalars = {p: values for p, values in scalars.items() if "z" in self.state.get(p, {})}
        for group in self.param_groups:
            parts: dict[tuple[float, ...], list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                parts.setdefault(scalars.get(parameter, fresh), []).append(parameter)
            for values, parameters in sorted(parts.items(), key=lambda part: -part[0][0]):
                steps, weight_sum, largest, _ = values
                memory = {"k": int(steps), "weight_sum": weight_sum, "lr_max": largest, "train_mode": training}
                found.append(group | memory | {"params": parameters})
        self.param_groups = found


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, a model in schedule-free training holds its averaged weights; after it, the very bits it had before."""
    if not isinstance(optimizer, ScheduleFree) or not optimizer.param_groups[0]["train_mode"]:
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, held, strict=True):
                parameter.copy_(value)
        for group in optimizer.param_groups:
            group["train_mode"] = True


def to_average(optimizer: torch.optim.Optimizer) -> None:
    """Leave the averaged weights in the model: what a finished segment hands on, and what is frozen."""
    if isinstance(optimizer, ScheduleFree):
        optimizer.eval()


def to_training(optimizer: torch.optim.Optimizer) -> None:
    """The reverse, before a segment's first step; nothing where the weights are already those that train."""
    if isinstance(optimizer, ScheduleFree):
        optimizer.train()


@dataclass(frozen=True)
class Rates:
    """The learning rate of every parameter group at every optimiser step, counted from stage 0."""

    train: TrainConfig
    schedule: ScheduleConfig
    num_blocks: int
    total_steps: int
    steps_per_epoch: int
    stage_starts: tuple[int, ...] = (0,)
    """First step of every stage; where `train.lr_restart` begins anew."""
    freezes: bool = True
    """False for the end-to-end arm, all of whose layers follow the plain schedule."""

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up at the start of stage 0."""
        return self.warmup_of(self.total_steps)

    def warmup_of(self, steps: int) -> int:
        """Steps of warm-up before a schedule over so many steps; it never takes all of them."""
        return min(round(self.train.warmup_epochs * self.steps_per_epoch), steps - 1)

    @property
    def by_layer(self) -> bool:
        """FreezeOut gives every layer a rate of its own."""
        return self.freezes and self.schedule.kind == "freezeout"

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rates of a step; returns that of what stands behind the blocks, the rate of all without FreezeOut."""
        for group in optimizer.param_groups:
            group["lr"] = self.of_layer(group["layer"], step)
        return self.of_layer(-1, step)

    def of_layer(self, layer: int, step: int) -> float:
        """The rate of a FreezeOut layer; layer -1, and all layers without FreezeOut, follow the plain schedule."""
        warmup = self.warmup_steps
        freezes = self.by_layer and layer >= 0 and (layer > 0 or self.schedule.freeze_embed)
        if not freezes or step < warmup:
            return self.plain(step)
        rule = freezeout(self.schedule, self.num_blocks, self.total_steps - warmup, self.train.lr)
        if self.schedule.layer_rates == "shared":
            return self.plain(step) if step - warmup < rule.freeze_step(layer) else 0.0
        return rule.lr(layer, step - warmup)

    def plain(self, step: int) -> float:
        """The rate of `train.lr_schedule`, over the whole plan or, with `train.lr_restart`, over the step's stage."""
        train, start, end = self.train, 0, self.total_steps
        if train.lr_restart:
            start = max(first for first in self.stage_starts if first <= step)
            end = min((first for first in self.stage_starts if first > step), default=end)
        steps = end - start
        return learning_rate(
            step - start,
            steps,
            self.warmup_of(steps),
            train.lr,
            train.min_lr,
            train.lr_schedule,
            train.decay_share,
        )


def learning_rate(
    step: int,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    minimum: float,
    schedule: str,
    decay_share: float = 0.2,
) -> float:
    """Linear warm-up from peak / warmup_steps, then `schedule`.

    constant and schedule_free: peak. cosine: from peak to `minimum` at `total_steps`. wsd (warm-up, stable, decay;
    Hu et al., MiniCPM, arXiv 2404.06395): peak, then over the last `decay_share` of the steps, or what the warm-up
    leaves of them, linearly to `minimum` at `total_steps`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule in ("constant", "schedule_free"):
        return peak
    if schedule == "wsd":
        start = max(warmup_steps, total_steps * (1 - decay_share))
        return peak if step <= start else peak + (minimum - peak) * (step - start) / (total_steps - start)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) / 2 * (1 + math.cos(math.pi * done))
