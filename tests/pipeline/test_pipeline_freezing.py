"""Whole runs whose blocks freeze by themselves: FreezeOut with blocks frozen in place, caches chosen by cost, adaptive
stages; what their plans say, and that the arms follow them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import costs, equivalence, explain, runner, speedup, status
from pipeline.checks import check
from pipeline.comparable import frozen_for_all
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, judge_all, judge_stage
from pipeline.freezing import event_costs
from pipeline.job import Interrupted
from pipeline.layout import RunPaths
from pipeline.work import rates
from stages.checkpoint import read_state
from stages.flops import run_flops
from tests.pipeline.toy import StopAfter, job, record, same, toy, weights

STATE = "last/state.safetensors"


def freezeout(**changes: object) -> PipelineConfig:
    """36 steps, 6 an epoch. Linear from .3 over 4 blocks: layers 0 to 4 learn for .3, .475, .65, .825 and 1 of them, so
    blocks 0, 1, 2 are frozen from epoch 3, 4, 5 on."""
    settings: dict[str, object] = {
        "schedule.kind": "freezeout",
        "schedule.t0": 0.3,
        "schedule.scale": "linear",
        "schedule.epochs": [6],
        "schedule.cuts": [0, 1],
        "train.warmup_epochs": 0.0,
    }
    return toy(**(settings | changes))


def wanted(root: Path, config: PipelineConfig) -> Wanted:
    return Wanted(config, RunPaths(root))


def lines(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


# --- FreezeOut --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("freezeout") / "toy"
    runner.run_all(job(root, freezeout()))
    return root


def test_blocks_between_the_given_cuts_freeze_in_place(frozen: Path) -> None:
    stages, arm = [record(frozen, f"stage-{k}") for k in (0, 1)], record(frozen, "arms/freeze")
    assert [part["cut"] for part in stages[0]["segments"]] == [0]
    assert json.loads((frozen / "speedup.json").read_text())["frozen_for_all"] == ""
    assert [(part["cut"], part["epochs"]) for part in stages[1]["segments"]] == [(1, 1), (2, 1), (3, 1)]
    assert [part["cut"] for part in arm["segments"]] == [1, 2, 3], "the freeze arm freezes exactly when the stages do"
    assert [part["cut"] for part in record(frozen, "arms/e2e")["segments"]] == [0]
    assert [folder.name[:6] for folder in (frozen / "cache").glob("cut-*")] == ["cut-1-"], "one cache for three cuts"
    assert [point["epoch"] for point in stages[1]["curve"]] == [6]
    for name in ("stage-1", "arms/freeze"):
        state = read_state(frozen / name / STATE)[2]
        learning = {key.split("/")[1] for key in state if key.startswith("optim/")}
        assert not [key for key in learning if key.startswith(tuple(f"encoder.vit.blocks.{i}." for i in range(3)))]
        assert [key for key in learning if key.startswith("encoder.vit.blocks.3.")]


def test_the_end_to_end_arm_never_falls_to_rate_zero(frozen: Path) -> None:
    course = wanted(frozen, freezeout())
    e2e, stages = rates(course, freezes=False), rates(course)
    assert not e2e.by_layer and stages.by_layer
    for layer in range(5):
        assert e2e.of_layer(layer, 35) == e2e.of_layer(-1, 35) > 0
    assert stages.of_layer(3, 35) == 0
    before, after = weights(frozen, "stage-0"), weights(frozen, "arms/e2e")
    assert all(not same(before, after, part) for part in ("patch_embed.", *(f"blocks.{block}." for block in range(4))))
    told = [event["lr"] for event in lines(frozen) if event.get("arm") == "e2e" and "lr" in event]
    assert len(told) >= 2 and min(told) > 0


def test_a_stage_of_parts_stops_and_goes_on_to_the_same_bits(frozen: Path, tmp_path: Path) -> None:
    for asked in (26, 31, 38):
        root = tmp_path / f"at-{asked}"
        with pytest.raises(Interrupted, match="stage 1"):
            runner.run_stage(job(root, freezeout(), target=1, stop=StopAfter(asked)))
        runner.run_stage(job(root, freezeout(), target=1))
        assert same(weights(frozen, "stage-1"), weights(root, "stage-1"))
        assert record(root, "stage-1")["final_loss"] == record(frozen, "stage-1")["final_loss"]


def test_plan_shows_the_freeze_events_and_what_the_other_choice_costs(
    frozen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs.show_plan(job(frozen, freezeout()))
    plan = json.loads((frozen / "plan.json").read_text())
    events = plan["freeze_events"]
    assert [(event["epoch"], event["cut"], event["cached"]) for event in events] == [
        (3, 1, True),
        (4, 2, False),
        (5, 3, False),
    ]
    course = wanted(frozen, freezeout())
    work, marks = course.work, [found for found in course.plan[1].freezes]
    assert events[0]["cache_flops"] == work.encode(0, 1) and events[1]["cache_flops"] == work.encode(1, 2)
    assert events[2]["training_flops"] == 96 * work.step(1, 3)
    first = replace(marks[0], epoch=3, cut=1)
    total = run_flops(work, [first, *marks], [first], 6)
    assert events[1]["otherwise"] == pytest.approx(run_flops(work, [first, *marks], [first, marks[0]], 6) / total)
    out = capsys.readouterr().out
    assert "in place" in out and "cached" in out and "the other way" in out


def test_equivalence_and_comparison_hold_for_a_stage_of_parts(frozen: Path) -> None:
    assert equivalence.compare_stage(wanted(frozen, freezeout()), 1).loss_difference < 1e-4
    found = json.loads((frozen / "speedup.json").read_text())
    assert {arm["images"] for arm in found["arms"].values()} == {6 * 96}


def test_caches_are_chosen_by_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two views over three epochs are dear: no cache pays. One view over long stages is cheap."""
    root = tmp_path / "toy"
    dear, cheap = (
        freezeout(**{"schedule.caches": "cost", "schedule.epochs": epochs, "cache.views": views})
        for epochs, views in (([6], 2), ([60], 1))
    )
    assert [stage.cut for stage in wanted(root, dear).plan] == [0]
    assert [event.cut for event in wanted(root, dear).plan[0].freezes] == [1, 2, 3]
    plan = wanted(root, cheap).plan
    assert len(plan) > 1 and sum(stage.epochs for stage in plan) == 60
    assert all(event.otherwise >= 1 for event in event_costs(wanted(root, cheap))), "no other choice is cheaper"
    assert any(event.otherwise < 1 for event in event_costs(wanted(root, freezeout())))
    runner.run_all(job(root, dear))
    assert "no freeze event deserves a cache (schedule.caches=cost), so that blocks" in capsys.readouterr().out
    assert [part["cut"] for part in record(root, "stage-0")["segments"]] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"no stage 1 here; the plan has 0-0 \(cuts \[0\]\)"):
        runner.run_stage(job(root, dear, target=1))
    assert judge_stage(wanted(root, dear), 0).current
    changed = judge_stage(wanted(root, cheap), 0)
    assert changed.state == "stale" and "schedule.stage" in changed.reason


def test_shared_rates_change_what_freezes_in_no_stage(frozen: Path) -> None:
    shared = wanted(frozen, freezeout(**{"schedule.layer_rates": "shared"}))
    assert shared.plan == wanted(frozen, freezeout()).plan
    verdict = judge_stage(shared, 0)
    assert verdict.reason == "schedule.layer_rates: cosine -> shared"
    assert judge_all(shared)[-2].reason != judge_all(wanted(frozen, freezeout()))[-2].reason


def test_an_embedding_that_does_not_freeze_leaves_nothing_to_freeze_in_place(tmp_path: Path) -> None:
    config = freezeout(**{"schedule.freeze_embed": False, "schedule.cuts": [0]})
    assert wanted(tmp_path, config).parts(0) == wanted(tmp_path, config).segments
    assert rates(wanted(tmp_path, config)).of_layer(2, 35) == 0 < rates(wanted(tmp_path, config)).of_layer(0, 35)


def test_features_stay_those_of_the_cache_while_blocks_freeze_in_place(tmp_path: Path) -> None:
    config = freezeout(**{"target.kind": "features", "mask.groups": 1, "eval.train_limit": 20, "eval.val_limit": 20})
    runner.run_all(job(tmp_path / "toy", config))
    assert [part["cut"] for part in record(tmp_path / "toy", "stage-1")["segments"]] == [1, 2, 3]
    arms = json.loads((tmp_path / "toy" / "speedup.json").read_text())["arms"]
    assert arms["freeze"]["images"] == arms["cached"]["images"] == 6 * 96


def test_heads_of_blocks_frozen_in_stage_0_are_back_in_the_end_to_end_arm(tmp_path: Path) -> None:
    config = freezeout(**{"heads.blocks": [1, 4], "schedule.cuts": [0, 2], "eval.train_limit": 20})
    assert [part.cut for part in wanted(tmp_path / "toy", config).parts(0)] == [0, 1], "block 0 freezes in stage 0"
    runner.run_arm(job(tmp_path / "toy", config, target="e2e"))
    names = {key for event in lines(tmp_path / "toy") if event.get("arm") == "e2e" for key in event}
    assert {"loss_block1_pixels", "loss_block4_pixels"} <= names
    assert "(at its end 1 of them): e2e trains end to end in later stages only" in frozen_for_all(
        record(tmp_path / "toy", "stage-0")
    )
    assert not [key for key in read_state(tmp_path / "toy" / "stage-0" / STATE)[2] if key.startswith("decoder/block1.")]


# --- adaptive ---------------------------------------------------------------------------------------------------------


def adaptive(**changes: object) -> PipelineConfig:
    settings = {
        "schedule.kind": "adaptive",
        "schedule.epochs": [6],
        "schedule.probe_images": 8,
        "schedule.settle_below": 1e6,
        "schedule.settle_checks": 1,
    }
    return toy(**(settings | changes))


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything settles at once: stages of 1, 1 and the 4 epochs that are left."""
    root = tmp_path_factory.mktemp("adaptive") / "toy"
    runner.run_all(job(root, adaptive()))
    return root


def test_stages_end_when_the_blocks_before_the_next_cut_have_settled(settled: Path) -> None:
    stages = [record(settled, f"stage-{k}") for k in range(3)]
    assert [(stage["cut"], stage["epochs"], stage["steps"]) for stage in stages] == [(0, 1, 6), (1, 1, 6), (3, 4, 24)]
    assert [stage["ended"]["epoch"] if stage["ended"] else None for stage in stages] == [1, 2, None]
    assert stages[1]["ended"]["why"].startswith("blocks before 3 settled: change ")
    told = [event for event in lines(settled) if "settle_measure" in event]
    assert [(event["stage"], event["epoch"], event["before_cut"]) for event in told] == [(0, 1, 1), (1, 2, 3)]
    assert [event["settle_measure"] for event in told] == [s["checks"][0]["settle_measure"] for s in stages[:2]]
    for arm, cuts in (("e2e", [0, 0]), ("freeze", [1, 3])):
        found = record(settled, f"arms/{arm}")
        assert [(part["cut"], part["epochs"]) for part in found["segments"]] == list(zip(cuts, (1, 4), strict=True))
    arms = json.loads((settled / "speedup.json").read_text())["arms"]
    assert {arm["epochs"] for arm in arms.values()} == {6}


def test_what_is_decided_stays_current_and_is_told(settled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    course = wanted(settled, adaptive())
    assert course.decided and [stage.epochs for stage in course.plan] == [1, 1, 4]
    assert [verdict.what for verdict in judge_all(course) if not verdict.current] == []
    explain.show_explain(job(settled, adaptive()))
    status.show_status(job(settled, adaptive()))
    costs.show_plan(job(settled, adaptive()))
    out = capsys.readouterr().out
    assert out.count("stage 1 (cut 1): decided, 1 epochs; blocks before 3 settled: change") == 3
    assert out.count("stage 2 (cut 3): decided, 4 epochs; all that was left") == 3
    changed = {v.what: v.reason for v in judge_all(wanted(settled, adaptive(**{"schedule.settle_checks": 2})))}
    assert changed["stage 0"] == "schedule.settle_checks: 1 -> 2"


def test_an_adaptive_run_stops_and_goes_on_to_the_same_decisions(settled: Path, tmp_path: Path) -> None:
    for asked in (2, 9, 14, 25):
        root = tmp_path / f"at-{asked}"
        with pytest.raises(Interrupted):
            runner.run_stage(job(root, adaptive(), target=2, stop=StopAfter(asked)))
        runner.run_stage(job(root, adaptive(), target=2))
        for stage in ("stage-0", "stage-1", "stage-2"):
            assert same(weights(settled, stage), weights(root, stage))
            for key in ("epochs", "ended", "final_loss", "knn_top1", "steps"):
                assert record(root, stage)[key] == record(settled, stage)[key], key
        assert record(root, "stage-1")["checks"] == record(settled, "stage-1")["checks"]


def test_what_is_open_is_told_and_the_arms_wait_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, config = tmp_path / "toy", adaptive(**{"eval.train_limit": 20, "eval.val_limit": 20})
    with pytest.raises(ConfigError, match=r"arm e2e follows the plan, .* stage 0 is not done; run `make all`"):
        runner.run_arm(job(root, config, target="e2e"))
    runner.run_stage(job(root, config, target=0))
    assert "stage 0: ended at epoch 1, blocks before 1 settled: change" in capsys.readouterr().out
    course = wanted(root, config)
    assert not course.decided and [stage.epochs for stage in course.plan] == [1, 5]
    with pytest.raises(ConfigError, match="stage 1 is not done"):
        runner.run_arm(job(root, config, target="freeze"))
    verdicts = {verdict.what: (verdict.state, verdict.reason) for verdict in judge_all(course)}
    assert verdicts["stage 0"][0] == "current" and verdicts["stage 1"][0] == verdicts["cache 1"][0] == "missing"
    assert verdicts["stage 2"] == ("missing", "open: it begins when stage 1 ends, if that leaves any of the 6 epochs")
    assert verdicts["arm freeze"] == ("missing", "open: it follows the plan, and stage 1 is not done")
    capsys.readouterr()
    explain.show_explain(job(root, config))
    out = capsys.readouterr().out
    assert "stage 0 (cut 0): decided, 1 epochs; blocks before 1 settled" in out
    assert "stage 1 (cut 1): open, up to 5 epochs, until the blocks before 3 have settled" in out
    assert "stage 2 (cut 3): open\n" in out


def test_a_run_in_which_nothing_settles_is_one_stage_and_ends_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, config = tmp_path / "toy", adaptive(**{"schedule.settle_below": 1e-9, "schedule.epochs": [3]})
    runner.run_all(job(root, config))
    out = capsys.readouterr().out
    assert "stage 1: does not exist, the stages before it took all 3 epochs" in out
    assert "nothing settled in the 3 epochs of the run, and nothing froze: there are no arms to compare" in out
    found = record(root, "stage-0")
    assert (found["epochs"], found["ended"], len(found["checks"])) == (3, None, 3)
    assert [verdict.what for verdict in judge_all(wanted(root, config))] == ["stage 0"]
    with pytest.raises(ConfigError, match=r"stage 1 does not exist: .* raise that or schedule.settle_below"):
        runner.run_stage(job(root, config, target=1))
    with pytest.raises(ConfigError, match="nothing froze, so arm e2e is stage 0"):
        runner.run_arm(job(root, config, target="e2e"))
    with pytest.raises(ConfigError, match="no arms to compare"):
        speedup.run_speedup(job(root, config))
    capsys.readouterr()
    costs.show_plan(job(root, config))
    explain.show_explain(job(root, config))
    assert capsys.readouterr().out.count("stage 2 (cut 3): does not exist, the stages before it took all 3 epochs") == 2


def test_a_stage_asked_for_that_turns_out_not_to_exist(tmp_path: Path) -> None:
    config = adaptive(**{"schedule.settle_below": 1e-9, "schedule.epochs": [1], "eval.train_limit": 20})
    with pytest.raises(ConfigError, match="stage 2 does not exist"):
        runner.run_stage(job(tmp_path / "toy", config, target=2))
    assert record(tmp_path / "toy", "stage-0")["status"] == "done"


@pytest.mark.parametrize("kind", ["features", "teacher"])
def test_a_run_in_which_no_event_deserves_a_cache_does_not_train_another_target_in_silence(
    kind: str, tmp_path: Path
) -> None:
    dear = {"schedule.caches": "cost", "schedule.epochs": [6], "cache.views": 2}
    assert len(wanted(tmp_path, freezeout(**dear)).plan) == 1
    with pytest.raises(ConfigError, match=f"there is one stage only, which cannot predict {kind}; use schedule"):
        runner.run_all(job(tmp_path / "toy", freezeout(**dear, **{"target.kind": kind})))
    assert not (tmp_path / "toy" / "stage-0").exists()
    with pytest.raises(ConfigError, match=r"schedule\.caches = cost does not count; use schedule\.caches=given"):
        check(freezeout(**dear, **{"cache.refresh": 1}))
