"""Heads at several depths and scales: LocalMIM's losses by another way, what disappears behind a cut, weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from models.batch import decode_ids
from models.config import DecoderConfig, HeadsConfig, HeadSpec, TargetConfig, head_specs, learning_heads, loss_weights
from models.masking import group_ids, random_mask
from models.mim import MaskedModel
from models.multiscale import build_heads
from models.targets import as_scored, image_target, normalize_images
from models.vit import build_encoder
from tests.models.slow import slow_hog

MakeModel = Callable[..., MaskedModel]
TOKENS, KEEP, PATCH = 16, 4, 4
LOCAL = (
    HeadSpec(1, "hog", 4.0, matching=False),
    HeadSpec(2, "hog", 2.0, matching=False),
    HeadSpec(3, "hog", 0.5, matching=False),
)


@pytest.mark.parametrize("scale", [4.0, 2.0, 1.0, 0.5])
def test_hog_of_every_scale_is_that_of_the_pixels(scale: float) -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = image_target(pixels, "hog", scale, 8)
    side, fine = (4, round(scale)) if scale >= 1 else (2, 1)
    for row, image in enumerate(normalize_images(pixels)):
        planes = [torch.tensor(slow_hog(plane.tolist(), 9, round(8 / scale))) for plane in image]
        want = torch.cat(planes, dim=1).reshape(side * fine, side * fine, 27)
        for token in range(side * side):
            y, x = divmod(token, side)
            for place, values in enumerate(found[row, token].reshape(fine * fine, 27)):
                dy, dx = quadtree(place, fine)
                torch.testing.assert_close(values, want[y * fine + dy, x * fine + dx], rtol=0, atol=1e-5)


def quadtree(place: int, fine: int) -> tuple[int, int]:
    """Row and column inside a token of a place that transposed convolutions make one after the other."""
    y = x = 0
    half = fine * fine // 4
    while half:
        quarter, place = divmod(place, half)
        y, x, half = 2 * y + quarter // 2, 2 * x + quarter % 2, half // 4
    return y, x


@pytest.mark.parametrize(("scale", "cell"), [(2.0, 2), (1.0, 4), (0.5, 8)])
def test_pixels_of_every_scale_are_normalised_patches_of_that_size(images: Tensor, scale: float, cell: int) -> None:
    found = as_scored(image_target(images, "pixels", scale, PATCH), ("pixels", scale))
    picture = normalize_images(images)[1].numpy().transpose(1, 2, 0)
    side, fine = (4, round(scale)) if scale >= 1 else (2, 1)
    for token in (0, side + 1):
        for place in range(fine * fine):
            dy, dx = quadtree(place, fine)
            y, x = (token // side * fine + dy) * cell, (token % side * fine + dx) * cell
            patch = picture[y : y + cell, x : x + cell].reshape(-1)
            want = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            mine = found[1, token].reshape(fine * fine, -1)[place].numpy()
            assert np.abs(mine - want).max() < 1e-5


def test_the_loss_of_every_scale_is_localmims(masked_model: MakeModel, images: Tensor) -> None:
    """The mask repeated for finer grids and averaged for the coarse one, then the masked mean of each."""
    model = masked_model(0, "hog", *LOCAL).eval()
    noise = torch.rand(3, TOKENS)
    batch, hidden = model.from_images(images, noise, KEEP), random_mask(noise, 0.75).hidden.reshape(3, 4, 4)
    latents, losses = model.encode(batch.visible_BKD), model(batch)
    for head, loss in zip(model.each_head, losses, strict=True):
        prediction = head.predict(latents[head.spec.block], batch.whole).detach()
        total = weight = 0.0
        for row in range(3):
            for token in range(prediction.shape[1]):
                error = (prediction[row, token] - batch.targets[head.target][row, token]).square()
                side = round(prediction.shape[1] ** 0.5)
                y, x = divmod(token, side)
                step = 4 // side
                share = hidden[row, y * step : (y + 1) * step, x * step : (x + 1) * step].mean().item()
                places = round(max(head.spec.scale, 1)) ** 2
                for place in error.reshape(places, 27):
                    total, weight = total + place.mean().item() * share, weight + share
        assert loss.item() == pytest.approx(total / weight, rel=1e-5)


def test_every_head_reads_its_own_depth_through_its_own_norm(masked_model: MakeModel, images: Tensor) -> None:
    model = masked_model(0, "hog", *LOCAL).eval()
    batch = model.from_images(images, torch.rand(3, TOKENS), KEEP)
    latents, tokens = model.encode(batch.visible_BKD), batch.visible_BKD
    for block in (1, 2, 3):
        tokens = model.encoder.vit.blocks[block - 1](tokens)
        assert torch.equal(latents[block], tokens)
    assert torch.equal(latents[4], model.encoder.vit.norm(model.encoder.vit.blocks[3](tokens)))
    norms = [head.norm for head in model.each_head]
    assert [type(norm).__name__ for norm in norms] == ["LayerNorm"] * 3 + ["Identity"]
    assert len({id(norm.weight) for norm in norms[:3]}) == 3


@pytest.mark.parametrize(("cut", "left"), [(0, [1, 2, 3, 4]), (1, [2, 3, 4]), (3, [4])])
def test_heads_of_frozen_blocks_disappear(cut: int, left: list[int]) -> None:
    specs = learning_heads((*LOCAL, HeadSpec(4, "hog", matching=False)), cut)
    assert [spec.block for spec in specs] == left


def test_without_features_to_predict_the_first_stage_predicts_pixels() -> None:
    specs = (HeadSpec(2, "hog"), HeadSpec(4, "features"))
    assert [spec.target for spec in learning_heads(specs, 0)] == ["hog", "pixels"]
    assert [spec.target for spec in learning_heads(specs, 1)] == ["hog", "features"]


def test_each_head_has_the_target_that_it_was_given(masked_model: MakeModel, images: Tensor) -> None:
    """Heads of features, HOG and pixels on one cached batch: features of every depth are the cut's, (L, D)."""
    before = (HeadSpec(2, "features"), HeadSpec(3, "hog", 2.0, matching=False))
    model = masked_model(1, "pixels", *before).eval()
    ids = group_ids(torch.rand(3, TOKENS), 1)
    stored, _ = model.frozen_features(images, ids, 1)
    targets = {**model.image_targets(images), **model.feature_targets(stored, ids)}
    batch = model.from_features(stored, ids, torch.rand(3, TOKENS), KEEP, targets)
    shapes = {key: tuple(value.shape) for key, value in sorted(targets.items())}
    assert shapes == {("features", 1.0): (3, 16, 24), ("hog", 2.0): (3, 16, 108), ("pixels", 1.0): (3, 16, 48)}
    latents = model.encode(batch.visible_BKD)
    predicted = [h.predict(latents[h.spec.block], batch.whole) for h in model.each_head]
    assert [tuple(prediction.shape) for prediction in predicted] == list(shapes.values())
    assert model(batch).shape == (3,) and model.loss_names == ("block2_features", "block3_hog_x2", "block4_pixels")


def test_pruned_decoding_scores_the_decoded_tokens_only(masked_model: MakeModel, images: Tensor) -> None:
    model = masked_model(0, "hog", HeadSpec(2, "pixels", 2.0, matching=False)).eval()
    batch = model.from_images(images, torch.rand(3, TOKENS), KEEP)
    ids = decode_ids(batch.scored_BL, torch.rand(3, TOKENS), 6)
    assert ids.shape == (3, 6) and (batch.mask.hidden.gather(1, ids) == 1).all()
    assert all(len(set(row.tolist())) == 6 for row in ids)
    pruned = replace(batch, ids_decode_BM=ids, ids_beside_BC=None)
    losses = model(pruned)
    latents = model.encode(pruned.visible_BKD)
    for head, loss in zip(model.each_head, losses, strict=True):
        prediction = head.predict(latents[head.spec.block], pruned)
        every, _ = batch.whole.scored_at(head.target)
        target = torch.stack([every[row, ids[row]] for row in range(3)])
        assert loss.item() == pytest.approx((prediction - target).square().mean().item(), rel=1e-5)
    touched = torch.zeros(3, TOKENS).scatter(1, ids, 1.0).unsqueeze(-1) > 0
    changed = {key: torch.where(touched, target, target.flip(-1)) for key, target in batch.targets.items()}
    assert torch.equal(model(replace(pruned, targets=changed)), losses)


def test_decoded_tokens_are_drawn_evenly_from_the_scored_ones() -> None:
    scored = torch.zeros(400, TOKENS)
    scored[:, 4:] = 1
    ids = decode_ids(scored, torch.rand(400, TOKENS), 3)
    counts = torch.bincount(ids.flatten(), minlength=TOKENS)
    assert ids.shape == (400, 3) and counts[:4].sum() == 0
    assert counts[4:].min() > 60 and counts[4:].max() < 145, "100 each, give or take"


@pytest.mark.parametrize("count", [1, 12])
def test_a_head_after_every_block_gets_and_gives_gradients(count: int, small: Callable, images: Tensor) -> None:
    encoder = build_encoder(small(depth=count), seed=0)
    specs = head_specs(HeadsConfig(blocks=tuple(range(1, count + 1))), TargetConfig("hog"), count)
    model = MaskedModel(encoder, build_heads(specs, DecoderConfig(width=12), encoder, PATCH, 0), 0).train()
    losses = model(model.from_images(images, torch.rand(3, TOKENS), KEEP))
    losses.sum().backward()
    assert losses.shape == (count,) and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_settings_make_the_heads() -> None:
    assert head_specs(HeadsConfig(), TargetConfig("hog"), 12) == (HeadSpec(12, "hog"),)
    heads = HeadsConfig((2, 4, 10, 12), (4, 2, 1, 0.5), ("hog", "pixels", "features", "hog"), "4,3,2,1")
    found = head_specs(heads, TargetConfig(), 12)
    assert [(s.block, s.scale, s.target, s.weight, s.matching) for s in found] == [
        (2, 4, "hog", 4, False), (4, 2, "pixels", 3, False), (10, 1, "features", 2, True), (12, 0.5, "hog", 1, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("equal", (1, 1, 1, 1), (1, 1, 1, 1)),
        ("4,3,2,1", (4, 3, 2, 1), (4, 3, 2, 1)),
        ("1/4,1/3,1/2,1", (0.25, 1 / 3, 0.5, 1), (0.25, 1 / 3, 0.5, 1)),
        ("4,3,2,1:0,0,0,1", (4, 3, 2, 1), (0, 0, 0, 1)),
    ],
)
def test_loss_weights_are_a_list_or_go_from_one_to_another(text: str, start: tuple, end: tuple) -> None:
    assert loss_weights(text, 4) == (start, end)
    specs = head_specs(HeadsConfig((1, 2, 3, 4), weights=text), TargetConfig(), 4)
    assert [spec.weight_at(0.25) for spec in specs] == [a + (b - a) / 4 for a, b in zip(start, end, strict=True)]
