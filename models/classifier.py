"""Classification on the encoder: a linear head behind the last block, and further ones behind earlier blocks if asked
for. Blocks before the cut are frozen; the model takes tokens at the cut, wherever they come from.

Shapes: B batch, L tokens (the class and register tokens first, where the model has them), D width, K classes, H heads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from models.learner import Learner
from models.spec import derive_seed
from models.vit import Encoder, ModelError


@dataclass(frozen=True)
class LabelledBatch:
    """What a step learns from: tokens at the cut, and how much of each class every sample is."""

    tokens_BLD: Tensor
    shares_BK: Tensor


class Head(nn.Module):
    """Norm and linear layer over one vector of an image, behind `block` blocks.

    Source: facebookresearch/mae, models_vit.py: the mean of the tokens first, then a norm of its own.
    """

    def __init__(self, block: int, norm: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.block, self.norm = block, norm
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=2e-5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """(B, K) logits."""
        return self.linear(self.norm(pooled_BD))


class Classifier(Learner):
    """An encoder frozen before block `cut`, and its heads in the order of their blocks."""

    def __init__(self, encoder: Encoder, heads: list[Head], cut: int, pool: str) -> None:
        super().__init__()
        self.encoder, self.heads, self.cut, self.pool = encoder, nn.ModuleList(heads), cut, pool
        encoder.freeze(cut)
        encoder.vit.norm.requires_grad_(False)  # a head has its own

    def forward(self, batch: LabelledBatch) -> Tensor:
        """(H,) cross-entropies, in float32."""
        return torch.stack(
            [cross_entropy(logits_BK.float(), batch.shares_BK) for logits_BK in self.logits(batch.tokens_BLD)]
        )

    def logits(self, tokens_BLD: Tensor) -> Iterator[Tensor]:
        """(B, K) of every head, from tokens at the cut."""
        start = self.cut
        for head in self.in_order:
            tokens_BLD = self.encoder.run(tokens_BLD, start, head.block)
            yield head(self.pooled(tokens_BLD))
            start = head.block

    @property
    def loss_names(self) -> tuple[str, ...]:
        return tuple(f"block{head.block}" for head in self.in_order)

    def loss_weights(self, progress: float) -> tuple[float, ...]:
        """All heads weigh alike."""
        return (1.0,) * len(self.heads)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder.vit, "heads": self.heads}

    @property
    def in_order(self) -> list[Head]:
        """The heads, the one behind the last block last."""
        return [cast(Head, head) for head in self.heads]

    def pooled(self, tokens_BLD: Tensor) -> Tensor:
        """(B, D): the class token, or the mean of the patch tokens."""
        return tokens_BLD[:, 0] if self.pool == "token" else self.encoder.patches(tokens_BLD).mean(dim=1)

    def at_cut(self, images_BCHW: Tensor) -> Tensor:
        """(B, L, D): normalised images through the embedding and the frozen blocks."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cut == 0):
            return self.encoder.run(self.encoder.tokens(images_BCHW), 0, self.cut)

    def timm_state(self) -> dict[str, Tensor]:
        """Weights under timm's names: the encoder's, the last head's as `head` and `fc_norm` (or, reading the class
        token, `norm`); further heads under `heads.<block>`."""
        state = {name: value for name, value in self.encoder.vit.state_dict().items() if not name.startswith("norm.")}
        *others, last = self.in_order
        norm = "norm" if self.pool == "token" else "fc_norm"
        state |= {f"{norm}.{name}": value for name, value in last.norm.state_dict().items()}
        state |= {f"head.{name}": value for name, value in last.linear.state_dict().items()}
        for head in others:
            state |= {f"heads.{head.block}.{name}": value for name, value in head.state_dict().items()}
        return state


def build_classifier(
    encoder: Encoder, classes: int, blocks: tuple[int, ...], cut: int, pool: str, seed: int
) -> Classifier:
    """Heads after `blocks` and after the last block, their weights a pure function of the seed. Raises ModelError.

    With pool `token` the last head goes on with the encoder's own norm, which was trained to stand there.
    """
    if pool == "token" and encoder.vit.cls_token is None:
        raise ModelError("finetune.pool=token needs a class token, and this model has none; use finetune.pool=mean")
    places = sorted({*blocks, encoder.depth})
    if not max(cut, 1) <= places[0] or places[-1] > encoder.depth:
        raise ModelError(
            f"finetune.heads={list(blocks)} must lie in {max(cut, 1)}..{encoder.depth}, between finetune.freeze={cut} "
            "and the model's depth; change either"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "classifier"))
        norm = copy.deepcopy(encoder.vit.norm) if pool == "token" else fresh_norm(encoder)
        last = Head(encoder.depth, norm, encoder.width, classes)  # first, so that further heads do not change it
        heads = [Head(block, fresh_norm(encoder), encoder.width, classes) for block in places[:-1]]
    return Classifier(encoder, [*heads, last], cut, pool)


def fresh_norm(encoder: Encoder) -> nn.Module:
    """A norm like that behind the encoder's last block, untrained."""
    norm = copy.deepcopy(encoder.vit.norm)
    for name, parameter in norm.named_parameters():
        nn.init.constant_(parameter, float(name == "weight"))
    return norm
