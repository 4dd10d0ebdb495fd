"""How fast an arm's step is: that of the code which the arm ran, compiled or not, and without its start-up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import rates
from pipeline.decide import Wanted
from pipeline.layout import RunPaths
from stages import compiling
from tests.pipeline.toy import toy

ARMS = ("e2e", "freeze", "cached", "memory")
IN_PLACE = {
    "schedule.kind": "freezeout",
    "schedule.t0": 0.3,
    "schedule.scale": "linear",
    "schedule.cuts": [0, 1],
    "schedule.epochs": [6],
    "train.warmup_epochs": 0.0,
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cuts of the models that are compiled, which is left out; there is a compiler, and 12 steps are worth it."""
    found: list[int] = []
    monkeypatch.setattr(compiling, "LONG", 12)
    monkeypatch.setattr(compiling, "compiler", lambda: "c++")
    monkeypatch.setattr(rates, "compile_learner", lambda model: found.append(model.cut))
    return found


@pytest.mark.parametrize(
    ("how", "stage", "wanted"),
    [("auto", 1, []), ("auto", 2, [0, 3, 3, 3]), ("off", 2, []), ("on", 1, [0, 1, 1, 1])],
)
def test_a_step_is_timed_compiled_where_its_arm_trains_compiled(
    finished: Path, compiled: list[int], how: str, stage: int, wanted: list[int]
) -> None:
    """Stage 1 has 6 steps, stage 2 has 12."""
    for arm in ARMS:
        rates.step_runner(Wanted(toy(**{"train.compile": how}), RunPaths(finished)), stage, arm)
    assert compiled == wanted


def test_where_blocks_freeze_in_place_the_first_part_decides(tmp_path: Path, compiled: list[int]) -> None:
    """Stage 1 has 18 steps; freezing trains them in parts of 6, 6 and 6 between freeze events, end to end in one."""
    course = Wanted(toy(**IN_PLACE), RunPaths(tmp_path))
    assert [part.steps for part in course.parts(1)] == [6, 6, 6] and course.segments[1].steps == 18
    for arm in ("e2e", "freeze"):
        rates.step_runner(course, 1, arm)
    assert compiled == [0]


def test_the_start_up_of_compiled_code_is_not_counted(
    finished: Path, compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four seconds at the first step would leave 4 images/s of batches of 16."""
    starts: list[float] = []

    def slow_once(model: Any) -> None:
        def begin(*_: Any) -> None:
            hook.remove()
            time.sleep(4)
            starts.append(time.perf_counter())

        hook = model.register_forward_pre_hook(begin)

    monkeypatch.setattr(rates, "compile_learner", slow_once)
    run = rates.step_runner(Wanted(toy(**{"train.compile": "on"}), RunPaths(finished)), 2, "memory")
    assert run(0.02).images_per_second > 8 and len(starts) == 1
