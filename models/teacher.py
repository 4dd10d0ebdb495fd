"""Teachers for self-distillation: an encoder that does not learn by gradient and sees all tokens of the view that the
student sees masked, as in data2vec. Heads predict its features behind one of its blocks. It is either the encoder that
stage 0 ended with, or an exponential moving average of the student. No module of the model that it teaches, so that the
model's modes, parameters and states leave it alone.

Shapes: B batch, C channels, H and W pixels, L all tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.vit import Encoder


class Teacher:
    """An encoder that is only looked at: in eval mode, never with gradient."""

    floor = 0
    """Blocks behind which it is looked at the earliest; features asked for from before are those behind them."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder.requires_grad_(False).eval()

    @torch.no_grad()
    def of_images(self, images_BCHW: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        """`of_tokens` for uint8 images: all their tokens run together."""
        return self.of_tokens(self.encoder.tokens(self.encoder.normalized(images_BCHW)), 0, blocks)

    @torch.no_grad()
    def of_tokens(self, tokens_BLD: Tensor, start: int, blocks: Sequence[int]) -> dict[int, Tensor]:
        """The patches' features (B, L, D) behind some blocks, counted from 1.

        `start` blocks have run on the tokens, which have their prefix in front.
        """
        assert start <= max(min(blocks), self.floor), "what lay before the tokens is gone"
        found = {}
        for block in sorted(set(blocks)):
            stop = max(block, self.floor)
            tokens_BLD, start = self.encoder.run(tokens_BLD, start, stop), stop
            found[block] = self.encoder.patches(tokens_BLD)
        return found


class EmaTeacher(Teacher):
    """The moving average of a student. What is frozen in the student is not copied: both use the same parameters, as
    long as the student is not spread over ranks.

    A cached stage has no features from before the cut, so that none are looked at live either.
    """

    def __init__(self, student: Encoder, momentum: float) -> None:
        super().__init__(copy.deepcopy(student, {id(p): p for p in student.parameters() if not p.requires_grad}))
        self.momentum, self.floor = momentum, student.cut
        self.names = tuple(name for name, p in student.vit.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def follow(self, student: Encoder) -> None:
        """average <- momentum * average + (1 - momentum) * student, after an optimiser step."""
        theirs = [student.vit.get_parameter(name) for name in self.names]
        # Weights that are spread over ranks are gathered: every rank keeps the whole average, which sees all tokens.
        theirs = [gather() if (gather := getattr(one, "full_tensor", None)) else one for one in theirs]
        get_ema_multi_avg_fn(self.momentum)(list(self.state_dict().values()), theirs, None)

    def restart(self, student: Encoder) -> None:
        """The average begins anew with the student as it is."""
        self.load_state_dict(student.vit.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """What is averaged, all that learns in the student, by timm's names."""
        return {name: self.encoder.vit.get_parameter(name) for name in self.names}

    @torch.no_grad()
    def load_state_dict(self, weights: Mapping[str, Tensor]) -> Any:
        """Take over a whole encoder: an average that was saved, and the student's weights of what it lacks.

        They are copied even where this shares them with a student: one that is spread over ranks shares none.
        """
        for name, mine in self.encoder.vit.named_parameters():
            mine.copy_(weights[name])
