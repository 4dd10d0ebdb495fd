"""Learning rates, early ends and kept encoders in whole runs: what is written, what makes a stage stale, what is
refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from models.vit import frozen_hash
from pipeline import runner
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, judge_all, judge_arm, judge_stage
from pipeline.job import Interrupted
from pipeline.layout import RunPaths
from pipeline.work import rates
from stages.checkpoint import CheckpointError, read_state
from stages.index import indexed
from tests.pipeline.toy import StopAfter, job, record, same, toy, weights

STATE = "last/state.safetensors"


def wanted(root: Path, config: PipelineConfig) -> Wanted:
    return Wanted(config, RunPaths(root))


def lines(root: Path, **tag: object) -> list[dict]:
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    return [event for event in events if all(event.get(key) == value for key, value in tag.items())]


# --- schedule-free ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("free") / "toy"
    runner.run_all(job(root, toy(**{"train.lr_schedule": "schedule_free"})))
    return root


def test_the_averaged_weights_are_cached_exported_and_gone_on_from(free: Path) -> None:
    for stage in range(3):
        found, state = weights(free, f"stage-{stage}"), read_state(free / f"stage-{stage}" / STATE)[2]
        assert all(torch.equal(value, state[f"encoder/{name}"]) for name, value in found.items())
        z = state["optim/encoder.vit.blocks.3.mlp.fc1.weight/z"]
        assert not torch.equal(found["blocks.3.mlp.fc1.weight"], z), "neither the point z nor y, but the average"
    frozen = record(free, "stage-0")["frozen_weights"]["1"]
    assert frozen == frozen_hash(weights(free, "stage-1"), 1), "what is frozen is what was cached"
    spec = wanted(free, toy(**{"train.lr_schedule": "schedule_free"})).cache_spec(1)
    assert spec is not None and spec.weights == frozen


def test_moments_and_average_go_on_across_stages(free: Path) -> None:
    for name, steps in (("stage-0", 6), ("stage-1", 12), ("stage-2", 24), ("arms/e2e", 24), ("arms/freeze", 24)):
        state = read_state(free / name / STATE)[2]
        k, weight_sum, largest, training = state["optim/encoder.vit.blocks.3.mlp.fc1.weight/scalars"].tolist()
        assert (k, largest, training) == (steps, 1e-3, 0.0), name
        warmup = sum((1e-3 * step / 3) ** 2 for step in (1, 2))
        assert weight_sum == pytest.approx(warmup + (steps - 2) * 1e-6)
    final = read_state(free / "stage-2" / STATE)[2]
    assert not [key for key in final if key.startswith("optim/encoder.vit.blocks.2.")]


@pytest.mark.parametrize("asked", [3, 14, 21])
def test_schedule_free_stops_and_goes_on_to_the_same_bits(free: Path, tmp_path: Path, asked: int) -> None:
    root, config = tmp_path / "toy", toy(**{"train.lr_schedule": "schedule_free"})
    with pytest.raises(Interrupted):
        runner.run_stage(job(root, config, target=2, stop=StopAfter(asked)))
    runner.run_stage(job(root, config, target=2))
    for stage in ("stage-0", "stage-1", "stage-2"):
        assert same(weights(free, stage), weights(root, stage))
        assert record(free, stage)["knn_top1"] == record(root, stage)["knn_top1"]


# --- schedules --------------------------------------------------------------------------------------------------------


def test_a_restart_begins_every_stage_anew_whatever_follows_it(finished: Path, tmp_path: Path) -> None:
    """6 steps an epoch, 3 of warm-up: every stage begins at a third of the peak."""
    config = toy(**{"train.lr_restart": True, "train.lr_schedule": "wsd"})
    runner.run_stage(job(tmp_path / "toy", config, target=2))
    course = wanted(tmp_path / "toy", config)
    for stage, segment in enumerate(course.segments):
        told = [event["lr"] for event in lines(tmp_path / "toy", stage=stage) if "lr" in event]
        assert rates(course).of_layer(-1, segment.first_step) == pytest.approx(1e-3 / 3)
        assert told[-1] == rates(course).of_layer(-1, segment.first_step + segment.steps - 1) < 1e-3
    longer = toy(**{"train.lr_restart": True, "train.lr_schedule": "wsd", "schedule.epochs": [1, 1, 3]})
    assert judge_stage(wanted(tmp_path / "toy", longer), 1).current, "its rates do not depend on what follows"
    assert judge_stage(wanted(finished, toy(**{"schedule.epochs": [1, 1, 3]})), 0).state == "stale", "a cosine's do"


def test_only_settings_that_act_make_a_stage_stale(finished: Path) -> None:
    def verdict(**changes: object) -> str:
        return judge_stage(wanted(finished, toy(**changes)), 0).reason

    assert judge_stage(wanted(finished, toy(**{"train.decay_share": 0.5, "schedule.settle_below": 3.0})), 0).current
    assert judge_stage(wanted(finished, toy(**{"schedule.layer_rates": "shared", "eval.knn_k": 3})), 0).current
    both = "train.decay_share: (none) -> 0.2, train.lr_schedule: cosine -> wsd"
    assert verdict(**{"train.lr_schedule": "wsd"}) == both
    assert "train.lr_restart: False -> True" in verdict(**{"train.lr_restart": True})
    early = verdict(**{"train.early_stop": 2, "eval.every": 1})
    assert "train.early_stop: 0 -> 2" in early and "eval.knn_k: (none) -> 20" in early and "data.val: (none)" in early


def test_the_end_to_end_arm_does_not_depend_on_freezeouts_settings(finished: Path) -> None:
    def inputs(arm: str) -> set[str]:
        return set(wanted(finished, toy(**{"schedule.kind": "freezeout", "schedule.epochs": [40]})).arm_inputs(arm))

    assert inputs("freeze") - inputs("e2e") == {
        f"schedule.{name}" for name in ("kind", "t0", "scale", "scale_lr", "layer_rates", "freeze_embed")
    }


# --- early ends -------------------------------------------------------------------------------------------------------


def early(**changes: object) -> PipelineConfig:
    """A rate so small that kNN, over 40 images, cannot rise for long."""
    settings = {"train.early_stop": 1, "eval.every": 1, "train.lr": 1e-9, "train.min_lr": 0.0}
    settings |= {"schedule.epochs": [4, 4, 4]}
    return toy(**(settings | changes))


def test_a_stage_ends_early_and_later_stages_keep_their_place(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    runner.run_all(job(root, early()))
    for stage, first in enumerate((0, 4, 8)):
        found = record(root, f"stage-{stage}")
        assert found["ended"]["why"].startswith("kNN no better than") and found["ended"]["epoch"] == first + 2
        assert (found["epochs"], found["steps"]) == (2, 12)
        assert [point["epoch"] for point in found["curve"]] == [first + 1, first + 2]
    course = wanted(root, early())
    assert [segment.first_step for segment in course.segments] == [0, 24, 48]
    verdicts = {verdict.what: verdict for verdict in judge_all(course)}
    assert all(verdicts[what].current for what in ("stage 0", "stage 1", "stage 2", "arm e2e", "arm freeze"))
    assert "kNN no better than" in verdicts["stage 1"].reason
    assert record(root, "arms/e2e")["epochs"] == 2 and len(record(root, "arms/e2e")["segments"]) == 1
    told = [event["lr"] for event in lines(root, stage=1) if "lr" in event]
    assert told[-1] == rates(course).of_layer(-1, 24 + 11), "the rate of step 35 of 72"


def test_an_arm_that_ends_early_is_told_by_the_heads_that_it_ended_with(tmp_path: Path) -> None:
    """Not by those of the segment that it would have come to, at cut 3, behind which one head is left."""
    root = tmp_path / "toy"
    runner.run_arm(job(root, early(**{"heads.blocks": [2, 4]}), target="freeze"))
    found = record(root, "arms/freeze")
    assert [part["cut"] for part in found["segments"]] == [1]
    assert list(found["blind_losses"]["heads"]) == ["block2_pixels", "block4_pixels"]


def test_an_early_end_needs_labels(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    index, read = indexed(str(Path(__file__).parents[2] / "data/sample/val-000000.tar"), "stop", None)
    for entry in index.entries[:60]:
        (folder / f"{entry.key}.png").write_bytes(read(entry))  # type: ignore[arg-type]
    config = early(**{"data.source": str(folder), "data.limit": 0})
    with pytest.raises(ConfigError, match=r"train.early_stop = 1 needs kNN, .* no labels; .*early_stop=0"):
        runner.run_stage(job(tmp_path / "toy", config, target=0))
    with pytest.raises(ConfigError, match="no labels"):
        runner.run_arm(job(tmp_path / "toy", config, target="e2e"))
    assert not (tmp_path / "toy" / "stage-0").exists()


# --- kept encoders ----------------------------------------------------------------------------------------------------


def keeping(*epochs: int, **changes: object) -> PipelineConfig:
    """Stages of 1, 1 and 2 epochs."""
    return toy(**({"train.save_epochs": list(epochs), "eval.train_limit": 20, "eval.val_limit": 20} | changes))


def test_encoders_are_kept_beside_stages_and_arms(tmp_path: Path, finished: Path) -> None:
    root = tmp_path / "toy"
    runner.run_all(job(root, keeping(2, 3)))
    files = sorted(str(path.relative_to(root)) for path in root.rglob("epoch-*"))
    assert files == [
        *(f"arms/{arm}/epoch-{epoch}.safetensors" for arm in ("e2e", "freeze") for epoch in (2, 3)),
        "stage-1/epoch-2.safetensors",
        "stage-2/epoch-3.safetensors",
    ]
    assert same(load_file(root / files[4]), weights(root, "stage-1"))
    assert load_file(root / files[5]).keys() == weights(root, "stage-2").keys()
    assert same(weights(finished, "stage-2"), weights(root, "stage-2")), "keeping changes nothing"
    assert not same(load_file(root / files[5]), weights(root, "stage-2"))


def test_an_epoch_asked_for_later_is_copied_or_trained_for_and_never_silently_missing(
    copy: Path,
) -> None:
    before = weights(copy, "stage-2")
    state = (copy / "stage-1" / STATE).stat().st_mtime_ns
    ends = [verdict for verdict in judge_all(wanted(copy, toy(**{"train.save_epochs": [2]}))) if not verdict.current]
    assert [verdict.what for verdict in ends] == ["arm e2e", "arm freeze"], "which go on after it"
    runner.run_stage(job(copy, toy(**{"train.save_epochs": [2]}), target=2))
    assert same(load_file(copy / "stage-1" / "epoch-2.safetensors"), weights(copy, "stage-1"))
    assert (copy / "stage-1" / STATE).stat().st_mtime_ns == state, "a stage's last epoch is the model it ended with"
    later = toy(**{"train.save_epochs": [3]})
    verdict = judge_stage(wanted(copy, later), 2)
    assert verdict.state == "stale" and "epoch-3.safetensors, which was not kept" in verdict.reason
    assert judge_stage(wanted(copy, later), 1).current and judge_arm(wanted(copy, later), "e2e").state == "stale"
    runner.run_stage(job(copy, later, target=2))
    assert (copy / "stage-2" / "epoch-3.safetensors").exists() and same(before, weights(copy, "stage-2"))
    assert judge_stage(wanted(copy, later), 2).current
    assert judge_stage(wanted(copy, toy()), 2).current, "one that is no longer asked for is left alone"


def test_an_interrupted_stage_that_lacks_what_it_kept_says_so_and_goes_on_once_it_is_back(
    finished: Path, tmp_path: Path
) -> None:
    root, config = tmp_path / "toy", keeping(3)
    kept, state = root / "stage-2" / "epoch-3.safetensors", root / "stage-2" / STATE
    with pytest.raises(Interrupted):
        runner.run_stage(job(root, config, target=2, stop=SimpleNamespace(is_set=kept.exists)))
    assert judge_stage(wanted(root, config), 2).reason == f"status running; goes on from {state.parent}"
    saved, away = state.read_bytes(), kept.rename(tmp_path / "away")
    told = f"{kept} is not there, and {state} has passed its epoch; put it back, take 3 from train.save_epochs, or "
    verdict = judge_stage(wanted(root, config), 2)
    assert verdict.state == "unfinished" and told in verdict.reason
    assert judge_stage(wanted(root, toy()), 2).reason.endswith(f"goes on from {state.parent}")
    with pytest.raises(CheckpointError, match=re.escape(told)):
        runner.run_stage(job(root, config, target=2))
    assert state.read_bytes() == saved
    away.rename(kept)
    runner.run_stage(job(root, config, target=2))
    assert same(weights(finished, "stage-2"), weights(root, "stage-2"))


def test_what_was_kept_of_another_training_is_removed(copy: Path) -> None:
    stray = copy / "stage-0" / "epoch-1.safetensors"
    stray.write_bytes(b"of other settings")
    runner.run_stage(job(copy, toy(**{"train.lr": 2e-3}), target=0))
    assert not stray.exists()


def test_epochs_that_are_never_reached_are_told_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.save_epochs has 3, an epoch that train.max_steps = 4 leaves unf"):
        # three stages of 4 steps, 6 an epoch: 2 epochs in all
        runner.run_stage(job(tmp_path / "short", keeping(2, 3, **{"train.max_steps": 4}), target=0))
    root, config = tmp_path / "toy", early(**{"train.save_epochs": [1, 3]})
    runner.run_stage(job(root, config, target=0))
    verdict = judge_stage(wanted(root, config), 0)
    assert verdict.current and verdict.reason.endswith("ended before epoch 3 of train.save_epochs")
    assert (root / "stage-0" / "epoch-1.safetensors").exists()
