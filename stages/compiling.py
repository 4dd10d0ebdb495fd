"""torch.compile of what a training step runs, where it pays: its start-up takes tens of seconds of a segment, and every
step is a few per cent shorter. Part of the training loop's start, alike for every stage and arm. Free of torch."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from stages.config import TrainConfig

if TYPE_CHECKING:
    from models.learner import Learner

LONG = 5000
"""Optimiser steps of a segment from which on `auto` compiles. Measured on two cores (`permafrost bench`): 26 s of
start-up for all twelve blocks of the sample, 8 s for the last three, and 7-10 % less time a step of 70-220 ms."""


VARIANTS = 64
"""How often a process may compile the same function, as it does for every cut and every model of a study. torch's own
limit is 8, after which it would run the function as it is, with a warning, and the segment would be no faster."""


def compiles(train: TrainConfig, model: Learner, steps: int) -> bool:
    """Whether a segment of so many steps is compiled: a pure function of settings, so that a resumed run does the same.

    A step that skips blocks at random would be compiled again and again: `auto` leaves it alone.
    """
    wanted = worth_compiling(train, steps, model.drop is not None and model.drop.active)
    return wanted and (train.compile == "on" or compiler() is not None)


def worth_compiling(train: TrainConfig, steps: int, drops: bool) -> bool:
    """The same where there is a compiler; `drops`: whether blocks are skipped at random."""
    return train.compile == "on" or (train.compile == "auto" and steps >= LONG and not drops)


def compiler() -> str | None:
    """The C++ compiler that torch would use; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def compile_learner(model: Learner) -> None:
    """Compile what runs in a step: all that learns as one, frozen blocks, which run outside of it, one by one."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    model.compile()
    for block in model.encoder.vit.blocks[: model.encoder.cut]:
        block.compile()
