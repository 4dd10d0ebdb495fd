"""FreezeOut against values worked out by hand, and plans of stages from either kind of schedule."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stages.config import ScheduleConfig, TrainConfig
from stages.flops import Event
from stages.schedule import FreezeOut, ScheduleError, StagePlan, plan_stages
from stages.segment import Segment, as_end_to_end, parts_of, segments_of

# t0 = .8 over 12 layers: layer 0 at .8, layer 3 at .85, layer 6 at .9, layer 9 at .95, layer 12 at 1.
RATIOS = {
    "linear": {0: 0.8, 3: 0.85, 6: 0.9, 9: 0.95, 12: 1.0},
    "squared": {0: 0.64, 3: 0.7225, 6: 0.81, 9: 0.9025, 12: 1.0},
    "cubic": {0: 0.512, 3: 0.614125, 6: 0.729, 9: 0.857375, 12: 1.0},
}


# --- FreezeOut --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", RATIOS)
def test_ratios_and_freeze_steps(scale) -> None:
    rule = FreezeOut(num_layers=12, total_steps=1000, t0=0.8, scale=scale)
    for layer, ratio in RATIOS[scale].items():
        assert rule.lr_ratio(layer) == pytest.approx(ratio, abs=1e-12)
        assert rule.freeze_step(layer) == pytest.approx(1000 * ratio, abs=1e-9)


def test_the_defaults_are_the_contracts() -> None:
    rule = FreezeOut(num_layers=12, total_steps=100)
    assert (rule.t0, rule.scale, rule.scale_lr, rule.base_lr) == (0.8, "cubic", True, 0.1)


@pytest.mark.parametrize(
    ("scale_lr", "start", "third", "half"),
    [(True, 0.125, 0.09375, 0.0625), (False, 0.1, 0.075, 0.05)],
)
def test_rates_fall_by_a_cosine_to_the_freeze_step(scale_lr, start, third, half) -> None:
    """Layer 0 of 300 linear steps learns for 240: cos(pi/3) = 1/2 at step 80, cos(pi/2) = 0 at step 120."""
    rule = FreezeOut(num_layers=4, total_steps=300, t0=0.8, scale="linear", scale_lr=scale_lr, base_lr=0.1)
    assert rule.lr(0, 0) == pytest.approx(start)
    assert rule.lr(0, 80) == pytest.approx(third)
    assert rule.lr(0, 120) == pytest.approx(half)
    assert rule.lr(0, 240) == rule.lr(0, 241) == rule.lr(0, 10**6) == 0.0


@pytest.mark.parametrize("scale", RATIOS)
@pytest.mark.parametrize("scale_lr", [True, False])
def test_every_layer_learns_until_its_freeze_step_and_not_after(scale, scale_lr) -> None:
    rule = FreezeOut(num_layers=12, total_steps=1000, scale=scale, scale_lr=scale_lr)
    for layer, ratio in RATIOS[scale].items():
        learning = [step for step in range(1100) if rule.lr(layer, step) > 0]
        assert learning == list(range(math.ceil(1000 * ratio - 1e-9))), "the cosine is 0 at the freeze step itself"


def test_scaled_rates_let_every_layer_travel_as_far() -> None:
    rule = FreezeOut(num_layers=12, total_steps=10_000)
    distances = [sum(rule.lr(layer, step) for step in range(10_000)) for layer in (0, 6, 12)]
    assert distances == pytest.approx([500.0] * 3, rel=1e-3)  # half of .1 x 10,000
    plain = FreezeOut(num_layers=12, total_steps=10_000, scale_lr=False)
    assert sum(plain.lr(0, step) for step in range(10_000)) == pytest.approx(256.0, rel=1e-3)


def test_a_layer_that_never_learns_has_rate_zero() -> None:
    assert FreezeOut(num_layers=12, total_steps=100, t0=0.0).lr(0, 0) == 0.0


# --- plans ------------------------------------------------------------------------------------------------------------


def test_an_explicit_plan() -> None:
    plan = plan_stages(ScheduleConfig(cuts=(0, 3, 6), epochs=(5, 1, 2)), 12, steps_per_epoch=31)
    assert plan == (StagePlan(0, 0, 5, 0), StagePlan(1, 3, 1, 5), StagePlan(2, 6, 2, 6))


def freezeout(**changes: object) -> ScheduleConfig:
    return ScheduleConfig(**({"kind": "freezeout", "cuts": (0, 3, 6, 9), "epochs": (20,)} | changes))


def test_freezeout_stages_begin_at_the_first_wholly_frozen_epoch() -> None:
    """Cubic, 20 epochs of 100 steps: layers 3, 6, 9 freeze at steps 1228.25, 1458 and 1714.75."""
    plan = plan_stages(freezeout(), 12, 100)
    assert [(stage.cut, stage.first_epoch, stage.epochs) for stage in plan] == [
        (0, 0, 13),
        (3, 13, 2),
        (6, 15, 3),
        (9, 18, 2),
    ]


def test_freezeout_counts_real_steps_of_an_epoch() -> None:
    """What a layer's share of the run is in epochs does not depend on the epoch's steps, but for warm-up's rounding."""
    boundaries = {
        steps: [stage.first_epoch for stage in plan_stages(freezeout(epochs=(40,)), 12, steps)]
        for steps in (1, 7, 31, 1000)
    }
    assert boundaries[31] == boundaries[1000] == [0, 25, 30, 35]  # 24.565, 29.16, 34.295 of 40
    assert boundaries[7] == [0, 25, 30, 35] and boundaries[1] == [0, 25, 30, 35]


def test_freezeout_starts_after_warmup() -> None:
    """8 of 20 epochs of warm-up: the layers freeze at 8 + 12 x .614125, .729 and .857375 = 15.37, 16.75 and 18.29."""
    plan = plan_stages(freezeout(), 12, 100, warmup_epochs=8)
    assert [stage.first_epoch for stage in plan] == [0, 16, 17, 19]


def test_epochs_of_freezeout_are_summed() -> None:
    assert plan_stages(freezeout(epochs=(5, 5, 5, 5)), 12, 100) == plan_stages(freezeout(), 12, 100)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 31])
@pytest.mark.parametrize("scale", RATIOS)
def test_no_freezeout_stage_freezes_a_layer_that_still_learns(scale, steps_per_epoch) -> None:
    schedule = freezeout(epochs=(60,), scale=scale)
    plan = plan_stages(schedule, 12, steps_per_epoch)
    rule = FreezeOut(12, 60 * steps_per_epoch, 0.8, scale)
    assert sum(stage.epochs for stage in plan) == 60
    for stage in plan[1:]:
        first = stage.first_epoch * steps_per_epoch
        assert all(rule.lr(layer, first) == 0 for layer in range(stage.cut + 1))
        assert first - steps_per_epoch <= rule.freeze_step(stage.cut) < first, "the first such epoch"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ScheduleConfig(cuts=(0, 12), epochs=(1, 1)), r"has 12, but one of the 12 blocks must learn; use 0\.\.11"),
        (freezeout(epochs=(4,)), r"stage with cut 3 no whole epoch of 4; drop it .* schedule\.t0=0\.8"),
    ],
)
def test_what_cannot_be_planned_is_refused(schedule, message) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        plan_stages(schedule, 12, 10)
    assert "\n" not in str(caught.value)


# --- adaptive ---------------------------------------------------------------------------------------------------------


def test_an_adaptive_plan_is_what_stages_took_and_an_open_rest() -> None:
    schedule = ScheduleConfig(kind="adaptive", cuts=(0, 3, 6), epochs=(4, 4, 2))
    assert plan_stages(schedule, 12, 10) == (StagePlan(0, 0, 10, 0),)
    assert plan_stages(schedule, 12, 10, taken=[3]) == (StagePlan(0, 0, 3, 0), StagePlan(1, 3, 7, 3))
    three = (StagePlan(0, 0, 3, 0), StagePlan(1, 3, 2, 3), StagePlan(2, 6, 5, 5))
    assert plan_stages(schedule, 12, 10, taken=[3, 2]) == plan_stages(schedule, 12, 10, taken=[3, 2, 5]) == three


def test_an_adaptive_stage_that_never_settles_leaves_nothing_for_the_next() -> None:
    schedule = ScheduleConfig(kind="adaptive", cuts=(0, 3, 6), epochs=(4, 4, 2))
    assert plan_stages(schedule, 12, 10, taken=[10]) == (StagePlan(0, 0, 10, 0),)
    assert plan_stages(schedule, 12, 10, taken=[4, 6]) == (StagePlan(0, 0, 4, 0), StagePlan(1, 3, 6, 4))
    assert plan_stages(schedule, 12, 10, taken=[30]) == (StagePlan(0, 0, 10, 0),), "records of a longer run"


# --- segments ---------------------------------------------------------------------------------------------------------


def test_a_stage_is_split_where_blocks_freeze_in_place() -> None:
    stage = StagePlan(1, 3, 5, 10, (Event(10, 4), Event(12, 6)))
    (whole,) = segments_of((stage,), 7, TrainConfig())
    whole = replace(whole, first_step=70)
    parts = parts_of(stage, whole)
    assert parts == (
        Segment(4, 10, 2, 70, 14, 7, in_place=1, ends_stage=False),
        Segment(6, 12, 3, 84, 21, 7, in_place=3, ends_stage=True),
    )
    assert [part.entry for part in parts] == [3, 3] and whole.entry == 3
    assert [part.epoch(0) for part in parts] == [10, 12]
    assert sum(part.steps for part in parts) == whole.steps == 35
    assert [segment.cut for segment in as_end_to_end(parts)] == [0, 0]
    assert all(segment.entry == 0 and segment.in_place == 0 for segment in as_end_to_end(parts))


def test_max_steps_cuts_the_parts_of_a_stage_short() -> None:
    stage = StagePlan(0, 0, 5, 0, (Event(2, 1), Event(4, 2)))
    for bound, want in [(10, [(0, 10)]), (14, [(0, 14)]), (20, [(0, 14), (1, 6)]), (35, [(0, 14), (1, 14), (2, 7)])]:
        (whole,) = segments_of((stage,), 7, TrainConfig(max_steps=bound))
        parts = parts_of(stage, whole)
        assert [(part.cut, part.steps) for part in parts] == want
        assert [part.ends_stage for part in parts] == [False] * (len(want) - 1) + [True]


def test_a_stage_without_freeze_events_is_one_part() -> None:
    stage = StagePlan(2, 6, 2, 6)
    (whole,) = segments_of((stage,), 7, TrainConfig())
    assert parts_of(stage, whole) == (whole,)


def test_modules_that_only_decide_do_not_load_torch() -> None:
    code = "import sys, stages.segment, stages.schedule, stages.images, stages.views; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=120
    )
    assert shown.stdout == "False\n"
