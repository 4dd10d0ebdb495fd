"""When a stage or arm ends before its epochs do: its kNN has stopped rising, or, in adaptive freezing, the blocks
before the next cut have settled. The training loop asks; what is decided goes into `Progress`, so that a resume decides
alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.vit import Encoder
from stages.adaptive import Settle
from stages.config import TrainConfig
from stages.device import autocast

PROBE = "settle/features"
"""Name, in a saved state, of the features that the last check has seen."""


def evaluations_without_gain(scores: Sequence[float | None]) -> int:
    """How many of the latest scores in a row are no better than the best before them; 0 where any is unknown."""
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return 0
    return len(known) - 1 - known.index(max(known))


def stopped_early(curve: Sequence[dict[str, Any]], patience: int) -> str:
    """Why an arm ends by `train.early_stop`, from its curve so far; empty as long as it does not."""
    scores = [point.get("knn_top1") for point in curve]
    if not patience or evaluations_without_gain(scores) < patience:
        return ""
    best = max(curve, key=lambda point: point["knn_top1"])
    return f"kNN no better than {best['knn_top1']:.3f} of epoch {best['epoch']:g} in {patience} evaluations"


@dataclass(frozen=True)
class Settling:
    """What an adaptive stage watches: blocks before `cut`, the next candidate, on uint8 images (N, 3, S, S)."""

    rule: Settle
    cut: int
    every: float
    """Epochs between two checks, counted from the first step of the stage."""
    images: Tensor

    def steps(self, steps_per_epoch: int) -> int:
        """Steps between two checks."""
        return max(1, round(self.every * steps_per_epoch))

    @torch.no_grad()
    def features(self, encoder: Encoder, train: TrainConfig) -> Tensor:
        """(N, R + L, D) float32: all tokens behind the last watched block, class and register tokens in front."""
        learning, device = encoder.training, next(encoder.parameters()).device
        encoder.eval()
        found = []
        for images in self.images.split(train.batch_size):
            with autocast(device, train.precision):
                tokens = encoder.tokens(encoder.normalized(images.to(device)))
                found.append(encoder.run(tokens, 0, self.cut).float().cpu())
        encoder.train(learning)
        return torch.cat(found)

    def why_settled(self, checks: Sequence[dict[str, float]]) -> str:
        """Why a stage ends, from its checks so far; empty as long as it does not."""
        measures = [check["settle_measure"] for check in checks]
        if not self.rule.settled(measures):
            return ""
        return (
            f"blocks before {self.cut} settled: {self.rule.metric} {measures[-1]:.2g} below {self.rule.below:g} at "
            f"{self.rule.in_a_row(measures)} checks in a row"
        )


class Watch:
    """Compares the watched features with those of the check before."""

    def __init__(self, settling: Settling, train: TrainConfig, seen: Tensor | None) -> None:
        self.settling, self.train, self.seen = settling, train, seen

    def look(self, encoder: Encoder) -> None:
        """Remember the features that the first check is compared with."""
        if self.seen is None:
            self.seen = self.settling.features(encoder, self.train)

    def check(self, encoder: Encoder, epoch: float, checks: Sequence[dict[str, float]]) -> dict[str, float]:
        """One check's numbers; `checks` are those before it."""
        assert self.seen is not None, "look comes first"
        now = self.settling.features(encoder, self.train)
        measure, self.seen = self.settling.rule.measure(now, self.seen), now
        measures = [*(check["settle_measure"] for check in checks), measure]
        return {
            "epoch": epoch,
            "before_cut": self.settling.cut,
            "settle_measure": measure,
            "settle_checks": self.settling.rule.in_a_row(measures),
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a saved state must hold of it."""
        return {} if self.seen is None else {PROBE: self.seen}
