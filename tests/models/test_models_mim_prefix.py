"""Masked training with class and register tokens: where they stand, that every group has its own, and that they do not
draw the backward pass through frozen blocks, the trap of the study that this project continues."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.batch import MaskedBatch
from models.config import DecoderConfig, HeadSpec, ModelConfig
from models.masking import group_ids, random_mask, take_tokens
from models.mim import MaskedModel
from models.multiscale import build_heads
from models.targets import normalize_images
from models.vit import build_encoder

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=4, heads=3, class_token=True)
TOKENS, KEEP = 16, 4


def masked_model(cut: int, registers: int = 0, *before: HeadSpec) -> MaskedModel:
    encoder = build_encoder(replace(MODEL, registers=registers), seed=0)
    for token in (encoder.vit.cls_token, encoder.vit.reg_token):
        if token is not None:
            torch.nn.init.normal_(token)
    specs = (*before, HeadSpec(4, "pixels", matching=not before))
    heads = build_heads(specs, DecoderConfig(depth=1, width=12, heads=3), encoder, MODEL.patch_size, seed=0)
    return MaskedModel(encoder, heads, cut).train()


def batch_of(model: MaskedModel, images: Tensor, groups: int, group: int = 0) -> MaskedBatch:
    """One group's batch, made as cached training makes it."""
    size, prefix = TOKENS // groups, model.encoder.num_prefix
    ids = group_ids(torch.rand(len(images), TOKENS), groups)
    features, ahead = model.frozen_features(images, ids, groups)
    own = slice(group * size, (group + 1) * size)
    noise, targets = torch.rand(len(images), size), model.image_targets(images)
    ahead = ahead[:, group * prefix : (group + 1) * prefix]
    return model.from_features(features[:, own], ids[:, own], noise, KEEP, targets, ahead)


def fired_hooks(model: MaskedModel) -> set[str]:
    """Names, to be filled by the backward pass, of the blocks that it goes through."""
    fired: set[str] = set()
    parts = {f"block {index}": block for index, block in enumerate(model.encoder.vit.blocks)}
    for name, part in (parts | {"patch_embed": model.encoder.vit.patch_embed}).items():
        part.register_full_backward_hook(lambda *_, name=name: fired.add(name))
    return fired


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize(
    ("way", "cut"), [*(("images", cut) for cut in range(4)), *(("features", cut) for cut in range(1, 4))]
)
def test_no_backward_reaches_what_is_frozen(images: Tensor, way: str, cut: int, registers: int) -> None:
    model = masked_model(cut, registers)
    fired = fired_hooks(model)
    noise = torch.rand(3, TOKENS)
    batch = model.from_images(images, noise, KEEP) if way == "images" else batch_of(model, images, 4)
    assert batch.visible_BKD.shape == (3, 1 + registers + KEEP, 24)
    assert batch.visible_BKD.requires_grad == (cut == 0)
    model(batch).sum().backward()
    assert fired == {f"block {index}" for index in range(cut, 4)} | ({"patch_embed"} if cut == 0 else set())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    tokens = [token for token in (model.encoder.vit.cls_token, model.encoder.vit.reg_token) if token is not None]
    assert len(tokens) == 1 + bool(registers) and all((token.grad is not None) == (cut == 0) for token in tokens)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_class_token_that_learned_would_be_the_trap(images: Tensor) -> None:
    model = masked_model(3)
    fired = fired_hooks(model)
    model.encoder.vit.cls_token.requires_grad_(True)
    tokens = model.encoder.with_prefix(model.encoder.embed(normalize_images(images)), model.encoder.prefix(3))
    model.encoder.run(tokens, 0, 4)[:, 1:].sum().backward()
    assert fired == {"block 0", "block 1", "block 2", "block 3"}


def test_it_is_mae_s_forward(images: Tensor) -> None:
    """MAE: positions on patches, patches masked, the class token with its position in front, blocks, norm."""
    model = masked_model(0).eval()
    vit, noise = model.encoder.vit, torch.rand(3, TOKENS)
    vit.pos_embed.data[:, 0] = torch.randn(24)
    patches = vit.patch_embed(normalize_images(images)) + vit.pos_embed[:, 1:]
    visible = take_tokens(patches, random_mask(noise, 0.75).ids_keep)
    tokens = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(3, -1, -1), visible], dim=1)
    for block in vit.blocks:
        tokens = block(tokens)
    latent = model.encode(model.from_images(images, noise, KEEP).visible_BKD)[4]
    torch.testing.assert_close(latent, vit.norm(tokens)[:, 1:], rtol=0, atol=1e-6)


def test_decoders_get_patch_tokens_only_at_every_depth(images: Tensor) -> None:
    model = masked_model(1, 2, HeadSpec(2, "pixels"), HeadSpec(3, "hog"))
    seen: list[tuple[int, ...]] = []
    for head in model.each_head:
        head.norm.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    losses = model(batch_of(model, images, 4))
    assert seen == [(3, KEEP, 24)] * 3 and losses.shape == (3,) and bool(losses.isfinite().all())


@pytest.mark.parametrize("cut", range(5))
def test_grouped_features_are_those_of_masked_training(images: Tensor, cut: int) -> None:
    model = masked_model(min(cut, 3), 1).eval()
    model.cut = cut
    noise = torch.rand(3, TOKENS)
    live = model.from_images(images, noise, KEEP)
    features, ahead = model.frozen_features(images, group_ids(noise, 4), 4)
    ids, targets = group_ids(noise, 4)[:, :KEEP], model.image_targets(images)
    stored = model.from_features(features[:, :KEEP], ids, torch.rand(3, KEEP), KEEP, targets, ahead[:, :2])
    assert torch.equal(stored.mask.ids_keep, live.mask.ids_keep) and torch.equal(stored.scored_BL, live.scored_BL)
    torch.testing.assert_close(stored.visible_BKD, live.visible_BKD, rtol=0, atol=1e-6)


def test_prefix_tokens_that_are_missing_are_not_forgotten(images: Tensor) -> None:
    model = masked_model(2)
    features, _ = model.frozen_features(images, torch.arange(TOKENS).expand(3, -1), 1)
    with pytest.raises(AssertionError, match="a model with prefix tokens needs them"):
        model.from_features(features, torch.arange(TOKENS).expand(3, -1), torch.rand(3, TOKENS), KEEP, {})
