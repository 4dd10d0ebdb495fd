"""A run that starts from timm's checkpoint and ends as timm's checkpoint: stage 0 in no time, the arms and later stages
from there, the exported folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from models.targets import normalize_images
from models.vit import build_encoder
from pipeline import costs, equivalence, export, runner, status
from pipeline.checks import check
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, judge_all, judge_stage
from pipeline.job import Interrupted
from pipeline.layout import RunPaths
from pipeline.probing import probe_again
from stages.probe import pooled_features
from stages.views import centre_batch
from stages.weights import load_weights
from tests.pipeline.toy import StopAfter, job, record, same, toy, weights

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
CHANGES = {"model.class_token": True, "schedule.cuts": [0, 1, 3], "schedule.epochs": [0, 1, 1]}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as timm's users have them: a class token, positions of its own, a head."""
    torch.manual_seed(4)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SIZES)
    for name in ("cls_token", "pos_embed"):
        torch.nn.init.normal_(getattr(model, name), std=0.5)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(model.state_dict(), path)
    return path


def config(file: Path, **changes: object) -> PipelineConfig:
    return toy(**CHANGES | {"model.weights": str(file)} | changes)


@pytest.fixture(scope="module")
def adapted(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "adapted"
    runner.run_all(job(root, config(file)))
    return root


def test_stage_0_is_the_checkpoint_recorded_and_evaluated_in_no_training_time(adapted: Path, file: Path) -> None:
    found, state = record(adapted, "stage-0"), weights(adapted, "stage-0")
    theirs = {name: value for name, value in load_file(file).items() if not name.startswith("head.")}
    assert state.keys() == theirs.keys() and same(state, theirs)
    assert (found["status"], found["steps"], found["images"], found["train_seconds"]) == ("done", 0, 0, 0.0)
    assert found["final_loss"] is None and 0 <= found["knn_top1"] <= 1 and len(found["curve"]) == 1
    assert (found["curve"][0]["epoch"], found["curve"][0]["seconds"]) == (0.0, 0.0)


def test_every_arm_starts_there_and_only_what_may_learn_does(adapted: Path) -> None:
    before, last = weights(adapted, "stage-0"), weights(adapted, "stage-2")
    for name in ("cls_token", "pos_embed", "patch_embed.", "blocks.0."):
        assert same(before, last, name) and same(before, weights(adapted, "arms/freeze"), name)
    assert not same(before, last, "blocks.1.") and not same(before, last, "blocks.3.")
    e2e = weights(adapted, "arms/e2e")
    assert same(before, e2e, "pos_embed") and not same(before, e2e, "cls_token") and not same(before, e2e, "blocks.0.")
    found = json.loads((adapted / "speedup.json").read_text())
    for arm in found["arms"].values():
        assert [point["epoch"] for point in arm["curve"]] == [0, 1, 2] and arm["images"] == 16 * 12
        assert arm["curve"][0]["knn_top1"] == record(adapted, "stage-0")["knn_top1"]
    assert found["speedup_total"] > 0 and [row["cut"] for row in found["speedup_by_stage"]] == [1, 3]


def test_the_caches_hold_the_class_token_and_equal_live_training(
    adapted: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (adapted / "cache").glob("cut-*"):
        spec = json.loads((folder / "manifest.json").read_text())["spec"]
        assert spec["prefix"] == 1 and (folder / "data.zarr" / "view_0" / "prefix").is_dir()
    equivalence.run_equivalence(job(adapted, config(file)))
    assert "2      3" in capsys.readouterr().out


def test_it_says_what_it_left_out(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner.run_stage(job(tmp_path / "toy", config(file), target=0))
    assert f"weights {file} (" in (out := capsys.readouterr().out) and "heads left out (head.bias and 1 more)" in out


def test_plan_and_status_take_a_stage_of_no_epochs(
    adapted: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs.show_plan(job(tmp_path / "toy", config(file)))
    plan = json.loads((tmp_path / "toy" / "plan.json").read_text())
    assert plan["stages"][0]["e2e_seconds"] == 0.0 == plan["stages"][0]["epochs"] and plan["speedup_total"] > 0
    status.show_status(job(adapted, config(file)))
    probe_again(Wanted(config(file), RunPaths(adapted)), ["stage 0", "stage 2"])
    out = capsys.readouterr().out
    assert re.search(r"stage 0 +done +0 +0.0 +0.0 +0 +0\.\d{3}", out) and "stage 2" in out


def test_a_second_call_changes_nothing_and_does_not_load_torch(adapted: Path) -> None:
    def stamps() -> dict[Path, int]:
        files = (path for path in adapted.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
        return {path: path.stat().st_mtime_ns for path in files}

    before = stamps()
    code = (
        "import sys; from pipeline.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ('torch loaded' if 'torch' in sys.modules else 0))"
    )
    args = ["stage", "2", "--config", str(adapted / "config.toml"), "--run", str(adapted)]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage 2: current" in done.stdout and stamps() == before


@pytest.mark.parametrize(("target", "pool"), [(None, "mean"), (0, "token")])
def test_what_was_adapted_and_the_checkpoint_itself_can_be_fine_tuned_from_the_cache(
    adapted: Path, file: Path, tmp_path: Path, target: int | None, pool: str
) -> None:
    root = shutil.copytree(adapted, tmp_path / "copy")
    tune = {"finetune.epochs": 1, "finetune.batch_size": 16, "finetune.freeze": 2, "finetune.pool": pool}
    runner.run_finetune(job(root, config(file, **tune), target=target))
    found, before = record(root, "finetune"), weights(root, "stage-2" if target is None else "stage-0")
    assert (found["status"], found["from"]) == ("done", "stage 2" if target is None else "stage 0")
    after = weights(root, "finetune")
    assert all(same(before, after, name) for name in ("cls_token", "pos_embed", "patch_embed.", "blocks.1."))
    assert not same(before, after, "blocks.2.") and 0 <= found["top1"] <= 1


@pytest.mark.parametrize("asked", [1, 4, 9])
def test_a_run_that_was_stopped_ends_with_the_same_bits(adapted: Path, file: Path, tmp_path: Path, asked: int) -> None:
    root = tmp_path / "toy"
    with pytest.raises(Interrupted):
        runner.run_stage(job(root, config(file), target=2, stop=StopAfter(asked)))
    runner.run_stage(job(root, config(file), target=2))
    for stage in ("stage-0", "stage-1", "stage-2"):
        assert same(weights(adapted, stage), weights(root, stage))


def test_the_file_counts_by_its_content_and_not_by_its_place(adapted: Path, file: Path, tmp_path: Path) -> None:
    root = shutil.copytree(adapted, tmp_path / "copy")
    moved = Path(shutil.copy(file, tmp_path / "other name.safetensors"))
    assert all(verdict.current for verdict in judge_all(Wanted(config(moved), RunPaths(root))))
    state = load_file(moved)
    save_file(state | {"norm.bias": state["norm.bias"] + 1}, moved)
    verdict = judge_stage(Wanted(config(moved), RunPaths(root)), 0)
    assert verdict.state == "stale" and verdict.reason.startswith("model.weights: ") and " -> " in verdict.reason
    none = judge_stage(Wanted(toy(**CHANGES | {"schedule.epochs": [1, 1, 1]}), RunPaths(root)), 0)
    assert "-> (none)" in none.reason


def test_a_checkpoint_can_start_a_stage_0_that_trains(file: Path, tmp_path: Path) -> None:
    runner.run_stage(job(tmp_path / "toy", config(file, **{"schedule.epochs": [1, 1, 1], "train.lr": 1e-5}), target=0))
    state, theirs = weights(tmp_path / "toy", "stage-0"), load_file(file)
    assert same(state, theirs, "pos_embed") and not same(state, theirs, "blocks.0.") and not same(state, theirs, "cls")
    assert max(float((state[name] - theirs[name]).abs().max()) for name in state) < 1e-3
    assert record(tmp_path / "toy", "stage-0")["steps"] == 6


def test_an_average_of_the_encoder_starts_from_the_file_too(file: Path, tmp_path: Path) -> None:
    still = {"target.kind": "teacher", "teacher.kind": "ema", "teacher.momentum": 1.0}
    runner.run_stage(job(tmp_path / "toy", config(file, **still, **{"schedule.epochs": [1, 1, 1]}), target=0))
    state, theirs = load_file(RunPaths(tmp_path / "toy").stage(0).state), load_file(file)
    average = {name.removeprefix("teacher/"): value for name, value in state.items() if name.startswith("teacher/")}
    assert len(average) > 50 and same(average, theirs)
    assert not same({name: state[f"encoder/{name}"] for name in average}, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.weights": ""}, r"schedule.epochs = \[0, 1, 1\] starts stage 1 from .*give a checkpoint"),
        ({"schedule.cuts": [0], "schedule.epochs": [0]}, r"= \[0\] .*needs explicit and a later stage that trains"),
        ({"schedule.kind": "freezeout"}, r"schedule.kind = freezeout trains stage 0 for 0 epochs"),
        ({"schedule.epochs": [0, 0, 1]}, r"has a stage of less than 1 epoch"),
        ({"schedule.epochs": [-1, 1, 1]}, r"has a stage of less than 1 epoch"),
    ],
)
def test_no_epochs_without_a_checkpoint_or_a_stage_that_trains(
    file: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config(file, **changes))


@pytest.mark.parametrize("target", [None, 0, "e2e"])
def test_timm_loads_the_exported_folder_and_computes_our_features(
    adapted: Path, file: Path, tmp_path: Path, target: str | int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    root, settings = shutil.copytree(adapted, tmp_path / "copy"), config(file)
    export.run_export(job(root, settings, target=target))
    assert sorted(path.name for path in (root / "export").iterdir()) == ["config.json", "model.safetensors"]
    assert f"local-dir:{(root / 'export').absolute()}" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{root / 'export'}", pretrained=True).eval()
    name = {None: "stage-2", 0: "stage-0", "e2e": "arms/e2e"}[target]
    encoder = build_encoder(settings.model, seed=0).eval()
    encoder.vit.load_state_dict(weights(root, name))
    data = Wanted(settings, RunPaths(root)).data.val
    images = normalize_images(torch.from_numpy(centre_batch(data, range(8), 16)))
    with torch.no_grad():
        ours = encoder.norm(encoder.run(encoder.tokens(images), 0, 4))
        torch.testing.assert_close(model.forward_features(images), ours, rtol=0, atol=1e-5)
        pooled = torch.from_numpy(pooled_features(encoder, data.only(range(8)), 8, 16, "cpu", "float32"))
        torch.testing.assert_close(model(images), pooled, rtol=0, atol=1e-5)
    again = build_encoder(settings.model, seed=1)
    assert load_weights(again, str(root / "export" / "model.safetensors")) == []
    assert same(again.vit.state_dict(), weights(root, name))


def test_the_exported_folder_takes_a_new_head_and_says_how_images_come_in(
    adapted: Path, file: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(adapted, tmp_path / "copy")
    (root / "export").mkdir()
    (root / "export" / "old").touch()
    export.run_export(job(root, config(file)))
    assert not (root / "export" / "old").exists()
    model = timm.create_model(f"local-dir:{root / 'export'}", pretrained=True, num_classes=10).eval()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    assert torch.equal(model.blocks[2].mlp.fc1.weight, weights(root, "stage-2")["blocks.2.mlp.fc1.weight"])
    found = timm.data.resolve_data_config({}, model=model)
    assert (found["input_size"], found["crop_pct"], found["interpolation"]) == ((3, 16, 16), 0.875, "bicubic")
    card = json.loads((root / "export" / "config.json").read_text())
    assert card["architecture"] == "vit_tiny_patch16_224" and card["num_features"] == 32
    assert "stage 2" in card["pretrained_cfg"]["description"] and card["pretrained_cfg"]["license"] is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny", {}),
        ("vit_tiny", {"model.class_token": True, "model.registers": 3}),
        ("vit_base_patch16_clip_224", {"model.class_token": True}),
        ("deit3_small_patch16_224", {"model.class_token": True}),
        ("vit_medium_patch16_reg4_gap_256", {}),
        ("test_vit3", {}),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_every_kind_of_model_comes_back_from_its_folder(tmp_path: Path, name: str, changes: dict[str, object]) -> None:
    settings = toy(**{"model.name": name} | changes).model
    encoder = build_encoder(settings, seed=3).eval()
    for _, value in encoder.vit.named_parameters():
        torch.nn.init.normal_(value, std=0.2)
    paths = RunPaths(tmp_path).stage(0)
    paths.root.mkdir()
    save_file(encoder.vit.state_dict(), paths.model)
    export.write_export(tmp_path / "export", settings, paths, "a test")
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        ours = encoder.norm(encoder.run(encoder.tokens(images), 0, 4))
        torch.testing.assert_close(model.forward_features(images), ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(images), encoder.patches(ours).mean(dim=1), rtol=0, atol=1e-5)


def test_what_is_not_trained_as_asked_is_not_exported(adapted: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage 0 is missing \(.*\); run `make stage-0` first"):
        export.run_export(job(tmp_path / "toy", config(file)))
    root = shutil.copytree(adapted, tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"stage 2 is stale \(train.lr: .*\); run `make stage-2` first"):
        export.run_export(job(root, config(file, **{"train.lr": 1e-2}), target=2))
    with pytest.raises(ConfigError, match=r"arm freeze is stale .*run `make freeze` first"):
        export.run_export(job(root, config(file, **{"train.lr": 1e-2}), target="freeze"))
    assert not (root / "export").exists()
