"""Fine-tuning end to end at toy size: from images and from the cache behind frozen blocks, stopped and gone on with,
judged by what it was asked to do, told by every command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cache import open_cache
from models.targets import normalize_images
from pipeline import care, disk, equivalence, explain, runner, speedup, status
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, judge_all, judge_finetune
from pipeline.events import probe_line
from pipeline.finetuning import make_classifier
from pipeline.job import Interrupted, RunFailed
from pipeline.layout import RunPaths
from pipeline.tuned import Tuning, last_tuning
from pipeline.work import file_checksum
from stages.errors import DataError
from stages.finetune import classify
from tests.pipeline.toy import StopAfter, job, record, same, toy, weights

TUNE = {
    "finetune.epochs": 2,
    "finetune.batch_size": 16,
    "finetune.lr": 3e-3,
    "finetune.warmup_epochs": 0.5,
    "finetune.heads": [3, 4],
    "finetune.views": 2,
}
FROZEN = TUNE | {"finetune.freeze": 2}


def tuned(**changes: object) -> PipelineConfig:
    return toy(**(FROZEN | changes))


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, fine-tuned behind two frozen blocks."""
    root = shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "tuned")
    runner.run_finetune(job(root, tuned()))
    return root


def verdicts(root: Path, config: PipelineConfig) -> dict[str, str]:
    return {v.what: f"{v.state} {v.reason}" for v in judge_all(Wanted(config, RunPaths(root)))}


def test_the_record_is_a_stages_with_the_accuracy_of_every_head(run: Path) -> None:
    found = record(run, "finetune")
    what = ("status", "from", "cut", "steps", "images")
    assert tuple(found[key] for key in what) == ("done", "stage 2", 2, 12, 192)
    assert found["parent"] == record(run, "stage-2")["fingerprint"] and found["cache_seconds"] > 0
    assert [head["after"] for head in found["heads"]] == [3, 4] and found["evaluated"] == 40
    assert (found["top1"], found["top5"]) == (found["heads"][1]["top1"], found["heads"][1]["top5"])
    assert 0 <= found["top1"] <= found["top5"] <= 1 and found["best_head"] in (3, 4)
    assert [point["epoch"] for point in found["curve"]] == [2.0]
    assert found["curve"][0]["top1_block3"] == found["heads"][0]["top1"]
    assert (run / "finetune" / "last" / "state.safetensors").exists()


def test_frozen_blocks_keep_their_bits_the_others_and_the_heads_learn(run: Path) -> None:
    before, after = weights(run, "stage-2"), weights(run, "finetune")
    frozen = ("patch_embed.", "pos_embed", "blocks.0.", "blocks.1.")
    shared = before.keys() & after.keys()
    assert {name for name in shared if torch.equal(before[name], after[name])} == {
        name for name in shared if name.startswith(frozen)
    }
    assert {"head.weight", "fc_norm.weight", "heads.3.linear.weight"} <= after.keys() - before.keys()
    assert after["head.weight"].shape == (10, 32)


def test_the_model_file_is_timms_and_scores_what_the_record_says(run: Path) -> None:
    state = {name: value for name, value in weights(run, "finetune").items() if not name.startswith("heads.")}
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=4,
        num_heads=2,
        num_classes=10,
        class_token=False,
        global_pool="avg",
    ).eval()
    theirs.load_state_dict(state)
    wanted = Wanted(tuned(), RunPaths(run))
    tuning = Tuning(wanted, 2)
    mine = make_classifier(tuning, wanted.paths.stage(2)).eval()
    own = {f"encoder.vit.{name}": value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}
    last = {
        "heads.1.norm.weight": state["fc_norm.weight"],
        "heads.1.norm.bias": state["fc_norm.bias"],
        "heads.1.linear.weight": state["head.weight"],
        "heads.1.linear.bias": state["head.bias"],
    }
    mine.load_state_dict(own | last, strict=False)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        *_, logits = mine.logits(mine.at_cut(normalize_images(images)))
        torch.testing.assert_close(logits, theirs(normalize_images(images)), rtol=1e-4, atol=1e-5)
    found = classify(mine, wanted.data.val, 40, 100, 16, "float32")
    assert found.heads[-1].top1 == record(run, "finetune")["top1"]


def test_the_cache_is_an_ordinary_one_of_all_tokens_of_augmented_views(run: Path) -> None:
    wanted = Wanted(tuned(), RunPaths(run))
    need = Tuning(wanted, 2).need
    spec = wanted.spec(need) if need else None
    assert spec is not None
    assert (spec.cut, spec.groups, spec.mask_ratio, spec.views, spec.pixels) == (2, 1, 0.0, 2, False)
    assert "rand-augment v1 magnitude 9" in spec.view_transform
    cache = open_cache(wanted.cache_folder(spec))
    assert cache.manifest.fingerprint == spec.fingerprint == record(run, "finetune")["cache"]
    batch = cache.read([3])
    assert batch.features_BLD.shape == (1, 16, 32) and batch.ids_BL.tolist() == [list(range(16))]


def test_the_first_step_from_the_cache_has_the_loss_of_the_frozen_blocks_run_live(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = equivalence.compare_finetune(Tuning(Wanted(tuned(), RunPaths(run)), 2))
    assert (found.stage, found.cut) == ("finetune", 2)
    assert 0 < found.loss_difference < 1e-3 and 0 < found.feature_rmse < 1e-3
    equivalence.run_equivalence(job(run, tuned()))
    assert any(line.startswith("finetune") for line in capsys.readouterr().out.splitlines())
    root = shutil.copytree(run, tmp_path / "toy")
    state = weights(root, "stage-2")
    state["blocks.0.attn.qkv.weight"] *= 1.5
    save_file(state, root / "stage-2" / "model.safetensors")
    stage = record(root, "stage-2") | {"weights": file_checksum(root / "stage-2" / "model.safetensors")}
    (root / "stage-2" / "stage.json").write_text(json.dumps(stage))
    with pytest.raises(RunFailed, match="cache finetune is not what the frozen blocks compute"):
        equivalence.run_equivalence(job(root, tuned()))


def test_from_images_everything_learns_and_every_layer_at_its_rate(finished: Path, tmp_path: Path) -> None:
    """With a layer decay of all but nothing, only the heads move in a step; with 1 all layers do."""
    for decay, still in ((1e-12, True), (1.0, False)):
        root = shutil.copytree(finished, tmp_path / str(decay))
        config = toy(**(TUNE | {"finetune.layer_decay": decay, "finetune.max_steps": 2, "finetune.weight_decay": 0.0}))
        runner.run_finetune(job(root, config, target=0))
        found = record(root, "finetune")
        assert (found["from"], found["cut"], found["cache"], found["steps"]) == ("stage 0", 0, None, 2)
        before, after = weights(root, "stage-0"), weights(root, "finetune")
        shared = [name for name in before.keys() & after.keys() if name != "pos_embed"]
        moved = max(float((before[name] - after[name]).abs().max()) for name in shared if name.startswith("blocks.0"))
        assert (moved < 1e-8) == still
        assert float(after["head.weight"].abs().max()) > 1e-3


@pytest.mark.parametrize("settings", [FROZEN, TUNE], ids=["cached", "live"])
@pytest.mark.parametrize("asked", [1, 4, 9])
def test_interrupted_anywhere_ends_with_the_same_bits(
    finished: Path, run: Path, tmp_path: Path, settings: dict[str, object], asked: int
) -> None:
    config = toy(**(settings | {"finetune.accumulate": 2, "finetune.drop_path": 0.3}))
    roots = [shutil.copytree(finished, tmp_path / name) for name in ("straight", "stopped")]
    runner.run_finetune(job(roots[0], config))
    with pytest.raises(Interrupted, match="goes on from there"):
        runner.run_finetune(job(roots[1], config, stop=StopAfter(asked)))
    runner.run_finetune(job(roots[1], config))
    assert same(weights(roots[0], "finetune"), weights(roots[1], "finetune"))
    for key in ("first_loss", "final_loss", "top1", "top5", "heads", "steps", "images"):
        assert record(roots[0], "finetune")[key] == record(roots[1], "finetune")[key], key
    assert not same(weights(run, "finetune"), weights(roots[0], "finetune"), "blocks.3.")


def test_drop_path_mixing_and_augmentation_change_what_they_say(finished: Path, tmp_path: Path) -> None:
    """Each alone against none of them, from the same start and over the same images."""
    plain = {f"finetune.{name}": 0.0 for name in ("drop_path", "mixup", "cutmix", "label_smoothing", "rand_augment")}
    found = {}
    for name, value in (("", 0.0), *((key.partition(".")[2], 0.5) for key in plain)):
        root = shutil.copytree(finished, tmp_path / (name or "plain"))
        value = 9.0 if name == "rand_augment" else value
        changes = plain | ({f"finetune.{name}": value} if name else {})
        runner.run_finetune(job(root, toy(**(TUNE | {"finetune.max_steps": 2} | changes))))
        found[name] = record(root, "finetune")["final_loss"]
    assert len({round(loss, 6) for loss in found.values()}) == 6, found


def test_learning_blocks_drop_paths_in_training_steps_alone(run: Path) -> None:
    """Rates rise linearly; what a step drops is a pure function of the step; frozen blocks and scores drop nothing."""
    wanted = Wanted(tuned(**{"finetune.drop_path": 0.6}), RunPaths(run))
    model = make_classifier(Tuning(wanted, 2), wanted.paths.stage(2)).train()
    blocks = model.encoder.vit.blocks
    with model.dropping(0):
        assert [block.drop_path1.drop_prob for block in blocks] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert not any(block.drop_path1.drop_prob for block in blocks)
    assert [block.drop_path2.training for block in blocks] == [False, False, True, True]
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def features(step: int | None) -> torch.Tensor:
        with torch.no_grad():
            tokens = model.at_cut(normalize_images(images))
            if step is None:
                return model.encoder.run(tokens, 2, 4)
            with model.dropping(step):
                return model.encoder.run(tokens, 2, 4)

    assert torch.equal(features(3), features(3)) and not torch.equal(features(3), features(4))
    with torch.no_grad():
        frozen = model.at_cut(normalize_images(images))
        with model.dropping(3):
            assert torch.equal(frozen, model.at_cut(normalize_images(images)))
    model.eval()
    assert torch.equal(features(None), features(3))


def test_what_no_longer_fits_is_stale_and_not_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = verdicts(run, tuned(**{"finetune.batch_size": 128}))["finetune"]
    assert large.startswith("stale") and "finetune.steps: 12 -> 0" in large
    data = Wanted(tuned(), RunPaths(run)).data
    bare = replace(data.train, entries=tuple(replace(entry, label=-1) for entry in data.train.entries))
    monkeypatch.setattr("pipeline.course.open_data", lambda *_: replace(data, train=bare))
    assert "classes: 10 -> 0" in verdicts(run, tuned())["finetune"]


def test_a_cache_that_a_stage_wants_is_no_older_state_of_another(run: Path) -> None:
    """Cache 2 has cut 3 as well; for a fine-tuning that has none yet, its own is missing, not stale."""
    verdict = verdicts(run, tuned(**{"finetune.freeze": 3}))["cache finetune"]
    assert verdict.startswith("missing")


def test_a_loss_that_is_no_number_names_the_settings_of_fine_tuning(run: Path, tmp_path: Path) -> None:
    root = shutil.copytree(run, tmp_path / "toy")
    wild = {"finetune.lr": 1e30, "finetune.min_lr": 1e30, "finetune.warmup_epochs": 0.0}
    with pytest.raises(RunFailed, match=r"arm finetune: loss=.* lower finetune\.lr=1e\+30 or set finetune\.clip=1"):
        runner.run_finetune(job(root, tuned(**wild)))
    assert record(root, "finetune")["status"] == "failed"
    assert verdicts(root, tuned(**wild))["finetune"].startswith("unfinished")


def test_a_second_call_does_nothing_and_tells_the_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run / "finetune").rglob("*") if path.is_file()}
    runner.run_finetune(job(run, tuned()))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    out = capsys.readouterr().out
    assert "finetune: current" in out and "from stage 2, on 40 evaluation images" in out
    assert f"{record(run, 'finetune')['top1']:.3f}" in out and "best" in out


def test_what_makes_it_stale_is_named_and_what_does_not_leaves_it(run: Path) -> None:
    assert verdicts(run, tuned())["finetune"].startswith("current")
    assert verdicts(run, tuned(**{"finetune.lr": 0.01}))["finetune"] == "stale finetune.lr: 0.003 -> 0.01"
    views = verdicts(run, tuned(**{"finetune.views": 3}))
    assert views["finetune"] == "stale finetune.views: 2 -> 3" and "views=2" in views["cache finetune"]
    weaker = verdicts(run, tuned(**{"finetune.rand_augment": 5.0}))
    assert weaker["finetune"].startswith("stale data.views") and weaker["cache finetune"].startswith("stale")
    assert "steps_per_epoch" in verdicts(run, tuned(**{"finetune.batch_size": 32}))["finetune"]
    idle = {"train.prefetch": 7, "eval.knn_k": 5, "cache.shard_rows": 64, "model.attention": "plain"}
    assert all(state.startswith("current") for state in verdicts(run, tuned(**idle)).values())
    longer = verdicts(run, tuned(**{"train.lr": 0.002}))
    assert longer["finetune"] == "stale stage 2 runs again before it"
    assert verdicts(run, tuned(**{"finetune.lr": 0.01}))["stage 2"].startswith("current"), "pre-training is not touched"


def test_other_weights_in_the_start_make_it_stale(run: Path, tmp_path: Path) -> None:
    root = shutil.copytree(run, tmp_path / "toy")
    stage = record(root, "stage-2")
    (root / "stage-2" / "stage.json").write_text(json.dumps(stage | {"weights": "0" * 64}))
    verdict = judge_finetune(Tuning(Wanted(tuned(), RunPaths(root)), 2))
    assert verdict.state == "stale" and verdict.reason.startswith("encoder weights: ")
    (root / "finetune" / "stage.json").unlink()
    with pytest.raises(ValueError, match="is not the encoder that stage 2 ended with"):
        runner.run_finetune(job(root, tuned()))


def test_an_arm_is_a_start_too_and_another_start_is_another_fine_tuning(run: Path, tmp_path: Path) -> None:
    root = shutil.copytree(run, tmp_path / "toy")
    runner.run_finetune(job(root, tuned(), target="e2e"))
    found = record(root, "finetune")
    assert found["from"] == "arm e2e" and found["parent"] == record(root, "arms/e2e")["fingerprint"]
    tuning = last_tuning(Wanted(tuned(), RunPaths(root)))
    assert tuning is not None and tuning.start == "e2e" and judge_finetune(tuning).current
    assert verdicts(root, tuned())["finetune"].startswith("current")
    stage = judge_finetune(Tuning(Wanted(tuned(), RunPaths(root)), 2))
    assert "encoder: arm e2e -> stage 2" in stage.reason


def test_what_it_needs_runs_first(tmp_path: Path) -> None:
    short = {"schedule.cuts": [0, 1], "schedule.epochs": [1, 1], "train.max_steps": 2, "finetune.max_steps": 1}
    config = tuned(**short)
    runner.run_finetune(job(tmp_path / "toy", config))
    assert record(tmp_path / "toy", "stage-1")["status"] == record(tmp_path / "toy", "finetune")["status"] == "done"
    assert not (tmp_path / "toy" / "arms").exists()


def test_every_command_knows_of_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shutil.copytree(run, tmp_path / "toy")
    status.show_status(job(root, tuned()))
    explain.show_explain(job(root, tuned()))
    out = capsys.readouterr().out
    assert "top-1" in out and out.count("finetune") >= 3 and f"{record(root, 'finetune')['top1']:.3f}" in out
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event.get("arm") == "finetune" and "loss" in event]
    assert steps[-1]["step"] == 12 and {"loss_block3", "loss_block4", "lr"} <= steps[-1].keys()
    assert any(event.get("arm") == "finetune" and "shard" in event for event in events)
    (point,) = [event for event in events if event.get("arm") == "finetune" and event.get("probe")]
    assert f"top-1 {point['top1']:.3f}" in probe_line(point) and "finetune" in probe_line(point)
    speedup.run_speedup(job(root, tuned(**{"finetune.lr": 0.5})))  # a stale fine-tuning keeps no arm from comparing
    wanted = Wanted(tuned(), RunPaths(root))
    need = Tuning(wanted, 2).need
    assert need is not None
    folder = wanted.cache_folder(wanted.spec(need))  # type: ignore[arg-type]
    care.run_gc(job(root, tuned(), yes=True))
    assert folder.exists()
    victim = folder / "data.zarr/view_1/features/c/1/0/0"
    good = victim.read_bytes()
    victim.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(RunFailed, match="1 damaged files"):
        care.run_verify(job(root, tuned()))
    care.run_repair(job(root, tuned()))
    assert victim.read_bytes() == good


def test_images_without_labels_and_batches_that_do_not_fit_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"finetune\.batch_size = 128 does not fit 96 training images"):
        runner.run_finetune(job(tmp_path / "b", tuned(**{"finetune.batch_size": 128})))
    data = Wanted(tuned(), RunPaths(tmp_path / "a")).data
    bare = replace(data.train, entries=tuple(replace(entry, label=-1) for entry in data.train.entries))
    monkeypatch.setattr("pipeline.course.open_data", lambda *_: replace(data, train=bare))
    with pytest.raises(DataError, match="96 of 96 training images have no label"):
        runner.run_finetune(job(tmp_path / "b", tuned()))
    assert not (tmp_path / "b" / "stage-0").exists()


def test_a_cache_that_does_not_fit_the_disk_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda root: 1_000)
    with pytest.raises(ConfigError, match=r"of fine-tuning with finetune.views=9 need .* lower finetune.views"):
        runner.run_finetune(job(run, tuned(**{"finetune.views": 9})))


def test_class_token_models_are_fine_tuned_on_it_and_others_refused(tmp_path: Path, run: Path) -> None:
    config = tuned(
        **{
            "model.class_token": True,
            "finetune.pool": "token",
            "schedule.cuts": [0],
            "schedule.epochs": [1],
            "train.max_steps": 1,
            "finetune.max_steps": 2,
        }
    )
    runner.run_finetune(job(tmp_path / "toy", config))
    state = load_file(tmp_path / "toy" / "finetune" / "model.safetensors")
    assert {"cls_token", "norm.weight", "head.weight"} <= state.keys() and "fc_norm.weight" not in state
    with pytest.raises(ValueError, match=r"finetune\.pool=token needs a class token"):
        runner.run_finetune(job(shutil.copytree(run, tmp_path / "b"), tuned(**{"finetune.pool": "token"})))
    asked = tuned(**{"finetune.pool": "token", "finetune.freeze": 2})
    with pytest.raises(ConfigError, match=r"finetune\.pool=token needs a class token"):
        runner.run_finetune(job(tmp_path / "c", asked))
    assert not (tmp_path / "c" / "stage-0").exists(), "before anything is trained or built"
