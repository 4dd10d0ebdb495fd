"""The optimiser: AdamW over what learns, and its learning rate at every step of the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from models.learner import Learner
from stages.config import ScheduleConfig, TrainConfig
from stages.schedule import freezeout

BETA1 = 0.9
PREFIX = ("cls_token", "reg_token")
"""timm's names of the tokens in front of the patches: they freeze with the patch embedding, and no decay pulls them."""


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
    """FreezeOut's layer of a parameter of a learner."""
    if name.startswith("encoder.vit.blocks."):
        return int(name.split(".")[3]) + 1
    first = ("encoder.vit.patch_embed.", "encoder.vit.norm_pre.", *(f"encoder.vit.{token}" for token in PREFIX))
    return 0 if name.startswith(first) else -1


def build_adamw(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW whose step is fused over all parameters."""
    return torch.optim.AdamW(groups, lr=train.lr, betas=(BETA1, train.beta2), fused=True)


@dataclass(frozen=True)
class Rates:
    """The learning rate of every parameter group at every optimiser step, counted from stage 0."""

    train: TrainConfig
    schedule: ScheduleConfig
    num_blocks: int
    total_steps: int
    steps_per_epoch: int

    @property
    def warmup_steps(self) -> int:
        return min(round(self.train.warmup_epochs * self.steps_per_epoch), self.total_steps - 1)

    @property
    def by_layer(self) -> bool:
        """FreezeOut gives every layer a rate of its own."""
        return self.schedule.kind == "freezeout"

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rates of a step; returns that of what stands behind the blocks, the rate of all without FreezeOut."""
        for group in optimizer.param_groups:
            group["lr"] = self.of_layer(group["layer"], step)
        return self.of_layer(-1, step)

    def of_layer(self, layer: int, step: int) -> float:
        """The rate of a FreezeOut layer; layer -1, and all layers without FreezeOut, follow the plain schedule."""
        train, warmup = self.train, self.warmup_steps
        if layer < 0 or not self.by_layer or step < warmup:
            return learning_rate(step, self.total_steps, warmup, train.lr, train.min_lr, train.lr_schedule)
        rule = freezeout(self.schedule, self.num_blocks, self.total_steps - warmup, train.lr)
        return rule.lr(layer, step - warmup)


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, minimum: float, schedule: str) -> float:
    """Linear warm-up from peak / warmup_steps, then constant, or a cosine that reaches `minimum` at `total_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) / 2 * (1 + math.cos(math.pi * done))
