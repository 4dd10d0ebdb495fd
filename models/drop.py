"""Depth that is dropped while training, and only by blocks that learn: stochastic depth, which drops a block's branches
sample by sample, and progressive layer dropping, which skips whole blocks for a step, so that they do not run at all.
What a step drops is a pure function of (seed, step); outside a step nothing is dropped.

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor

from models.spec import derive_seed
from models.vit import Encoder

PACE = 100.0
"""Progressive layer dropping's gamma times the steps of the run: a twentieth of it brings 99 % of the way."""


class BranchDrop(DropPath):
    """timm's stochastic depth; `gain` makes up for the steps in which the whole block is skipped.

    Of several ranks, each draws for all of them and takes its own: what a sample drops does not depend on who has it.
    """

    gain = 1.0
    rank, ranks, paired = 0, 1, False

    def forward(self, branch_BLD: Tensor) -> Tensor:
        """The branch as its block adds it: some samples dropped, the rest scaled; untouched in eval mode."""
        if self.ranks > 1 and self.training and self.drop_prob:  # evaluation draws nothing, of batches of any size
            drawn = super().forward(branch_BLD.new_ones(self.ranks * len(branch_BLD), 1, 1))
            dropped_BLD = branch_BLD * self.own(drawn)
        else:
            dropped_BLD = super().forward(branch_BLD)
        return dropped_BLD * self.gain if self.training and self.gain != 1.0 else dropped_BLD

    def own(self, drawn: Tensor) -> Tensor:
        """Of what is drawn for a micro-batch of all ranks this one's, by the places that it has loaded."""
        if not self.paired:
            return drawn.unflatten(0, (self.ranks, -1))[self.rank]
        halves = drawn.unflatten(0, (2, self.ranks, -1))
        return torch.cat([halves[0, self.rank], halves[1, self.ranks - 1 - self.rank]])


@dataclass(frozen=True)
class DepthDrop:
    """What the learning blocks of an encoder drop over a run of `total_steps` optimiser steps, counted from stage 0."""

    seed: int
    drop_path: float
    """Chance of the last block that a sample skips a branch; the first block's is 0, those between rise linearly."""
    layer_drop: float
    """Highest chance at which a block could be skipped: 1 minus the paper's limit of theta."""
    total_steps: int
    rank: int = 0
    ranks: int = 1
    """Processes that share every micro-batch in equal slices, in order."""
    paired: bool = False
    """Whether they share each half of it so, the second in reverse order, as where images are mixed in pairs."""

    @property
    def active(self) -> bool:
        return self.drop_path > 0 or self.layer_drop > 0

    def install(self, encoder: Encoder) -> None:
        """Fill the places that timm's blocks have for it."""
        if not self.active:
            return
        for block in encoder.vit.blocks:
            for place in PLACES:
                branch = BranchDrop()
                branch.rank, branch.ranks, branch.paired = self.rank, self.ranks, self.paired
                setattr(block, place, branch)
        encoder.train(encoder.training)  # frozen blocks, and what they now hold, are in eval mode

    @contextmanager
    def during(self, encoder: Encoder, step: int) -> Iterator[None]:
        """Within, the encoder drops as this optimiser step does; a step's micro-batches draw one after the other."""
        if not self.active:
            yield
            return
        keeps = self.keep_probabilities(encoder.depth, step)
        device = next(encoder.parameters()).device
        set_branches(encoder, drop_path_rates(self.drop_path, encoder.depth), keeps)
        encoder.skipped = skipped_blocks(self.seed, step, keeps, encoder.cut)
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(derive_seed(self.seed, "drop path", step))
                yield
        finally:
            encoder.skipped = frozenset()
            set_branches(encoder, [0.0] * encoder.depth, [1.0] * encoder.depth)

    def keep_probabilities(self, depth: int, step: int) -> list[float]:
        """Chance of each block to run at a step."""
        theta = kept_share(step, self.total_steps, self.layer_drop)
        return [keep_probability(block, depth, theta) for block in range(depth)]


PLACES = ("drop_path1", "drop_path2")
"""Where timm's blocks drop their two branches."""


def set_branches(encoder: Encoder, rates: list[float], keeps: list[float]) -> None:
    """Set every block's stochastic depth and its chance to run, which its branches make up for."""
    for block, rate, keep in zip(encoder.vit.blocks, rates, keeps, strict=True):
        for place in PLACES:
            branch: Any = getattr(block, place)
            branch.drop_prob, branch.gain = rate, 1 / keep


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth's rate of every block: 0 for the first, `rate` for the last, linear in between."""
    return [rate * block / max(1, depth - 1) for block in range(depth)]


def kept_share(step: int, total_steps: int, layer_drop: float) -> float:
    """theta(t) = (1 - floor) exp(-gamma t) + floor with floor = 1 - layer_drop and gamma = 100 / total steps.

    Source: Zhang and He, "Progressive Layer Dropping", arXiv 2010.13369; at t = 0 everything is kept.
    """
    return layer_drop * math.exp(-PACE * step / total_steps) + 1 - layer_drop


def keep_probability(block: int, depth: int, theta: float) -> float:
    """1 - i/L (1 - theta) for block i = 0..L-1: the first block always runs. Source: algorithm 1 of the same paper."""
    return 1 - block / depth * (1 - theta)


def skipped_blocks(seed: int, step: int, keep_probabilities: list[float], cut: int) -> frozenset[int]:
    """The learning blocks, those from `cut` on, that a step skips: each drawn on its own from (seed, step, block)."""
    return frozenset(
        block
        for block, keep in enumerate(keep_probabilities)
        if block >= cut and derive_seed(seed, "layer drop", step, block) * 2.0**-63 >= keep
    )
