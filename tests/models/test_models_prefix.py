"""Class and register tokens: where they stand, that every group has its own, that they freeze with the first layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from models.config import ModelConfig
from models.identity import model_identity
from models.vit import Encoder, build_encoder, frozen_hash, sincos_2d

Small = Callable[..., ModelConfig]
PREFIXES = [(True, 0, 1), (False, 2, 2), (True, 4, 5)]


def moved(encoder: Encoder) -> Encoder:
    """The encoder with prefix tokens that differ from each other."""
    for token in (encoder.vit.cls_token, encoder.vit.reg_token):
        if token is not None:
            torch.nn.init.normal_(token)
    return encoder.eval()


@pytest.mark.parametrize(("class_token", "registers", "count"), PREFIXES)
@pytest.mark.parametrize("name", ["vit_tiny", "vit_base_patch16_clip_224", "deit3_small_patch16_224"])
def test_the_prefix_stands_in_front_and_the_parts_are_timm_s_forward(
    small: Small, name: str, class_token: bool, registers: int, count: int
) -> None:
    config = small(name=name, class_token=class_token, registers=registers)
    encoder = moved(build_encoder(config, seed=0))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert (encoder.num_prefix, encoder.num_tokens) == (count, 16)
        assert encoder.prefix(2).shape == (2, count, 24) and encoder.embed(images).shape == (2, 16, 24)
        assert torch.equal(encoder.tokens(images), torch.cat([encoder.prefix(2), encoder.embed(images)], dim=1))
        assert torch.equal(encoder.patches(encoder.tokens(images)), encoder.embed(images))
        whole = encoder.norm(encoder.run(encoder.tokens(images), 0, 4))
        torch.testing.assert_close(whole, encoder.vit.forward_features(images), rtol=0, atol=1e-6)
    assert model_identity(config)["prefix"] == count


def test_patches_have_sincos_positions_and_the_prefix_none(small: Small) -> None:
    encoder = moved(build_encoder(small(class_token=True, registers=2), seed=0))
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(encoder.embed(images), encoder.vit.patch_embed(images) + sincos_2d(24, 4))
    assert torch.equal(encoder.prefix(1), torch.cat([encoder.vit.cls_token, encoder.vit.reg_token], dim=1))
    encoder.vit.pos_embed.data[:, 1] = 3.0
    assert torch.equal(encoder.prefix(1)[:, 1], encoder.vit.reg_token[:, 0] + 3.0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_group_runs_behind_a_prefix_of_its_own(small: Small, groups: int) -> None:
    encoder = moved(build_encoder(small(class_token=True, registers=1), seed=0))
    tokens, size = torch.randn(3, 16, 24), 16 // groups
    prefix = encoder.prefix(3).repeat(1, groups, 1)
    with torch.no_grad():
        # Twice, so that the second run starts from prefixes that differ between groups.
        found, ahead = encoder.run_groups(*encoder.run_groups(tokens, prefix, groups, 0, 2), groups, 2, 4)
        assert found.shape == tokens.shape and ahead.shape == (3, 2 * groups, 24)
        for group in range(groups):
            alone = torch.cat([encoder.prefix(3), tokens[:, group * size : (group + 1) * size]], dim=1)
            want = encoder.run(alone, 0, 4)
            close = {"rtol": 0, "atol": 1e-6}
            torch.testing.assert_close(ahead[:, 2 * group : 2 * group + 2], want[:, :2], **close)
            torch.testing.assert_close(found[:, group * size : (group + 1) * size], want[:, 2:], **close)
    if groups > 1:
        assert (ahead[:, 0] - ahead[:, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("cut", range(5))
def test_the_prefix_freezes_with_the_first_layer(small: Small, cut: int) -> None:
    encoder = build_encoder(small(class_token=True, registers=2), seed=0)
    encoder.freeze(3)
    encoder.freeze(cut)
    for token in (encoder.vit.cls_token, encoder.vit.reg_token):
        assert token.requires_grad == (cut == 0)
    assert not encoder.vit.pos_embed.requires_grad


@pytest.mark.parametrize("name", ["cls_token", "reg_token"])
def test_the_frozen_hash_covers_the_prefix(small: Small, name: str) -> None:
    state = build_encoder(small(class_token=True, registers=2), seed=0).vit.state_dict()
    changed = state | {name: torch.nextafter(state[name], torch.tensor(torch.inf))}
    assert frozen_hash(changed, 1) != frozen_hash(state, 1)


def test_without_prefix_tokens_nothing_is_added(small: Small) -> None:
    encoder = build_encoder(small(), seed=0).eval()
    images = torch.randn(2, 3, 16, 16)
    assert encoder.num_prefix == 0 and encoder.prefix(2).shape == (2, 0, 24)
    assert torch.equal(encoder.tokens(images), encoder.embed(images))
    tokens = torch.randn(2, 16, 24)
    found, ahead = encoder.run_groups(tokens, encoder.prefix(2), 4, 0, 4)
    assert torch.equal(found.reshape(8, 4, 24), encoder.run(tokens.reshape(8, 4, 24), 0, 4)) and ahead.shape[1] == 0
