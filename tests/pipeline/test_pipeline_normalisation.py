"""Checkpoints that were trained on images of another mean and standard deviation than ImageNet's: what they compute
here is what they compute in timm, the cache and the exported folder say so, and where it is wrong or not known the run
says that."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import normalize

from cache import open_cache
from models.batch import MaskedBatch
from models.config import HeadSpec
from models.families import ModelError
from models.normalisation import told
from models.targets import image_target
from models.teacher import EmaTeacher, Teacher
from models.vit import build_encoder
from pipeline import equivalence, export, runner
from pipeline.checks import check
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, judge_stage
from pipeline.finetuning import checked_start, make_classifier, source_of
from pipeline.inputs import inputs_digest
from pipeline.layout import RunPaths
from pipeline.probing import probe_again
from pipeline.recipes import recipe
from pipeline.tuned import Tuning
from stages.adaptive import Settle
from stages.endings import Settling
from stages.images import spread
from stages.probe import pooled_features
from stages.train import Build, build_model
from stages.views import centre_batch, image_batch
from stages.weights import load_weights, stated_beside
from tests.pipeline.toy import job, record, toy

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
HALF = {"model.mean": [0.5, 0.5, 0.5], "model.std": [0.5, 0.5, 0.5]}
SET_HALF = 'SET="model.mean=[0.5,0.5,0.5] model.std=[0.5,0.5,0.5]"'
SET_CLIP = 'SET="model.mean=[0.48145466,0.4578275,0.40821073] model.std=[0.26862954,0.26130258,0.27577711]"'
CHANGES = {"model.class_token": True, "schedule.cuts": [0, 3], "schedule.epochs": [0, 1], "mask.groups": 1}


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """A model of timm's whose own preprocessing has mean and standard deviation 0.5."""
    torch.manual_seed(4)
    model = timm.create_model("vit_tiny_patch16_224", **SIZES).eval()
    for name in ("cls_token", "pos_embed"):
        torch.nn.init.normal_(getattr(model, name), std=0.5)
    return model


@pytest.fixture(scope="module")
def file(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(theirs.state_dict(), path)
    return path


def config(file: Path, **changes: object) -> PipelineConfig:
    return toy(**CHANGES | HALF | {"model.weights": str(file)} | changes)


@pytest.fixture(scope="module")
def adapted(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "adapted"
    runner.run_stage(job(root, config(file), target=1))
    return root


def as_timm(model: torch.nn.Module, pixels: np.ndarray) -> torch.Tensor:
    """uint8 images as timm's own preprocessing gives them to a model."""
    own = timm.data.resolve_data_config({}, model=model)
    assert [*own["mean"], *own["std"]] == [0.5] * 6
    return normalize(torch.from_numpy(pixels).float() / 255, own["mean"], own["std"])


def test_features_are_those_of_timm_s_model_behind_its_own_preprocessing(theirs: torch.nn.Module, file: Path) -> None:
    settings = config(file)
    encoder = build_encoder(settings.model, seed=0).eval()
    load_weights(encoder, str(file))
    data = Wanted(settings, RunPaths(file.parent)).data.val.only(range(8))
    with torch.no_grad():
        want = theirs.forward_features(as_timm(theirs, centre_batch(data, range(8), 16)))[:, 1:].mean(dim=1)
    found = torch.from_numpy(pooled_features(encoder, data, 8, 16, "cpu", "float32"))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    usual = build_encoder(config(file, **{"model.mean": [0.485, 0.456, 0.406]}).model, seed=0).eval()
    load_weights(usual, str(file))
    assert np.abs(pooled_features(usual, data, 8, 16, "cpu", "float32") - want.numpy()).max() > 1e-2


def test_the_cache_holds_them_and_says_which(theirs: torch.nn.Module, adapted: Path, file: Path) -> None:
    wanted = Wanted(config(file), RunPaths(adapted))
    spec = wanted.cache_spec(1)
    assert spec is not None and spec.normalisation == "mean 0.5,0.5,0.5 std 0.5,0.5,0.5"
    cache, images = open_cache(wanted.cache_folder(spec)), wanted.data.train
    rows = spread(len(images), 8)
    pixels, _ = image_batch(images, rows, 0, wanted.config.data, 16, wanted.config.seed)
    with torch.no_grad():
        tokens = theirs.patch_embed(as_timm(theirs, pixels))
        tokens = theirs.blocks[:3](theirs._pos_embed(tokens))[:, 1:]
    torch.testing.assert_close(cache.read(rows, 0).features_BLD, tokens, rtol=1e-3, atol=5e-3)


def test_cached_training_equals_live_training(adapted: Path, file: Path) -> None:
    found = equivalence.compare_stage(Wanted(config(file), RunPaths(adapted)), 1)
    assert found.feature_rmse < 1e-3 and found.loss_difference < 1e-3


def test_teachers_and_what_watches_a_stage_settle_see_images_as_the_encoder_does(
    theirs: torch.nn.Module, file: Path
) -> None:
    settings, images = config(file), torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    encoder = build_encoder(settings.model, seed=0).eval()
    load_weights(encoder, str(file))
    with torch.no_grad():
        tokens = theirs._pos_embed(theirs.patch_embed(as_timm(theirs, images.numpy())))
        want = theirs.blocks(tokens)
    watched = Settling(Settle("cka", 0.1, 2), 4, 1.0, images).features(encoder, settings.train)
    torch.testing.assert_close(watched, want, rtol=0, atol=1e-5)
    for teacher in (EmaTeacher(encoder, 0.9), Teacher(encoder)):
        torch.testing.assert_close(teacher.of_images(images, [4])[4], want[:, 1:], rtol=0, atol=1e-5)


def test_another_normalisation_is_another_cache_and_another_stage(adapted: Path, file: Path) -> None:
    wanted, usual = (Wanted(made, RunPaths(adapted)) for made in (config(file), toy(**CHANGES)))
    assert wanted.draft_spec(1).fingerprint != usual.draft_spec(1).fingerprint
    red = Wanted(config(file, **{"model.mean": [0.4, 0.5, 0.5]}), RunPaths(adapted))
    assert wanted.draft_spec(1).differences(red.draft_spec(1)) == [
        ("normalisation", "mean 0.5,0.5,0.5 std 0.5,0.5,0.5", "mean 0.4,0.5,0.5 std 0.5,0.5,0.5")
    ]
    verdict = judge_stage(red, 0)
    assert verdict.state == "stale" and verdict.reason == "model.mean: [0.5, 0.5, 0.5] -> [0.4, 0.5, 0.5]"
    assert judge_stage(wanted, 1).current
    back = judge_stage(Wanted(toy(**CHANGES | {"model.weights": str(file)}), RunPaths(adapted)), 0)
    assert back.reason == "model.mean: [0.5, 0.5, 0.5] -> (none), model.std: [0.5, 0.5, 0.5] -> (none)"


def test_a_run_that_says_nothing_is_the_run_that_it_was_before_the_setting(tmp_path: Path) -> None:
    usual = Wanted(toy(), RunPaths(tmp_path))
    assert not {"model.mean", "model.std"} & usual.stage_inputs(0).keys()
    assert "normalisation" not in usual.draft_spec(1).to_dict()
    said = toy(**{"model.mean": [0.485, 0.456, 0.406], "model.std": [0.229, 0.224, 0.225]})
    for stage in (0, 1):
        same = Wanted(said, RunPaths(tmp_path)).stage_inputs(stage)
        assert inputs_digest(same) == inputs_digest(usual.stage_inputs(stage))


def test_targets_made_of_pixels_do_not_change(file: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for kind in ("pixels", "hog"):
        want = image_target(images, kind, 1.0, 4)
        batches = [masked(made, images, kind) for made in (config(file), toy(**CHANGES))]
        assert all(torch.equal(batch.targets[kind, 1.0], want) for batch in batches)
        assert not torch.equal(batches[0].visible_BKD, batches[1].visible_BKD)


def masked(settings: PipelineConfig, images: torch.Tensor, kind: str) -> MaskedBatch:
    """A batch of live training, with targets of a kind."""
    build = Build(0, settings.model, settings.decoder, (HeadSpec(4, kind),), None)
    return build_model(build, 0, "cpu").from_images(images, torch.rand(2, 16), 4)


def test_fine_tuning_reads_images_as_the_encoder_takes_them(
    theirs: torch.nn.Module, adapted: Path, file: Path
) -> None:
    """What it mixes are normalised images, so it normalises before the encoder does."""
    unmixed = {"finetune.mixup": 0, "finetune.cutmix": 0, "finetune.batch_size": 8}
    tuning = Tuning(Wanted(config(file, **unmixed), RunPaths(adapted)), 0)
    source, model = source_of(tuning), make_classifier(tuning, checked_start(tuning)).eval()
    inputs = source.load(tuning.segment, 0)
    (part,) = inputs.split(1)
    with torch.no_grad():
        want = theirs._pos_embed(theirs.patch_embed(as_timm(theirs, inputs.values.numpy())))
        torch.testing.assert_close(source.mask(model, part).tokens_BLD, want, rtol=0, atol=1e-5)


def test_export_writes_it_and_the_exported_folder_says_it_when_it_is_started_from(
    theirs: torch.nn.Module, adapted: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.run_export(job(adapted, config(file), target=0))
    model = timm.create_model(f"local-dir:{adapted / 'export'}", pretrained=True).eval()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8).numpy()
    with torch.no_grad():
        want = theirs.forward_features(as_timm(theirs, images))
        torch.testing.assert_close(model.forward_features(as_timm(model, images)), want, rtol=0, atol=1e-5)
    again = adapted / "export" / "model.safetensors"
    runner.run_stage(job(tmp_path / "right", config(again), target=0))
    assert "mean 0.5,0.5,0.5 std 0.5,0.5,0.5, as its config.json says" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ModelError) as told:
        runner.run_stage(job(tmp_path / "wrong", toy(**CHANGES | {"model.weights": str(again)}), target=0))
    assert str(told.value) == (
        f"model.weights={again} wants images of mean 0.5,0.5,0.5 std 0.5,0.5,0.5, as its config.json "
        f"says; the settings give it mean 0.485,0.456,0.406 std 0.229,0.224,0.225; {SET_HALF} fits"
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", HALF, ", as timm's vit_tiny_patch16_224.augreg_in21k says"),
        ("vit_small_patch16_224.dino", {}, "std 0.229,0.224,0.225, as timm's vit_small_patch16_224.dino says"),
        ("vit_base_patch16_clip_224", {}, f"assumed; all 13 of timm's weights of this name take others: {SET_CLIP}"),
        ("vit_tiny", {}, f"assumed; all 2 of timm's weights of this name take others: {SET_HALF}"),
        ("vit_small", {}, f"assumed; 3 of timm's 4 weights of this name take others: {SET_HALF} fits augreg_in"),
        ("vit_small", HALF, "std 0.5,0.5,0.5, which is assumed; 1 of timm's 4 weights of this name take others: SET="),
        ("vit_tiny", HALF, "std 0.5,0.5,0.5, as all 2 of timm's weights of this name"),
        ("vit_giant_patch14_224", {}, "std 0.229,0.224,0.225, which is assumed"),
    ],
)
def test_a_line_says_which_normalisation_is_taken_and_on_whose_word(
    name: str, changes: dict[str, object], message: str
) -> None:
    found = told(toy(**{"model.name": name, "model.weights": "vit.pth"} | changes).model, None)
    assert message in found and "\n" not in found


def test_what_timm_says_of_a_tag_refuses_another(theirs: torch.nn.Module, file: Path, tmp_path: Path) -> None:
    changes = CHANGES | {"model.weights": str(file), "model.name": "vit_tiny_patch16_224.augreg_in21k"}
    with pytest.raises(ModelError) as told:
        runner.run_stage(job(tmp_path / "toy", toy(**changes), target=0))
    assert str(told.value) == (
        f"model.weights={file} wants images of mean 0.5,0.5,0.5 std 0.5,0.5,0.5, as timm's "
        "vit_tiny_patch16_224.augreg_in21k says; the settings give it mean 0.485,0.456,0.406 std "
        f"0.229,0.224,0.225; {SET_HALF} fits, or name the model without its tag for other weights"
    )
    runner.run_stage(job(tmp_path / "toy", toy(**changes | HALF), target=0))
    assert record(tmp_path / "toy", "stage-0")["status"] == "done"


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ({"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}, ((0.5,) * 3, (0.5,) * 3)),
        ({"mean": [0.5, 0.4, 0.3], "std": [1, 1, 1]}, ((0.5, 0.4, 0.3), (1.0,) * 3)),
        ({"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}, None),
        ({"mean": 0.5, "std": 0.5}, None),
        ({"mean": [0.5], "std": [0.5]}, None),
        ([1, 2], None),
        (None, None),
    ],
)
def test_what_lies_beside_a_file_counts_where_it_says_both(tmp_path: Path, card: object, found: object) -> None:
    (tmp_path / "config.json").write_text("{" if card is None else json.dumps(card))
    assert stated_beside(str(tmp_path / "vit.safetensors")) == found
    assert stated_beside(str(tmp_path / "elsewhere" / "vit.safetensors")) is None


def test_probe_refuses_settings_of_another_normalisation_both_ways(adapted: Path, file: Path) -> None:
    usual = toy(**CHANGES | {"model.weights": str(file)})
    with pytest.raises(ConfigError, match=re.escape("model.mean: [0.5, 0.5, 0.5] -> (none)")):
        probe_again(Wanted(usual, RunPaths(adapted)), ["stage 0"])
    red = config(file, **{"model.mean": [0.4, 0.5, 0.5]})
    with pytest.raises(ConfigError, match=re.escape("model.mean: [0.5, 0.5, 0.5] -> [0.4, 0.5, 0.5]")):
        probe_again(Wanted(red, RunPaths(adapted)), ["stage 0"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.mean": [0.5, 0.5, 127]}, r"model.mean = \[0.5, 0.5, 127.0\] .* 0..1; .* divide by 255"),
        ({"model.std": [0.5, 0, 0.5]}, r"model.std = \[0.5, 0.0, 0.5\] .* and above 0"),
        ({"model.std": [0.5, 0.5]}, "model.std"),
    ],
)
def test_three_shares_and_no_more(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(toy(**changes))


def test_adapt_starts_with_imagenet_s() -> None:
    assert recipe("adapt").model.normalisation == ""
