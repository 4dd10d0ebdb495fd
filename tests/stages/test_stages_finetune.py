"""Fine-tuning below the command line: layer decay and rates by hand, what a step reads live and cached, accumulation,
scores by a slow definition, and images without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cache import open_cache
from cache.layout import Layout, Shard
from models.classifier import Classifier, build_classifier
from models.config import ModelConfig
from models.targets import normalize_images
from models.vit import build_encoder, frozen_hash
from stages.augment import augmenter
from stages.config import DataConfig, FinetuneConfig, TrainConfig
from stages.encode import build
from stages.errors import DataError
from stages.finetune import (
    CachedPrefix,
    FinetuneRates,
    FinetuneResult,
    HeadScore,
    Labelled,
    Lessons,
    LiveViews,
    classify,
    layer_decay_groups,
    loop_settings,
)
from stages.images import Data, ImageList, open_data
from stages.labels import num_classes, require_labels
from stages.optim import build_adamw
from stages.segment import Segment
from stages.train import train_step
from stages.views import centre_view, image_batch, view_transform_id
from tests.encoding import encode_job, tiny_spec

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=4, heads=2)
DATA = DataConfig(limit=30)
IMAGES = open_data(DATA).train
SETTINGS = FinetuneConfig(batch_size=6, epochs=2, label_smoothing=0.1)
TRAIN = TrainConfig(batch_size=6, precision="float32", device="cpu", threads=1)
SEGMENT = Segment(cut=0, first_epoch=0, epochs=2, first_step=0, steps=10, steps_per_epoch=5)


def classifier(cut: int = 0, blocks: tuple[int, ...] = (), **model: Any) -> Classifier:
    encoder = build_encoder(replace(MODEL, **model), seed=3)
    found = build_classifier(encoder, 10, blocks, cut, "mean", seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for head in found.in_order:
            nn.init.normal_(head.linear.weight, std=0.3)
    return found


def lessons(**settings: Any) -> Lessons:
    return Lessons(5, replace(SETTINGS, **settings), DATA, 16, 10)


# --- how fast every layer learns --------------------------------------------------------------------------------------


def test_layer_decay_by_hand() -> None:
    """4 blocks at 0.5: embedding 1/32, blocks 1/16, 1/8, 1/4, 1/2, heads 1; decay on matrices alone."""
    model = classifier(class_token=True, blocks=(2,))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales, decays = {}, {}
    groups = layer_decay_groups(model, weight_decay=0.05, layer_decay=0.5)
    for group in groups:
        for parameter in group["params"]:
            scales[names[id(parameter)]] = group["scale"]
            decays[names[id(parameter)]] = group["weight_decay"]
    vit = "encoder.vit."
    want = {
        f"{vit}patch_embed.proj.weight": 1 / 32,
        f"{vit}cls_token": 1 / 32,
        f"{vit}blocks.0.attn.qkv.weight": 1 / 16,
        f"{vit}blocks.1.norm1.bias": 1 / 8,
        f"{vit}blocks.2.mlp.fc1.weight": 1 / 4,
        f"{vit}blocks.3.mlp.fc2.bias": 1 / 2,
        "heads.0.linear.weight": 1.0,
        "heads.1.norm.weight": 1.0,
    }
    assert {name: scales[name] for name in want} == want
    assert {name for name, decay in decays.items() if decay} == {
        name for name in decays if name.endswith(".weight") and "norm" not in name
    }
    assert set(decays.values()) == {0.0, 0.05} and decays[f"{vit}cls_token"] == 0.0
    assert set(scales) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(groups) == 12, "six layers, decaying or not"


def test_frozen_blocks_are_in_no_group() -> None:
    model = classifier(cut=3)
    assert sorted({group["scale"] for group in layer_decay_groups(model, 0.05, 0.5)}) == [0.5, 1.0]


def test_rates_warm_up_and_fall_by_a_cosine_times_the_layers_scale() -> None:
    """10 steps, 2 of warm-up to 0.4: half way down, at 6, the rate is 0.2 + min/2."""
    settings = replace(SETTINGS, lr=0.4, min_lr=0.1, warmup_epochs=0.4)
    optimizer = build_adamw(layer_decay_groups(classifier(), 0.05, 0.5), TRAIN)
    rates = FinetuneRates(settings, total_steps=10, steps_per_epoch=5)
    assert [rates.apply(optimizer, step) for step in (0, 1, 2, 6, 10)] == pytest.approx([0.2, 0.4, 0.4, 0.25, 0.1])
    rates.apply(optimizer, 6)
    assert {group["scale"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {0.5**power: 0.25 * 0.5**power for power in range(6)}
    )
    assert FinetuneRates(replace(settings, warmup_epochs=9.0), 10, 5).apply(optimizer, 9) == 0.4


def test_the_loop_takes_the_machine_from_train_and_the_rest_from_finetune() -> None:
    asked = FinetuneConfig(batch_size=8, accumulate=2, lr=0.3, min_lr=0.1, clip=0.5, beta2=0.9, weight_decay=0.2)
    found = loop_settings(asked, replace(TRAIN, loader_threads=3, clip=7.0, lr_schedule="constant"))
    assert (found.device, found.precision, found.loader_threads) == ("cpu", "float32", 3)
    own = ("batch_size", "accumulate", "lr", "min_lr", "clip", "beta2", "weight_decay", "max_steps", "warmup_epochs")
    assert {name: getattr(found, name) for name in own} == {name: getattr(asked, name) for name in own}
    assert found.lr_schedule == "cosine"


# --- what a step reads ------------------------------------------------------------------------------------------------


def test_live_views_are_fresh_in_every_epoch_and_augmented() -> None:
    source = LiveViews(IMAGES, lessons(rand_augment=9.0))
    one, again, later = (source.load(SEGMENT, step) for step in (1, 1, 6))
    assert torch.equal(one.values, again.values) and torch.equal(one.labels_B, again.labels_B)
    rows = source.lessons.rows(SEGMENT, 1, 30)
    assert one.labels_B.tolist() == IMAGES.labels[rows].tolist()
    pixels, _ = image_batch(IMAGES, rows, 0, DATA, 16, 5, augmenter(9.0, 5))
    assert torch.equal(one.values, torch.from_numpy(pixels)) and one.values.dtype == torch.uint8
    plain = LiveViews(IMAGES, lessons(rand_augment=0.0)).load(SEGMENT, 1)
    assert not torch.equal(plain.values, one.values)
    rows_later = source.lessons.rows(SEGMENT, 6, 30)
    pixels, _ = image_batch(IMAGES, rows_later, 1, DATA, 16, 5, augmenter(9.0, 5))
    assert torch.equal(later.values, torch.from_numpy(pixels))


def serial(function: Any, tasks: Any) -> Iterator[Shard]:
    return map(function, tasks)


def prefix_cache(folder: Path, model: Classifier, rand_augment: float = 0.0, **settings: Any) -> Path:
    """A cache of what the frozen blocks of a classifier make of two views."""
    state = {name: value.clone() for name, value in model.encoder.vit.state_dict().items()}
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    config = replace(MODEL, **settings)
    mode = {"groups": 1, "mask_ratio": 0.0, "view_transform": view_transform_id(DATA, 16, rand_augment)}
    spec = tiny_spec(IMAGES, DATA, frozen_hash(state, model.cut), model.cut, **mode, prefix=model.encoder.num_prefix)
    weights = folder / "model.safetensors"
    layout = Layout(spec, len(IMAGES), 12)
    more = {"loader_threads": 2, "rand_augment": rand_augment}
    job = encode_job(folder / "cache", layout, config, DATA, weights, batch=5, **more)
    assert list(build(job, IMAGES, serial))[-1] == (6, 6)
    return folder / "cache"


@pytest.mark.parametrize("mix", [{"mixup": 0.8, "cutmix": 0}, {"mixup": 0, "cutmix": 1.0}, {"mixup": 0, "cutmix": 0}])
@pytest.mark.parametrize("class_token", [False, True])
def test_the_first_step_from_the_cache_has_the_loss_of_the_frozen_blocks_run_live(
    tmp_path: Path, mix: dict[str, float], class_token: bool
) -> None:
    model = classifier(cut=2, blocks=(2, 3), class_token=class_token).eval()
    cached = CachedPrefix(
        open_cache(prefix_cache(tmp_path / "a", model, 9.0, class_token=class_token)), lessons(rand_augment=9.0, **mix)
    )
    segment = replace(SEGMENT, cut=2)
    for step, view in ((1, 0), (5, 1), (10, 0)):
        rows = cached.lessons.rows(segment, step, 30)
        pixels, _ = image_batch(IMAGES, rows, view, DATA, 16, 5, augmenter(9.0, 5))
        with torch.no_grad():
            tokens = model.at_cut(normalize_images(torch.from_numpy(pixels)))
        prefix, patches = tokens.split([model.encoder.num_prefix, 16], dim=1)
        labels = torch.from_numpy(IMAGES.labels[rows])
        live = Labelled(patches, labels, step, cached.lessons, prefix_BRD=prefix if class_token else None)
        with torch.no_grad():
            losses = [
                model(cached.mask(model, part)) for one in (cached.load(segment, step), live) for part in one.split(1)
            ]
        assert losses[0].shape == (3,)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0.0)
    with torch.no_grad():
        other = model(cached.mask(model, cached.load(segment, 2).split(1)[0]))
    assert not torch.allclose(other, losses[0], rtol=1e-2), "another step has another loss"


def test_the_cache_is_that_of_its_view_transform(tmp_path: Path) -> None:
    model = classifier(cut=1).eval()
    plain, augmented = (open_cache(prefix_cache(tmp_path / str(m), model, m)) for m in (0.0, 9.0))
    assert plain.manifest.fingerprint != augmented.manifest.fingerprint
    assert "rand-augment v1 magnitude 9" in augmented.manifest.spec.view_transform
    a, b = (cache.read(range(30)).features_BLD for cache in (plain, augmented))
    same = [torch.equal(x, y) for x, y in zip(a, b, strict=True)]
    assert 1 <= sum(same) < 20, "a quarter of the views stays as it is"


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_split_is_the_whole_batch(tmp_path: Path, cut: int, parts: int) -> None:
    """Mixing pairs the first image with the last, in another part: the parts are of the mixed batch."""
    asked, results = lessons(mixup=0.8, cutmix=1.0), []
    for accumulate in (1, parts):
        model = classifier(cut=cut)
        if cut:
            source: Any = CachedPrefix(open_cache(prefix_cache(tmp_path / str(accumulate), model)), asked)
        else:
            source = LiveViews(IMAGES, asked)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        settings = replace(TRAIN, accumulate=accumulate)
        loss = train_step(model, optimizer, source, source.load(replace(SEGMENT, cut=cut), 3), settings)
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, whole), (parts_loss, split) = results
    torch.testing.assert_close(loss, parts_loss)
    assert whole.keys() == split.keys() and len(whole) > 10
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)


def test_frozen_blocks_get_no_gradient_and_no_update(tmp_path: Path) -> None:
    model = classifier(cut=2)
    cached = CachedPrefix(open_cache(prefix_cache(tmp_path / "a", model)), lessons())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_adamw(layer_decay_groups(model, 0.05, 0.75), TRAIN)
    FinetuneRates(SETTINGS, 10, 5).apply(optimizer, 2)
    train_step(model.train(), optimizer, cached, cached.load(replace(SEGMENT, cut=2), 0), TRAIN)
    frozen = ("encoder.vit.patch_embed.", "encoder.vit.pos_embed", "encoder.vit.blocks.0.", "encoder.vit.blocks.1.")
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (not name.startswith((*frozen, "encoder.vit.norm."))), name
        assert (parameter.grad is None) == name.startswith((*frozen, "encoder.vit.norm."))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_accuracy_is_that_of_plain_loops() -> None:
    model = classifier(blocks=(2,))
    images = open_data(DATA).val.only(range(37))
    found = classify(model.train(), images, 0, 10, 16, "float32")
    assert model.training and found.images == 37
    hits: dict[int, list[list[bool]]] = {2: [], 4: []}
    with torch.no_grad():
        for row in range(37):
            view = torch.from_numpy(centre_view(images.image(row), 16).transpose(2, 0, 1).copy())[None]
            model.eval()
            for block, logits in zip((2, 4), model.logits(model.at_cut(normalize_images(view))), strict=True):
                order = sorted(range(10), key=lambda c: -float(logits[0, c]))
                hits[block].append([images.labels[row] in order[:1], images.labels[row] in order[:5]])
    for score in found.heads:
        assert (score.top1, score.top5) == pytest.approx(tuple(np.mean(hits[score.block], axis=0)))
    assert 0 < found.heads[-1].top1 < found.heads[-1].top5 < 1  # type: ignore[operator]
    assert classify(model, images, 10, 10, 16, "float32").images == 10


def test_a_class_that_training_does_not_know_is_wrong_and_few_classes_have_no_top5() -> None:
    model = build_classifier(build_encoder(MODEL, seed=3), 3, (), 0, "mean", seed=0)
    images = open_data(DATA).val.only(range(8))
    renamed = replace(images, entries=tuple(replace(entry, label=7) for entry in images.entries))
    assert classify(model, renamed, 0, 5, 16, "float32").heads == (HeadScore(4, 0.0, None),)


def test_a_point_of_the_curve_names_the_last_head_and_the_best_is_named() -> None:
    result = FinetuneResult((HeadScore(2, 0.6, 0.9), HeadScore(3, 0.6, 0.8), HeadScore(4, 0.5, 0.7)), 40)
    assert result.best.block == 3
    assert result.point() == {"top1": 0.5, "top5": 0.7, "images": 40, "top1_block2": 0.6, "top1_block3": 0.6}


# --- labels -----------------------------------------------------------------------------------------------------------


def without_labels(images: ImageList, rows: range) -> ImageList:
    entries = tuple(replace(e, label=-1) if row in rows else e for row, e in enumerate(images.entries))
    return replace(images, entries=entries)


def test_images_without_labels_are_refused_by_name() -> None:
    data = open_data(DATA)
    require_labels(data)
    message = rf"2 of 30 training images have no label, first {IMAGES.keys[3]}.*a folder for each class"
    with pytest.raises(DataError, match=message):
        require_labels(Data(without_labels(data.train, range(3, 5)), data.val))
    with pytest.raises(DataError, match=r"\d+ of \d+ evaluation images have no label"):
        require_labels(Data(data.train, without_labels(data.val, range(9))))
    ids = replace(data.train, entries=tuple(replace(e, label=2_119_789) for e in data.train.entries))
    with pytest.raises(DataError, match=r"labels run to 2119789, above 1048575, .*number the classes from 0"):
        require_labels(Data(ids, data.val))


def test_classes_are_those_of_the_training_images() -> None:
    data = open_data(DATA)
    assert num_classes(data) == 10
    one = replace(data.train, entries=tuple(replace(e, label=0) for e in data.train.entries))
    with pytest.raises(DataError, match="at least 2 classes"):
        require_labels(Data(one, data.val))
    assert num_classes(Data(without_labels(data.train, range(30)), data.val)) == 0
    assert num_classes(Data(replace(one, classes=("a", "b", "c")), data.val)) == 3


def test_inputs_move_and_keep_what_is_no_tensor() -> None:
    one = LiveViews(IMAGES, lessons()).load(SEGMENT, 0)
    moved = one.to("cpu")
    assert isinstance(moved.values, Tensor) and (moved.step, moved.lessons, moved.prefix_BRD) == (0, one.lessons, None)
