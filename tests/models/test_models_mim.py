"""Masked training: what is scored, what learns, and that both ways into the model are one computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.batch import MaskedBatch, masked_loss, raster_order
from models.masking import group_ids, random_mask, take_tokens
from models.mim import MaskedModel
from models.targets import feature_target, normalize_images

MakeModel = Callable[..., MaskedModel]
DEPTH, TOKENS, KEEP = 4, 16, 4


def feature_batch(model: MaskedModel, images: Tensor, groups: int, group: int = 0) -> MaskedBatch:
    """One group's batch, made as cached training makes it."""
    size = TOKENS // groups
    ids = group_ids(torch.rand(len(images), TOKENS), groups)
    features, _ = model.frozen_features(images, ids, groups)
    own = slice(group * size, (group + 1) * size)
    targets = {**model.image_targets(images), **model.feature_targets(features, ids)}
    return model.from_features(features[:, own], ids[:, own], torch.rand(len(images), size), KEEP, targets)


def the_target(batch: MaskedBatch) -> Tensor:
    """The target of a batch that has one."""
    (key,) = batch.targets
    return batch.whole.scored_at(key)[0]


def parts(model: MaskedModel) -> dict[str, torch.nn.Module]:
    blocks = {f"block {index}": block for index, block in enumerate(model.encoder.vit.blocks)}
    return blocks | {"patch_embed": model.encoder.vit.patch_embed}


def test_the_loss_is_the_mean_over_scored_tokens() -> None:
    prediction, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    scored = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    errors = [
        sum(float(prediction[b, t, i] - target[b, t, i]) ** 2 for i in range(4)) / 4
        for b, t in ((0, 0), (0, 2), (1, 2))
    ]
    assert masked_loss(prediction, target, scored).item() == pytest.approx(sum(errors) / 3, rel=1e-6)


def test_the_loss_is_computed_in_float32() -> None:
    # In bfloat16 the difference would be rounded to 256.
    prediction, target = (torch.full((1, 1, 1), value, dtype=torch.bfloat16) for value in (256.0, 0.25))
    loss = masked_loss(prediction, target, torch.ones(1, 1))
    assert loss.dtype == torch.float32 and loss.item() == 255.75**2


@pytest.mark.parametrize(("groups", "cut"), [(1, 2), (2, 2), (4, 2), (4, 0)])
def test_only_scored_tokens_count(masked_model: MakeModel, images: Tensor, groups: int, cut: int) -> None:
    model = masked_model(cut).eval()
    batch = feature_batch(model, images, groups)

    def loss(changed: Tensor) -> float:
        where = changed.unsqueeze(-1) > 0
        targets = {key: torch.where(where, target.flip(-1), target) for key, target in batch.targets.items()}
        return model(replace(batch, targets=targets)).item()

    plain = loss(torch.zeros(3, TOKENS))
    assert loss(1 - batch.scored_BL) == plain
    one = torch.zeros(3, TOKENS)
    one[1, int(batch.scored_BL[1].argmax())] = 1.0
    assert abs(loss(one) - plain) > 1e-3


def test_forward_is_the_blocks_the_decoder_and_the_loss(masked_model: MakeModel, images: Tensor) -> None:
    model = masked_model(2).eval()
    batch = feature_batch(model, images, 4)
    tokens = batch.visible_BKD
    for block in model.encoder.vit.blocks[2:]:
        tokens = block(tokens)
    (head,) = model.each_head
    prediction = head.readout(head.decoder(model.encoder.vit.norm(tokens), batch.mask), True)
    loss = masked_loss(prediction, the_target(batch), batch.scored_BL).reshape(1)
    assert torch.equal(model(batch.whole), loss)
    torch.testing.assert_close(model(batch), loss, rtol=1e-5, atol=0)
    latent_BKD = model.encoder.norm(tokens)
    assert torch.equal(head.predict(latent_BKD, batch.whole), prediction)
    assert batch.ids_decode_BM is not None and batch.ids_decode_BM.shape == (3, TOKENS - TOKENS // 4)
    hidden = take_tokens(prediction, batch.ids_decode_BM)
    torch.testing.assert_close(head.predict(latent_BKD, batch), hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_predicting_only_what_is_scored_changes_neither_loss_nor_gradients(
    masked_model: MakeModel, images: Tensor, groups: int
) -> None:
    """With two groups, half of a group is kept: what is hidden of the other half is seen by the decoder as before."""
    model = masked_model(2).eval()
    batch = feature_batch(model, images, groups)
    assert batch.ids_decode_BM is not None and (batch.scored_BL.gather(1, batch.ids_decode_BM) == 1).all()
    assert batch.ids_decode_BM.shape[1] == batch.scored_BL[0].sum()
    beside = 0 if batch.ids_beside_BC is None else batch.ids_beside_BC.shape[1]
    assert beside == {1: 0, 2: TOKENS // 2 - KEEP, 4: TOKENS // 4 - KEEP}[groups]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = batch.scored_BL * torch.rand(3, TOKENS)
    ours, whole = (
        torch.autograd.grad(model(replace(part, scored_BL=weights)).sum(), learning, allow_unused=True)
        for part in (batch, batch.whole)
    )
    torch.testing.assert_close(model(batch), model(batch.whole), rtol=1e-5, atol=0)
    for mine, theirs in zip(ours, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    ("way", "cut"),
    [*(("images", cut) for cut in range(DEPTH + 1)), *(("features", cut) for cut in range(1, DEPTH + 1))],
)
def test_no_backward_reaches_what_is_frozen(masked_model: MakeModel, images: Tensor, way: str, cut: int) -> None:
    model = masked_model(cut)
    fired: set[str] = set()
    for name, part in parts(model).items():
        part.register_full_backward_hook(lambda *_, name=name: fired.add(name))
    noise = torch.rand(3, TOKENS)
    batch = model.from_images(images, noise, KEEP) if way == "images" else feature_batch(model, images, 4)
    model(batch).backward()
    learning = {f"block {index}" for index in range(cut, DEPTH)} | ({"patch_embed"} if cut == 0 else set())
    assert fired == learning
    assert batch.visible_BKD.requires_grad == (cut == 0)


@pytest.mark.parametrize("cut", range(DEPTH + 1))
def test_all_that_learns_gets_a_gradient_and_nothing_else(masked_model: MakeModel, images: Tensor, cut: int) -> None:
    model = masked_model(cut)
    model(model.from_images(images, torch.rand(3, TOKENS), KEEP)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    grads = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    before = ("encoder.vit.pos_embed", *(f"encoder.vit.blocks.{index}." for index in range(cut)))
    assert not [name for name in grads if name.startswith(before + (("encoder.vit.patch_embed",) if cut else ()))]


@pytest.mark.parametrize("cut", range(DEPTH + 1))
def test_grouped_features_are_those_of_masked_training(masked_model: MakeModel, images: Tensor, cut: int) -> None:
    model = masked_model(cut).eval()
    noise = torch.rand(3, TOKENS)
    live = model.from_images(images, noise, KEEP)
    ids = group_ids(noise, 4)
    features, _ = model.frozen_features(images, ids, 4)
    targets = model.image_targets(images)
    stored = model.from_features(features[:, :KEEP], ids[:, :KEEP], torch.rand(3, KEEP), KEEP, targets)
    assert torch.equal(stored.mask.ids_keep, live.mask.ids_keep)
    assert torch.equal(stored.scored_BL, live.scored_BL) and torch.equal(the_target(stored), the_target(live))
    torch.testing.assert_close(stored.visible_BKD, live.visible_BKD, rtol=0, atol=1e-6)
    assert model(stored).item() == pytest.approx(model(live).item(), rel=1e-6)


def test_full_mode_leaks_and_the_others_do_not(masked_model: MakeModel, images: Tensor) -> None:
    """Change the pixels of the scored tokens of an image: only in full mode do the visible features notice."""
    model = masked_model(3).eval()
    ids = torch.arange(TOKENS).expand(3, TOKENS)
    noise = torch.rand(3, TOKENS)
    changed = images.clone()
    changed[:, :, 8:] = 255 - changed[:, :, 8:]
    moved = {}
    for groups in (1, 2, 4):
        size = TOKENS // groups
        first, second = (
            model.from_features(
                model.frozen_features(pixels, ids, groups)[0][:, :size], ids[:, :size], noise[:, :size], KEEP,
                model.image_targets(pixels),
            )
            for pixels in (images, changed)
        )  # fmt: skip
        assert (first.scored_BL[:, 8:] == 1).all() or groups == 1
        upper = first.mask.ids_keep < 8
        moved[groups] = (first.visible_BKD - second.visible_BKD).abs().amax(dim=2)[upper].max().item()
    assert moved[1] > 1e-3 and moved[2] == moved[4] == 0.0


def test_live_frozen_blocks_see_visible_tokens_only(masked_model: MakeModel, images: Tensor) -> None:
    model = masked_model(2).eval()
    noise = torch.rand(3, TOKENS)
    mask = random_mask(noise, 0.75)
    tokens = take_tokens(model.encoder.embed(normalize_images(images)), mask.ids_keep)
    batch = model.from_images(images, noise, KEEP)
    assert torch.equal(batch.visible_BKD, model.encoder.run(tokens, 0, 2))
    assert torch.equal(batch.scored_BL, mask.hidden)


def test_features_come_in_stored_order_and_go_back_to_the_raster(masked_model: MakeModel, images: Tensor) -> None:
    model = masked_model(2).eval()
    ids = group_ids(torch.rand(3, TOKENS), 1)
    stored, _ = model.frozen_features(images, ids, 1)
    assert not stored.requires_grad and not masked_model(0).frozen_features(images, ids, 1)[0].requires_grad
    want = model.encoder.run(model.encoder.embed(normalize_images(images)), 0, 2)
    torch.testing.assert_close(raster_order(stored, ids), want, rtol=0, atol=1e-6)
    numbered = torch.arange(TOKENS).expand(3, TOKENS)
    assert torch.equal(raster_order(take_tokens(numbered.unsqueeze(-1), ids), ids).squeeze(-1), numbered)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_feature_target_is_the_normalised_input_of_the_learning_blocks(
    masked_model: MakeModel, images: Tensor, groups: int
) -> None:
    model = masked_model(2, "features").eval()
    batch = feature_batch(model, images, groups, group=groups - 1)
    assert the_target(batch).shape == (3, TOKENS, 24)
    kept = take_tokens(the_target(batch), batch.mask.ids_keep)
    torch.testing.assert_close(kept, feature_target(batch.visible_BKD), rtol=0, atol=1e-6)
    assert model.each_head[0].predict(model.encoder.norm(batch.visible_BKD), batch.whole).shape == (3, TOKENS, 24)


@pytest.mark.parametrize(("groups", "kind"), [(4, "pixels"), (2, "pixels"), (1, "features")])
def test_a_few_steps_on_one_batch_halve_the_loss(
    masked_model: MakeModel, images: Tensor, groups: int, kind: str
) -> None:
    model = masked_model(2, kind)
    batch = feature_batch(model, images, groups)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
