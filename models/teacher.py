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

from models.config import TeacherConfig
from models.targets import normalize_images
from models.vit import Encoder


class Teacher:
    """An encoder that is only looked at: in eval mode, never with gradient."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder.requires_grad_(False).eval()

    @torch.no_grad()
    def of_images(self, images_BCHW: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        """`of_tokens` for uint8 images: all their tokens run together."""
        return self.of_tokens(self.encoder.tokens(normalize_images(images_BCHW)), 0, blocks)

    @torch.no_grad()
    def of_tokens(self, tokens_BLD: Tensor, start: int, blocks: Sequence[int]) -> dict[int, Tensor]:
        """The patches' features (B, L, D) behind each of some blocks, counted from 1, of tokens on which `start` blocks
        have run, the prefix in front.

        What lay behind an earlier block than `start` is gone: in its place stand the tokens as they are.
        """
        found = {}
        for block in sorted(set(blocks)):
            tokens_BLD, start = self.encoder.run(tokens_BLD, start, block), max(start, block)
            found[block] = self.encoder.patches(tokens_BLD)
        return found


class EmaTeacher(Teacher):
    """The moving average of a student. What is frozen in the student is not copied: both use the same parameters."""

    def __init__(self, student: Encoder, config: TeacherConfig) -> None:
        super().__init__(copy.deepcopy(student, {id(p): p for p in student.parameters() if not p.requires_grad}))
        self.config = config
        self.names = tuple(name for name, p in student.vit.named_parameters() if p.requires_grad)

    def after(self, student: Encoder, step: int) -> None:
        """Follow the student that optimiser step `step` of the run, the first being 0, has left."""
        self.follow(student, self.config.momentum_at(step))

    @torch.no_grad()
    def follow(self, student: Encoder, momentum: float) -> None:
        """average <- momentum * average + (1 - momentum) * student; with momentum 0 it begins anew with the student."""
        theirs = [student.vit.get_parameter(name) for name in self.names]
        get_ema_multi_avg_fn(momentum)(list(self.state_dict().values()), theirs, None)

    def state_dict(self) -> dict[str, Tensor]:
        """What is averaged, all that learns in the student, by timm's names."""
        return {name: self.encoder.vit.get_parameter(name) for name in self.names}

    @torch.no_grad()
    def load_state_dict(self, average: Mapping[str, Tensor]) -> Any:
        """Take over an average that was saved."""
        for name, mine in self.state_dict().items():
            mine.copy_(average[name])
