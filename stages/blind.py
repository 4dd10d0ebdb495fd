"""What predictors that see nothing of an image would lose: one constant for all tokens, and one for every place. A loss
says little by itself; beside these it says how much of the target was found out from what is visible. Where features
have seen hidden tokens (full mode), a loss far below them is no achievement.

Shapes: B batch, S places of a target's grid, T values of a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.batch import MaskedBatch
from models.config import HeadSpec
from models.learner import Learner
from models.mim import MaskedModel
from stages.config import TrainConfig
from stages.device import autocast
from stages.segment import Segment
from stages.sources import Source

IMAGES = 512
"""Images that the losses are of. The constants are fitted on the targets that they are scored on, so with three of four
tokens hidden the loss of places is about a four hundredth too low."""

BARELY = 0.02
"""A loss that lies no more than this share below that of places says that nothing was learnt from what is visible."""

PIECE = 64
"""Images at most that are masked at once: a batch is that of all ranks and micro-batches, too much for some devices."""


class Blind(NamedTuple):
    """Losses of the best predictors that see nothing, as `masked_loss` counts."""

    mean: float
    """Of one constant: the mean target of all scored tokens."""
    place: float
    """Of a constant for every place: the least that a decoder without context can come to."""


class Tally:
    """The sums over batches that both losses follow from, in float64."""

    def __init__(self) -> None:
        self.weight_S = self.sum_ST = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, target_BST: Tensor, weight_BS: Tensor) -> None:
        """Count a batch's targets, each by its weight in the loss."""
        target, weight = target_BST.double(), weight_BS.double()
        self.weight_S = self.weight_S + weight.sum(dim=0).cpu()
        self.sum_ST = self.sum_ST + torch.einsum("bs,bst->st", weight, target).cpu()
        self.squares = self.squares + (weight * target.square().sum(dim=-1)).sum().cpu()

    def losses(self) -> Blind:
        """Mean squared errors per value, by sum of squares less what the means explain."""
        weight, values = self.weight_S.sum(), self.sum_ST.shape[-1]
        by_mean = self.sum_ST.sum(dim=0).square().sum() / weight
        by_place = (self.sum_ST.square().sum(dim=-1) / self.weight_S.clamp_min(1e-12)).sum()
        mean, place = (float((self.squares - explained) / (weight * values)) for explained in (by_mean, by_place))
        return Blind(mean, place)


def blind_losses(batches: Iterable[MaskedBatch], heads: Iterable[HeadSpec]) -> dict[str, Blind]:
    """By head; every hidden token counts, also where only a share of them is decoded, but for masks that weigh tokens
    by their distance: those weigh what is decoded."""
    tallies = {head.name: (head.key, Tally()) for head in heads}
    for batch in batches:
        for key, tally in tallies.values():
            tally.add(*batch.whole.scored_at(key))
    return {name: tally.losses() for name, (_, tally) in tallies.items()}


@torch.no_grad()
def blind_record(model: Learner, source: Source, segment: Segment, steps: int, train: TrainConfig) -> dict[str, Any]:
    """{"mean", "place", "heads": {name: {"mean", "place"}}} of the last of the `steps` that a segment was trained, all
    heads together by the weights that their losses ended with. Empty where nothing is hidden, or nothing trained."""
    if not isinstance(model, MaskedModel) or not steps:
        return {}
    device, progress = next(model.parameters()).device, 0.0
    first = max(0, steps - max(1, IMAGES // train.batch_size))

    def pieces() -> Iterator[MaskedBatch]:
        nonlocal progress
        for step in range(first, steps):
            inputs = source.load(segment, step)
            progress = inputs.progress
            for piece in inputs.split(-(-train.batch_size // PIECE)):
                yield source.mask(model, piece.to(device))

    with autocast(device, train.precision):
        heads = blind_losses(pieces(), model.specs)
    weights = dict(zip(model.loss_names, model.loss_weights(progress), strict=True))
    total = {kind: sum(weights[name] * getattr(blind, kind) for name, blind in heads.items()) for kind in Blind._fields}
    return total | {"heads": {name: blind._asdict() for name, blind in heads.items()}}


def nothing_learnt(loss: float | None, blind: dict[str, Any]) -> str:
    """What to tell of a loss at its end that a predictor which sees nothing comes to as well; empty for a lower one.

    loss: None where nothing was trained. blind: as `blind_record` has it; where either is missing nothing is told.
    """
    if not blind or loss is None or loss < (1 - BARELY) * blind["place"]:
        return ""
    return (
        f"its loss, {loss:.4g}, is no lower than {1 - BARELY:.0%} of {blind['place']:.4g}, to which a decoder comes "
        "that sees nothing of an image: nothing was learnt from visible tokens; train longer or change target.kind"
    )
