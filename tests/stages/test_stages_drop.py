"""Dropped depth in the training step: skipped blocks do not run and are not moved, micro-batches skip the same ones,
frozen blocks always run, and evaluation drops nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.config import DecoderConfig, HeadSpec, MaskConfig, ModelConfig
from models.drop import DepthDrop, skipped_blocks
from models.mim import MaskedModel
from stages.config import DataConfig, TrainConfig
from stages.images import ImageList, open_images
from stages.optim import build_adamw, parameter_groups
from stages.probe import pooled_features
from stages.segment import Segment
from stages.sources import Inputs, LiveImages, Sampling
from stages.train import Build, build_model, train_step

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=4, heads=2)
TRAIN = TrainConfig(batch_size=8, precision="float32", device="cpu", threads=1)
SEGMENT = Segment(cut=0, first_epoch=0, epochs=5, first_step=0, steps=20, steps_per_epoch=4)
SKIPPING = DepthDrop(seed=0, drop_path=0.0, layer_drop=0.9, total_steps=20)


@pytest.fixture(scope="module")
def images() -> ImageList:
    return open_images("sample").only(range(32))


def model(drop: DepthDrop | None, cut: int = 0) -> MaskedModel:
    decoder = DecoderConfig(depth=1, width=12, heads=3)
    return build_model(Build(0, MODEL, decoder, (HeadSpec(4, "pixels"),), drop=drop), cut, "cpu").train()


def source(images: ImageList) -> LiveImages:
    return LiveImages(images, Sampling(0, 8, DataConfig(), MODEL, MaskConfig(), (HeadSpec(4, "pixels"),), 1.0, 20))


def step_of(images: ImageList, number: int) -> Inputs:
    return source(images).load(SEGMENT, number)


def learn(one: MaskedModel, images: ImageList, number: int, **train: object) -> Counter[int]:
    """One step; how often each block ran."""
    ran: Counter[int] = Counter()
    handles = [
        block.register_forward_hook(lambda *_, index=index: ran.update([index]))
        for index, block in enumerate(one.encoder.vit.blocks)
    ]
    optimizer = build_adamw(parameter_groups(one, 0.05), TRAIN)
    settings = replace(TRAIN, **train)  # type: ignore[arg-type]
    train_step(one, optimizer, source(images), step_of(images, number), settings)
    for handle in handles:
        handle.remove()
    return ran


def skipped(step: int, cut: int = 0) -> frozenset[int]:
    return skipped_blocks(0, step, SKIPPING.keep_probabilities(4, step), cut)


def step_that_skips(wanted: Callable[[frozenset[int]], bool]) -> int:
    return next(step for step in range(SEGMENT.steps) if wanted(skipped(step)))


def test_skipped_blocks_do_not_run_and_do_not_move(images: ImageList) -> None:
    step = step_that_skips(lambda blocks: len(blocks) == 2)
    one = model(SKIPPING)
    before = {name: p.detach().clone() for name, p in one.encoder.vit.named_parameters()}
    assert learn(one, images, step) == Counter(set(range(4)) - skipped(step))
    for name, parameter in one.encoder.vit.blocks.named_parameters():
        rests = int(name.split(".")[0]) in skipped(step)
        assert torch.equal(parameter, before[f"blocks.{name}"]) == rests, name


def test_a_step_that_skips_blocks_costs_their_flops_less(images: ImageList) -> None:
    step = step_that_skips(lambda blocks: len(blocks) == 2)

    def flops(one: MaskedModel) -> int:
        with FlopCounterMode(display=False) as counter:
            learn(one, images, step)
        return counter.get_total_flops()

    # Forward and twice that backward; 12 D² weights of a block on 4 visible tokens, and QK' and its product with V.
    block = 3 * 8 * (2 * 12 * 24**2 * 4 + 2 * 2 * 4**2 * 24)
    assert flops(model(None)) - flops(model(SKIPPING)) == 2 * block


def test_micro_batches_skip_the_same_blocks_and_their_gradients_add_up(images: ImageList) -> None:
    step = step_that_skips(lambda blocks: len(blocks) == 1)
    gradients = []
    for accumulate in (1, 4):
        one = model(SKIPPING)
        ran = learn(one, images, step, accumulate=accumulate)
        assert ran == Counter(dict.fromkeys(set(range(4)) - skipped(step), accumulate))
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_micro_batches_of_stochastic_depth_draw_the_same_whenever_the_step_is_done_again(images: ImageList) -> None:
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        one = model(DepthDrop(0, 0.6, 0.0, 20))
        learn(one, images, 7, accumulate=2)
        found.append([p.detach().clone() for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    plain = model(None)
    learn(plain, images, 7, accumulate=2)
    assert not all(torch.equal(a, b) for a, b in zip(found[0], plain.parameters(), strict=True))


def test_frozen_blocks_run_at_every_step(images: ImageList) -> None:
    one = model(SKIPPING, cut=3)
    ran = [learn(one, images, step) for step in range(SEGMENT.steps)]
    assert all(counted[block] == 1 for counted in ran for block in range(3))
    assert 0 < sum(counted[3] for counted in ran) < SEGMENT.steps
    assert [counted[3] == 0 for counted in ran] == [3 in skipped(step, 3) for step in range(SEGMENT.steps)]


def test_evaluation_drops_nothing(images: ImageList) -> None:
    one, plain = model(DepthDrop(0, 0.9, 0.9, 20)), model(None)
    learn(one, images, 15)
    plain.load_state_dict(one.state_dict())
    features = [pooled_features(each.encoder, images, 16, 16, "cpu", "float32") for each in (one, plain)]
    assert (features[0] == features[1]).all()


def test_without_rates_a_step_is_what_it_was(images: ImageList) -> None:
    off, none = model(DepthDrop(0, 0.0, 0.0, 20)), model(None)
    learn(off, images, 3)
    learn(none, images, 3)
    assert all(torch.equal(a, b) for a, b in zip(off.parameters(), none.parameters(), strict=True))
