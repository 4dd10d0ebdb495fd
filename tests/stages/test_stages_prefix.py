"""Class and register tokens on their way through caches: encoded, chained and trained on, all as in live training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cache import open_cache
from cache.layout import Layout
from models.config import DecoderConfig, HeadSpec, MaskConfig, ModelConfig
from models.targets import normalize_images
from models.vit import Encoder, build_encoder, frozen_hash
from stages.config import DataConfig, TrainConfig
from stages.encode import build
from stages.images import open_data
from stages.optim import PREFIX, build_adamw, layer_of, parameter_groups
from stages.segment import Segment
from stages.sources import CachedFeatures, LiveFeatures, LiveImages, Sampling
from stages.train import Build, build_model, train_step
from stages.views import image_batch
from tests.encoding import encode_job, tiny_spec

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=4, heads=2, class_token=True, registers=1)
DATA = DataConfig(limit=24)
IMAGES = open_data(DATA).train
ROWS = [23, 0, 7]
SEGMENT = Segment(cut=3, first_epoch=1, epochs=1, first_step=3, steps=3, steps_per_epoch=3)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(1)
    found = build_encoder(MODEL, seed=3).eval()
    for name in PREFIX:
        torch.nn.init.normal_(getattr(found.vit, name))
    for name, value in found.vit.named_parameters():  # untrained blocks change their input by a hundredth only
        if name.startswith("blocks.") and value.ndim == 2:
            torch.nn.init.normal_(value, std=0.3)
    return found


@pytest.fixture(scope="module")
def weights(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(encoder.vit.state_dict(), path)
    return path


def built(folder: Path, weights: Path, encoder: Encoder, cut: int, groups: int, parent: Path | None = None) -> Path:
    mode = {"groups": groups, "pixels": True, "parent": open_cache(parent).manifest.fingerprint if parent else ""}
    spec = tiny_spec(IMAGES, DATA, frozen_hash(encoder.vit.state_dict(), cut), cut, **mode, prefix=2)
    job = encode_job(folder, Layout(spec, len(IMAGES), shard_rows=10), MODEL, DATA, weights, batch=4, parent=parent)
    assert list(build(job, IMAGES, map))[-1] == (6, 6)
    return folder


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_cache_holds_every_group_behind_its_prefix(
    tmp_path: Path, weights: Path, encoder: Encoder, groups: int
) -> None:
    cache = open_cache(built(tmp_path / "a", weights, encoder, 2, groups))
    pixels, _ = image_batch(IMAGES, ROWS, 1, DATA, 16, seed=5)
    with torch.inference_mode():
        tokens = encoder.embed(normalize_images(torch.from_numpy(pixels)))
        for place, row in enumerate(ROWS):
            for group in range(groups):
                part = cache.read([row], 1, group)
                alone = torch.cat([encoder.prefix(1), tokens[place : place + 1, part.ids_BL[0]]], dim=1)
                want = encoder.run(alone, 0, 2)
                torch.testing.assert_close(part.prefix_BSD, want[:, :2], rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(part.features_BLD, want[:, 2:], rtol=1e-3, atol=1e-3)


def test_a_cache_of_a_cache_is_that_of_the_images_but_for_rounding(
    tmp_path: Path, weights: Path, encoder: Encoder
) -> None:
    first = built(tmp_path / "one", weights, encoder, 1, 4)
    chained = open_cache(built(tmp_path / "chained", weights, encoder, 3, 4, parent=first)).read(range(24), 1)
    direct = open_cache(built(tmp_path / "direct", weights, encoder, 3, 4)).read(range(24), 1)
    for a, b in ((chained.prefix_BSD, direct.prefix_BSD), (chained.features_BLD, direct.features_BLD)):
        assert 0 < (a - b).norm() / b.norm() < 1e-3
    fresh = encoder.prefix(24).repeat(1, 4, 1)
    assert (chained.prefix_BSD - fresh).norm() / fresh.norm() > 0.5


@pytest.mark.parametrize("target", ["pixels", "features"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_cached_training_is_live_training(
    tmp_path: Path, weights: Path, encoder: Encoder, groups: int, target: str
) -> None:
    first = built(tmp_path / "one", weights, encoder, 1, groups)
    cache = open_cache(built(tmp_path / "two", weights, encoder, 3, groups, parent=first))
    heads = (HeadSpec(4, target, matching=True),)
    model = build_model(Build(0, MODEL, DecoderConfig(depth=1, width=12, heads=3), heads), 3, "cpu")
    model.encoder.vit.load_state_dict(encoder.vit.state_dict())
    how = Sampling(5, 8, DATA, MODEL, MaskConfig(groups=groups), heads)  # type: ignore[arg-type]
    cached, live = CachedFeatures(cache, how, IMAGES), LiveFeatures(IMAGES, how, views=2)
    for step in range(3):
        segment = replace(SEGMENT, first_epoch=step)  # another view, then another group
        read, made = (source.mask(model, source.load(segment, step)) for source in (cached, live))
        assert read.visible_BKD.shape == (8, 2 + 4, 24)
        assert torch.equal(read.mask.ids_keep, made.mask.ids_keep)
        difference = (read.visible_BKD - made.visible_BKD).norm() / made.visible_BKD.norm()
        assert 0 < difference < 1e-3
        assert model(read).item() == pytest.approx(model(made).item(), rel=2e-3)


def test_steps_learn_and_micro_batches_carry_their_prefix(tmp_path: Path, weights: Path, encoder: Encoder) -> None:
    cache = open_cache(built(tmp_path / "a", weights, encoder, 3, 4))
    heads = (HeadSpec(4, "pixels", matching=True),)
    how = Sampling(5, 8, DATA, MODEL, MaskConfig(), heads)
    totals = []
    for accumulate in (1, 4):
        model = build_model(Build(0, MODEL, DecoderConfig(depth=1, width=12, heads=3), heads), 3, "cpu")
        model.encoder.vit.load_state_dict(encoder.vit.state_dict())
        train = TrainConfig(batch_size=8, accumulate=accumulate, precision="float32", device="cpu", lr=1e-2)
        optimizer = build_adamw(parameter_groups(model, 0.05), train)
        source = CachedFeatures(cache, how, IMAGES)
        totals.append([train_step(model, optimizer, source, source.load(SEGMENT, 0), train)[0].item() for _ in "123"])
        assert torch.equal(model.encoder.vit.cls_token, encoder.vit.cls_token)
    assert totals[0] == pytest.approx(totals[1], rel=1e-4) and totals[0][2] < totals[0][0]


def test_prefix_tokens_are_layer_0_and_do_not_decay() -> None:
    heads = (HeadSpec(4, "pixels", matching=True),)
    model = build_model(Build(0, MODEL, DecoderConfig(depth=1, width=12, heads=3), heads), 0, "cpu")
    names = dict(model.named_parameters())
    for name in PREFIX:
        assert layer_of(f"encoder.vit.{name}") == 0
        for by_layer in (False, True):
            (group,) = (
                group
                for group in parameter_groups(model, 0.05, by_layer)
                if any(parameter is names[f"encoder.vit.{name}"] for parameter in group["params"])
            )
            assert group["weight_decay"] == 0.0 and group["layer"] == (0 if by_layer else -1)
    source = LiveImages(IMAGES, Sampling(5, 8, DATA, MODEL, MaskConfig(), heads))
    batch = source.mask(model, source.load(replace(SEGMENT, cut=0), 0))
    assert batch.visible_BKD.shape == (8, 2 + 4, 24)
