"""Heads: local reconstruction at several depths and scales of the encoder, LocalMIM's way, or the one decoder at its
end. A head reads the encoder after a block through a norm of its own, decodes, and predicts its target.

Shapes: B batch, K visible tokens, D width, T values of a target.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.batch import MaskedBatch, masked_loss
from models.config import IMAGE_TARGETS, DecoderConfig, HeadSpec
from models.decoder import Decoder, LocalReadout, MatchingReadout, initialise
from models.spec import derive_seed
from models.targets import TargetKey, image_values
from models.vit import Encoder


class Head(nn.Module):
    """One reconstruction: norm, decoder, readout, loss."""

    def __init__(self, spec: HeadSpec, norm: nn.Module, decoder: Decoder, readout: nn.Module) -> None:
        super().__init__()
        self.spec, self.norm, self.decoder, self.readout = spec, norm, decoder, readout

    @property
    def target(self) -> TargetKey:
        """What it must find in a batch."""
        return self.spec.key

    def forward(self, latent_BKD: Tensor, batch: MaskedBatch) -> Tensor:
        """The mean squared error over what is scored at the head's scale."""
        if self.spec.scale < 1:  # its places are of several tokens
            batch = batch.whole
        return masked_loss(self.predict(latent_BKD, batch), *batch.scored_at(self.target))

    def predict(self, latent_BKD: Tensor, batch: MaskedBatch) -> Tensor:
        """The prediction of every token, or of those that are decoded, in the shape of the target."""
        tokens = self.decoder(self.norm(latent_BKD), batch.mask, batch.ids_decode_BM, batch.ids_beside_BC)
        return self.readout(tokens, self.spec.target in IMAGE_TARGETS)


def build_head(spec: HeadSpec, config: DecoderConfig, encoder: Encoder, patch: int, *seed: str | int) -> Head:
    """A head beside an encoder, its weights a pure function of the seed.

    After the last block the encoder's own norm stands in front of it; elsewhere the head has one.
    """
    grid = round(encoder.num_tokens**0.5)
    width, _ = config.sizes(encoder.width)
    kind = spec.target if spec.target in IMAGE_TARGETS else "pixels"
    values = image_values(kind, spec.scale, patch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(*seed))
        decoder = Decoder(grid, encoder.width, config)
        readout: nn.Module = (
            MatchingReadout(width, encoder.width, values) if spec.matching else LocalReadout(width, spec.scale, values)
        )
        decoder.apply(initialise)
        readout.apply(initialise)
        nn.init.normal_(decoder.mask_token, std=0.02)
    norm = nn.Identity() if spec.block == encoder.depth else nn.LayerNorm(encoder.width, eps=1e-6)
    return Head(spec, norm, decoder, readout)


def build_heads(
    specs: tuple[HeadSpec, ...], config: DecoderConfig, encoder: Encoder, patch: int, seed: int, stage: int = 0
) -> list[Head]:
    """The heads that are asked for. The one at the encoder's end has the same weights whatever stands before it.

    stage: the stage that they are drawn for; others where each begins with new ones.
    """
    drawn: tuple[str | int, ...] = ("stage", stage) if stage else ()
    parts = [("decoder",) if spec.block == encoder.depth else ("decoder", spec.block) for spec in specs]
    return [
        build_head(spec, config, encoder, patch, seed, *part, *drawn) for spec, part in zip(specs, parts, strict=True)
    ]
