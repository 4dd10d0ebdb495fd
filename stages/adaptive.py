"""When blocks have settled: how far their output on a fixed probe batch has moved since the last check, and how long it
has been standing still. Pure mathematics; the training loop hands in features and acts on the answer.

Shapes: N rows (tokens of all probe images), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


def relative_change(now: Tensor, before: Tensor) -> float:
    """||now - before|| / ||before||, over all numbers of two tensors of one shape; 0 where nothing moved."""
    moved, size = (now.double() - before.double()).norm(), before.double().norm()
    return float(moved / size) if size > 0 else (0.0 if moved == 0 else float("inf"))


def linear_cka(one_ND: Tensor, other_ND: Tensor) -> float:
    """Linear centred kernel alignment, in 0..1: ||Y'X||² / (||X'X|| ||Y'Y||), columns centred, Frobenius norms.

    1 where one is a rotation or scaling of the other. Two constant features are alike; one is unlike anything else.
    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv 1905.00414, section 3.
    """
    x, y = (value.double() - value.double().mean(dim=0) for value in (one_ND, other_ND))
    shared, own, others = (y.T @ x).norm() ** 2, (x.T @ x).norm(), (y.T @ y).norm()
    if own == 0 or others == 0:
        return float(own == others)
    return float(shared / (own * others))


@dataclass(frozen=True)
class Settle:
    """When blocks count as settled: `checks` measures in a row below `below`."""

    metric: Literal["change", "cka"]
    below: float
    checks: int

    def measure(self, now: Tensor, before: Tensor) -> float:
        """How far features (..., D) have moved between two checks: relative change, or 1 - linear CKA over tokens."""
        if self.metric == "change":
            return relative_change(now, before)
        return 1.0 - linear_cka(now.flatten(0, -2), before.flatten(0, -2))

    def in_a_row(self, measures: Sequence[float]) -> int:
        """How many of the latest measures are below the bound without a break."""
        count = 0
        for value in reversed(measures):
            if not value < self.below:
                break
            count += 1
        return count

    def settled(self, measures: Sequence[float]) -> bool:
        return self.in_a_row(measures) >= self.checks
