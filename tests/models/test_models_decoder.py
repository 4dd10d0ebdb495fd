"""The decoder: its output has the shape of the encoder's input, every token in its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import Attention

from models.config import DecoderConfig, ModelConfig
from models.decoder import Decoder, build_decoder
from models.masking import random_mask
from models.vit import build_encoder, sincos_2d

Small = Callable[..., ModelConfig]


@pytest.mark.parametrize(
    ("config", "encoder_width", "sizes"),
    [
        (DecoderConfig(), 192, (64, 2)),
        (DecoderConfig(), 384, (128, 4)),
        (DecoderConfig(), 768, (256, 8)),
        (DecoderConfig(), 24, (32, 1)),
        (DecoderConfig(width=48), 768, (48, 1)),
        (DecoderConfig(heads=4), 192, (64, 4)),
    ],
)
def test_sizes_follow_the_encoder_unless_given(
    config: DecoderConfig, encoder_width: int, sizes: tuple[int, int]
) -> None:
    assert config.sizes(encoder_width) == sizes
    decoder = Decoder(2, encoder_width, config, 48)
    assert (
        decoder.positions.shape[1],
        next(m for m in decoder.modules() if isinstance(m, Attention)).num_heads,
    ) == sizes


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_the_output_has_the_shape_of_the_encoder_s_input(ratio: float) -> None:
    decoder = Decoder(4, 24, DecoderConfig(depth=2, width=12, heads=3), 48)
    mask = random_mask(torch.rand(2, 16), ratio)
    output = decoder(torch.randn(2, mask.ids_keep.shape[1], 24), mask.ids_restore)
    assert output.shape == (2, 16, 24)
    assert decoder.pixel_head(output).shape == (2, 16, 48)


def test_every_token_stands_in_its_place_with_its_position() -> None:
    # Without blocks nothing mixes tokens, so each output can be computed by hand.
    decoder = Decoder(4, 24, DecoderConfig(depth=0, width=12, heads=3), 48).eval()
    torch.nn.init.normal_(decoder.embed.bias)
    mask = random_mask(torch.rand(2, 16), 0.75)
    latent, positions = torch.randn(2, 4, 24), sincos_2d(12, 4)
    output = decoder(latent, mask.ids_restore)
    for row in range(2):
        for token in range(16):
            kept = mask.ids_keep[row].tolist()
            inner = decoder.mask_token if token not in kept else decoder.embed(latent[row, kept.index(token)])
            want = decoder.head(decoder.norm(inner + positions[token]))
            torch.testing.assert_close(output[row, token], want, rtol=0, atol=1e-6)


def test_the_mask_token_learns_and_positions_do_not() -> None:
    decoder = Decoder(4, 24, DecoderConfig(depth=1, width=12, heads=3), 48)
    mask = random_mask(torch.rand(2, 16), 0.75)
    decoder(torch.randn(2, 4, 24), mask.ids_restore).square().sum().backward()
    assert decoder.mask_token.grad is not None and decoder.mask_token.grad.norm() > 0
    assert "positions" not in decoder.state_dict() and not decoder.positions.requires_grad


def test_weights_are_a_pure_function_of_the_seed_and_not_the_encoder_s(small: Small) -> None:
    encoder = build_encoder(small(), seed=3)
    before = torch.get_rng_state()
    first, again, other = (build_decoder(DecoderConfig(), encoder, 48, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mask_token"], other["mask_token"])


def test_attention_follows_the_encoder_s(small: Small) -> None:
    for kind, fused in (("plain", False), ("fused", True)):
        decoder = build_decoder(DecoderConfig(), build_encoder(small(attention=kind), seed=0), 48, seed=0)
        decoder.set_attention("cpu")
        assert [m.fused_attn for m in decoder.modules() if isinstance(m, Attention)] == [fused]
