"""What predictors that see nothing lose: the closed form is the loss of the constants that it stands for."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.batch import MaskedBatch, masked_loss
from models.config import DecoderConfig, HeadSpec, MaskConfig
from models.masking import keep_lowest
from models.teacher import EmaTeacher
from stages import blind
from stages.blind import blind_losses, blind_record, nothing_learnt
from stages.config import DataConfig
from stages.images import ImageList
from stages.sources import LiveImages, Sampling
from stages.train import Build, build_model
from tests.stages.loop import MODEL, TRAIN, parts

FINE, COARSE = HeadSpec(12, "hog"), HeadSpec(6, "hog", 0.5)
BATCH, TOKENS, VALUES = 32, 16, 5


def batches(count: int) -> list[MaskedBatch]:
    """Targets that differ by place, and within a place; three of four tokens hidden."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        mask = keep_lowest(torch.rand(BATCH, TOKENS, generator=draw), 4)
        place = torch.arange(TOKENS).reshape(1, -1, 1) / 4.0
        targets = {
            FINE.key: place + torch.randn(BATCH, TOKENS, VALUES, generator=draw),
            COARSE.key: 2 + place[:, ::4] * torch.randn(BATCH, TOKENS // 4, VALUES, generator=draw),
        }
        found.append(MaskedBatch(torch.empty(BATCH, 4, 0), mask, mask.hidden, targets))
    return found


@pytest.mark.parametrize("head", [FINE, COARSE], ids=lambda head: head.name)
def test_the_closed_form_is_the_loss_of_the_best_constants(head: HeadSpec) -> None:
    made = batches(4)
    target, weight = (torch.cat(parts) for parts in zip(*(batch.scored_at(head.key) for batch in made), strict=True))
    mean = (target * weight[..., None]).sum((0, 1)) / weight.sum()
    place = (target * weight[..., None]).sum(0) / weight.sum(0)[:, None]
    found = blind_losses(made, [FINE, COARSE])[head.name]
    assert found.mean == pytest.approx(float(masked_loss(mean.expand_as(target), target, weight)), rel=1e-5)
    assert found.place == pytest.approx(float(masked_loss(place.expand_as(target), target, weight)), rel=1e-5)
    for worse in (place + 0.1, place - 0.1):
        assert float(masked_loss(worse.expand_as(target), target, weight)) > found.place


def test_places_explain_what_differs_by_place_and_nothing_else() -> None:
    found = blind_losses(batches(40), [FINE])[FINE.name]
    assert found.place == pytest.approx(1.0, abs=0.02), "noise of variance 1 within a place"
    assert found.mean == pytest.approx(1.0 + (torch.arange(16) / 4.0).var(correction=0).item(), rel=0.03)


def test_what_is_visible_does_not_count() -> None:
    (batch,) = batches(1)
    target = batch.targets[FINE.key].clone()
    target[batch.scored_BL == 0] = 1e6
    changed = MaskedBatch(batch.visible_BKD, batch.mask, batch.scored_BL, {FINE.key: target})
    before, after = blind_losses([batch], [FINE]), blind_losses([changed], [FINE])
    assert after[FINE.name] == pytest.approx(before[FINE.name], rel=1e-9)


def test_batches_are_masked_in_pieces_one_load_at_a_time(colours: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5, 5 and 4 images, where a step's 14 are too many; what comes of it is what whole batches come to."""
    heads = (HeadSpec(1, "pixels", weight=0.5, weight_end=2.0), HeadSpec(3, "teacher", teacher=3))
    build = Build(0, MODEL, DecoderConfig(depth=1, width=12, heads=3), heads, lambda student: EmaTeacher(student, 0.9))
    model, (segment,) = build_model(build, 0, "cpu"), parts(0)
    how = Sampling(0, 14, DataConfig(), MODEL, MaskConfig(), heads, total_steps=10, averages=True)
    source = LiveImages(colours, how)
    sizes: list[int] = []
    loads: list[weakref.ref] = []
    held: list[int] = []

    class Watched(LiveImages):
        def load(self, *asked: Any) -> Any:
            gc.collect()
            held.append(sum(one() is not None for one in loads))
            found = super().load(*asked)
            loads.append(weakref.ref(found))
            return found

        def mask(self, model: Any, inputs: Any) -> MaskedBatch:
            sizes.append(len(inputs.values))
            return super().mask(model, inputs)

    monkeypatch.setattr(blind, "PIECE", 5)
    monkeypatch.setattr(blind, "IMAGES", 3 * 14)
    found = blind_record(model, Watched(colours, how), segment, 4, replace(TRAIN, batch_size=14))
    assert sizes == [5, 5, 4] * 3 and len(held) == 3 and max(held) <= 1
    with torch.no_grad():
        whole = blind_losses([source.mask(model, source.load(segment, step)) for step in (1, 2, 3)], heads)
    assert found["heads"] == {name: pytest.approx(one._asdict(), rel=1e-6) for name, one in whole.items()}
    weights = dict(zip(model.loss_names, model.loss_weights(0.3), strict=True))
    assert found["place"] == pytest.approx(sum(weights[name] * one.place for name, one in whole.items()), rel=1e-6)


def test_a_loss_that_needs_no_image_is_told_with_its_bound() -> None:
    told = nothing_learnt(0.0636, {"mean": 0.0654, "place": 0.0629})
    assert "0.0636, is no lower than 98% of 0.0629" in told and "target.kind" in told
    assert nothing_learnt(0.0617, {"mean": 0.0654, "place": 0.0629}) and not nothing_learnt(0.0616, {"place": 0.0629})
    assert not nothing_learnt(1.0, {}), "where nothing is hidden there is nothing to compare with"
