"""Teachers for self-distillation: an encoder that does not learn by gradient and sees all tokens of the view that the
student sees masked, as in data2vec. Its features behind one of its blocks, layer-normalised, are what is predicted.
Either the encoder that stage 0 ended with, or an exponential moving average of the student.

Shapes: B batch, C channels, H and W pixels, L all tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.targets import feature_target, normalize_images
from models.vit import Encoder


class Teacher(nn.Module):
    """An encoder that is only looked at: always in eval mode, never with gradient."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """A teacher drops nothing, whatever the model that it belongs to does."""
        super().train(False)
        return self

    @torch.no_grad()
    def of_images(self, images_BCHW: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        """`of_tokens` for uint8 images: all their tokens run together."""
        return self.of_tokens(self.encoder.embed(normalize_images(images_BCHW)), 0, blocks)

    @torch.no_grad()
    def of_tokens(self, tokens_BLD: Tensor, start: int, blocks: Sequence[int]) -> dict[int, Tensor]:
        """The target (B, L, D) behind each of some blocks, counted from 1, of tokens that `start` blocks have run on.

        What lay behind an earlier block than `start` is gone: its target is made of the tokens as they are.
        """
        targets = {}
        for block in sorted(set(blocks)):
            tokens_BLD, start = self.encoder.run(tokens_BLD, start, block), max(start, block)
            targets[block] = feature_target(tokens_BLD)
        return targets


class EmaTeacher(Teacher):
    """The moving average of a student. What is frozen in the student is not copied: both use the same parameters."""

    def __init__(self, student: Encoder) -> None:
        super().__init__(copy.deepcopy(student, {id(p): p for p in student.parameters() if not p.requires_grad}))
        self.names = tuple(name for name, p in student.vit.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def follow(self, student: Encoder, momentum: float) -> None:
        """average <- momentum * average + (1 - momentum) * student; with momentum 0 it begins anew with the student."""
        theirs = [student.vit.get_parameter(name) for name in self.names]
        get_ema_multi_avg_fn(momentum)(list(self.average().values()), theirs, None)

    def average(self) -> dict[str, Tensor]:
        """What is averaged, all that learns in the student, by timm's names."""
        return {name: self.encoder.vit.get_parameter(name) for name in self.names}

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor]) -> None:
        """Take over an average that was saved; what has frozen since is left out."""
        for name, mine in self.average().items():
            mine.copy_(average[name])
