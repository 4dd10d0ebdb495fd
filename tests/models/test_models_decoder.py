"""The decoder: its output has the shape of the encoder's input, every token in its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import Attention

from models.config import DecoderConfig, HeadSpec, ModelConfig
from models.decoder import Decoder, LocalReadout, MatchingReadout
from models.masking import random_mask, restore_tokens, take_tokens
from models.multiscale import build_heads
from models.targets import by_token
from models.vit import build_encoder, sincos_2d, use_attention

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
    decoder = Decoder(2, encoder_width, config)
    assert (
        decoder.positions.shape[1],
        next(m for m in decoder.modules() if isinstance(m, Attention)).num_heads,
    ) == sizes


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_the_output_has_the_shape_of_the_encoder_s_input(ratio: float) -> None:
    decoder = Decoder(4, 24, DecoderConfig(depth=2, width=12, heads=3))
    readout = MatchingReadout(12, 24, 48)
    mask = random_mask(torch.rand(2, 16), ratio)
    tokens = decoder(torch.randn(2, mask.ids_keep.shape[1], 24), mask)
    assert readout(tokens, of_image=False).shape == (2, 16, 24)
    assert readout(tokens, of_image=True).shape == (2, 16, 48)
    assert torch.equal(readout(tokens, True), readout.pixel_head(readout(tokens, False)))


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_skipping_what_nobody_reads_changes_neither_output_nor_gradients(kind: str, depth: int) -> None:
    decoder = Decoder(4, 24, DecoderConfig(depth=depth, width=12, heads=3)).double()
    use_attention(decoder, kind, "cpu", 16)
    mask = random_mask(torch.rand(2, 16), 0.75)
    ids = mask.ids_restore.argsort(1)[:, 7:11]
    latent = torch.randn(2, 4, 24, dtype=torch.float64, requires_grad=True)
    found = decoder(latent, mask, ids)
    places = torch.cat([mask.ids_keep, ids], 1)
    filler = decoder.mask_token.expand(2, 4, -1)
    whole = decoder.blocks(torch.cat([decoder.embed(latent), filler], 1) + decoder.positions[places])
    wanted = decoder.norm(whole[:, 4:])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    inputs = [latent, *decoder.parameters()]
    grads, expected = (
        torch.autograd.grad((out**3).sum(), inputs, retain_graph=True, allow_unused=True) for out in (found, wanted)
    )
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_every_token_stands_in_its_place_with_its_position() -> None:
    # Without blocks nothing mixes tokens, so each output can be computed by hand.
    decoder = Decoder(4, 24, DecoderConfig(depth=0, width=12, heads=3)).eval()
    torch.nn.init.normal_(decoder.embed.bias)
    mask = random_mask(torch.rand(2, 16), 0.75)
    latent, positions = torch.randn(2, 4, 24), sincos_2d(12, 4)
    output = decoder(latent, mask)
    for row in range(2):
        for token in range(16):
            kept = mask.ids_keep[row].tolist()
            inner = decoder.mask_token if token not in kept else decoder.embed(latent[row, kept.index(token)])
            want = decoder.norm(inner + positions[token])
            torch.testing.assert_close(output[row, token], want, rtol=0, atol=1e-6)


def test_the_mask_token_learns_and_positions_do_not() -> None:
    decoder = Decoder(4, 24, DecoderConfig(depth=1, width=12, heads=3))
    mask = random_mask(torch.rand(2, 16), 0.75)
    decoder(torch.randn(2, 4, 24), mask).square().sum().backward()
    assert decoder.mask_token.grad is not None and decoder.mask_token.grad.norm() > 0
    assert "positions" not in decoder.state_dict() and not decoder.positions.requires_grad


def test_skipping_tokens_leaves_the_rest_as_it_would_be_without_them() -> None:
    """Against the whole decoder whose attention cannot see the skipped tokens."""
    decoder = Decoder(4, 24, DecoderConfig(depth=2, width=12, heads=3)).eval()
    mask, latent = random_mask(torch.rand(2, 16), 0.75), torch.randn(2, 4, 24)
    hidden = torch.stack([(row == 1).nonzero().flatten()[torch.randperm(12)] for row in mask.hidden])
    torch.testing.assert_close(
        decoder(latent, mask, hidden), take_tokens(decoder(latent, mask), hidden), rtol=0, atol=1e-5
    )
    some = hidden[:, :3]
    tokens = restore_tokens(decoder.embed(latent), decoder.mask_token, mask.ids_restore) + decoder.positions
    left = take_tokens(tokens, torch.cat([mask.ids_keep, some], dim=1))
    want = decoder.norm(decoder.blocks(left))[:, 4:]
    torch.testing.assert_close(decoder(latent, mask, some), want, rtol=0, atol=1e-5)
    assert (decoder(latent, mask, some) - take_tokens(decoder(latent, mask), some)).abs().max() > 1e-3


def as_convolutions(readout: LocalReadout) -> torch.nn.Sequential:
    """LocalMIM's own layers with a readout's weights: transposed convolutions on the grid, channel norm, GELU."""
    layers: list[torch.nn.Module] = []
    for layer in readout.up:
        if isinstance(layer, torch.nn.Linear):
            half = layer.out_features // 4
            up = torch.nn.ConvTranspose2d(layer.in_features, half, 2, 2)
            with torch.no_grad():
                up.weight.copy_(layer.weight.reshape(2, 2, half, -1).permute(3, 2, 0, 1))
                up.bias.copy_(layer.bias[:half])
                layer.bias.copy_(up.bias.repeat(4))
            layers.append(up)
        else:
            norm, gelu = layer
            layers += [ToChannelsLast(), norm, gelu, ToChannelsFirst()]
    return torch.nn.Sequential(*layers)


class ToChannelsLast(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("scale", [4.0, 2.0])
def test_finer_readouts_are_transposed_convolutions(scale: float) -> None:
    readout, values = LocalReadout(16, scale, 27), 27
    convolutions = as_convolutions(readout)
    tokens = torch.randn(2, 16, 16)
    fine = convolutions(tokens.transpose(1, 2).reshape(2, 16, 4, 4))
    want = readout.head(fine.permute(0, 2, 3, 1)).flatten(1, 2)
    for _ in range(round(scale) // 2):
        want = by_token(want)
    assert want.shape == (2, 16, round(scale) ** 2 * values)
    torch.testing.assert_close(readout(tokens, True), want, rtol=0, atol=1e-5)


def test_the_coarse_readout_averages_and_the_plain_one_is_linear() -> None:
    half, plain = LocalReadout(16, 0.5, 27), LocalReadout(16, 1.0, 27)
    tokens = torch.randn(2, 16, 16)
    grid = tokens.transpose(1, 2).reshape(2, 16, 4, 4)
    pooled = torch.nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(half(tokens, True), half.head(pooled), rtol=0, atol=1e-6)
    assert torch.equal(plain(tokens, True), plain.head(tokens))


def test_weights_are_a_pure_function_of_the_seed_and_not_the_encoder_s(small: Small) -> None:
    encoder = build_encoder(small(), seed=3)
    before = torch.get_rng_state()
    specs = (HeadSpec(2, "hog", matching=False), HeadSpec(4, "pixels"))
    first, again, other = (build_heads(specs, DecoderConfig(), encoder, 4, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for head, same, new in zip(first, again, other, strict=True):
        assert all(torch.equal(value, same.state_dict()[name]) for name, value in head.state_dict().items())
        assert not torch.equal(head.decoder.mask_token, new.decoder.mask_token)
    assert not torch.equal(first[0].decoder.mask_token, first[1].decoder.mask_token)
    (alone,) = build_heads(specs[1:], DecoderConfig(), encoder, 4, 3)
    assert torch.equal(alone.decoder.mask_token, first[1].decoder.mask_token)


def test_attention_follows_the_setting(small: Small) -> None:
    for kind, fused in (("plain", False), ("fused", True)):
        heads = build_heads((HeadSpec(4, "pixels"),), DecoderConfig(), build_encoder(small(), seed=0), 4, seed=0)
        use_attention(heads[0], kind, "cpu", 16)
        assert [m.fused_attn for m in heads[0].modules() if isinstance(m, Attention)] == [fused]
