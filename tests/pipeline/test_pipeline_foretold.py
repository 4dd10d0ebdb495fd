"""What the plan foretold beside what came of it: `all` plans before it trains, `speedup` compares, a plan of something
else is said to be one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import costs, runner, speedup
from pipeline.decide import Wanted
from pipeline.desk import at_work
from pipeline.foretold import (
    beside,
    foretold,
    foretold_line,
    made_of,
    measured,
    read_plan,
    rows_of,
    why_not,
    with_totals,
)
from pipeline.layout import RunPaths
from pipeline.report import render
from pipeline.story import read_story
from tests.pipeline.toy import job, record, toy

PLAN_FIRST = runner.plan_first
"""As it is; the tests' runs go without."""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose plan was made at its start."""
    root = tmp_path_factory.mktemp("planned") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "plan_first", PLAN_FIRST)
        runner.run_all(job(root))
    return root


def test_all_plans_before_it_trains_and_only_once(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads((planned / "events.jsonl").read_text().splitlines()[0])
    assert (planned / "plan.json").stat().st_mtime < first["time"]
    assert not list(planned.glob(".plan*")), "what was rehearsed is removed"
    made: list[int] = []
    monkeypatch.setattr(runner, "plan_first", PLAN_FIRST)
    monkeypatch.setattr(costs, "make_plan", lambda wanted: made.append(1) or {})
    runner.run_all(job(planned))
    assert not made, "nothing is left to train"
    (planned / "arms" / "freeze" / "stage.json").rename(planned / "arms" / "freeze" / "away.json")
    assert not why_not(Wanted(toy(), RunPaths(planned)), read_plan(Wanted(toy(), RunPaths(planned))))
    with at_work(job(planned)) as desk:
        PLAN_FIRST(desk)
    assert not made, "its plan is there"
    (planned / "arms" / "freeze" / "away.json").rename(planned / "arms" / "freeze" / "stage.json")


def test_every_stage_and_arm_is_compared(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((planned / "speedup.json").read_text())
    plan, predicted = json.loads((planned / "plan.json").read_text()), found["predicted"]
    assert predicted["compared"] and predicted["why"] == ""
    for arm in ("e2e", "freeze", "cached"):
        one = predicted["totals"][arm]
        assert one["predicted"] == plan[f"{arm}_seconds"] and one["measured"] == found["arms"][arm]["total_seconds"]
        assert one["difference"] == pytest.approx(one["predicted"] / one["measured"] - 1)
    assert predicted["break_even_epoch"]["measured"] == found["break_even_epoch"]
    for number, row in enumerate(predicted["stages"]):
        stage = record(planned, f"stage-{number}")
        assert row["cached"]["seconds"]["measured"] == stage["train_seconds"]
        rate = row["cached"]["images_per_second"]
        assert rate["measured"] == pytest.approx(stage["images_per_second"])
        assert rate["predicted"] == pytest.approx(plan["stages"][number]["cached_images_per_second"])
        assert ("cache_seconds" in row) == (number > 0)
    arms = {arm: record(planned, f"arms/{arm}")["segments"] for arm in ("e2e", "freeze")}
    for arm, segments in arms.items():
        told = [row[arm]["seconds"]["measured"] for row in predicted["stages"][1:]]
        assert told == [segment["train_seconds"] for segment in segments]
    speedup.run_speedup(job(planned))
    shown = " ".join(capsys.readouterr().out.split())
    assert "predicted (measured): e2e " in shown and " parts within 10%, furthest stage " in shown


def test_totals_of_other_epochs_or_of_an_unknown_cost_were_not_foretold(planned: Path) -> None:
    found = json.loads((planned / "speedup.json").read_text())
    plan = read_plan(Wanted(toy(), RunPaths(planned)))
    stages = {"compared": True, "why": "", "stages": [], "plan": plan}
    for arm, change in (("e2e", {"epochs": 2.0}), ("cached", {"cache_cost_known": False})):
        other = found | {"arms": found["arms"] | {arm: found["arms"][arm] | change}}
        told = with_totals(stages, other)
        assert told["totals"][arm]["measured"] is None and told["totals"]["freeze"]["measured"] is not None
        assert told["speedup_total"]["measured"] is None and told["break_even_epoch"]["measured"] is None
    assert with_totals(stages, found)["speedup_total"]["measured"] == found["speedup_total"]


def test_the_report_shows_the_line_and_the_table(planned: Path) -> None:
    found = json.loads((planned / "speedup.json").read_text())["predicted"]
    page = render(read_story(RunPaths(planned)))
    assert foretold_line(found) in page and "Foretold by the plan, beside what was measured" in page
    assert page.count("speedup.json#predicted.") == 2 * len(rows_of(found))


def test_a_plan_of_something_else_is_said_to_be_one_and_not_compared(planned: Path) -> None:
    paths = RunPaths(planned)
    other = Wanted(toy(**{"train.loader_threads": 1}), paths)
    why = why_not(other, read_plan(other))
    assert why.startswith("the plan was made for something else: train.loader_threads: 2 -> 1; `make plan` makes one")
    found = foretold(other, [], {})
    assert found == {"compared": False, "why": why} == with_totals(found, {})
    assert foretold_line(found) == f"predicted: not compared, {why}" and rows_of(found) == []
    assert why_not(Wanted(toy(seed=3, **{"eval.knn_k": 5}), paths), read_plan(other)) == "", "these take no other time"
    device = read_plan(other)
    device["of"]["device"] = "cpu (another)"
    assert "device: cpu (another) -> cpu (" in why_not(Wanted(toy(), paths), device)
    device["of"] = made_of(Wanted(toy(), paths))
    device["stages"][2]["epochs"] = 1
    assert "before schedule.kind=adaptive had decided" in why_not(Wanted(toy(), paths), device)


def test_without_a_plan_there_is_nothing_to_compare(tmp_path: Path) -> None:
    run = Wanted(toy(), RunPaths(tmp_path))
    assert why_not(run, read_plan(run)) == "no plan was made; `make plan` makes one"
    run.paths.plan.write_text('{"stages": []}')
    assert read_plan(run) == {}, "an older version's"
    assert foretold_line({}) == ""


def test_pairs_by_hand(tmp_path: Path) -> None:
    assert beside(12.0, 10.0) == {"predicted": 12.0, "measured": 10.0, "difference": pytest.approx(0.2)}
    assert beside(None, 10.0)["difference"] is None and beside(1.0, None)["difference"] is None
    run = Wanted(toy(), RunPaths(tmp_path))
    stage = {"train_seconds": 5.0, "images": 96}
    parts = [{"train_seconds": 7.0, "images": 96}, {"train_seconds": 9.0, "images": 192}]
    for arm in ("e2e", "freeze"):
        assert measured(run, 0, stage, {"arm": arm, "segments": parts}) == (5.0, 96), "stage 0 is trained once"
        assert measured(run, 1, stage, {"arm": arm, "segments": parts}) == (7.0, 96)
        assert measured(run, 2, stage, {"arm": arm, "segments": parts}) == (9.0, 192)
    assert measured(run, 2, stage, None) == (5.0, 96)


def test_the_line_by_hand() -> None:
    def two(predicted: float | None, found: float | None) -> dict[str, Any]:
        return beside(predicted, found)

    found = {
        "compared": True,
        "why": "",
        "totals": {"e2e": two(54, 60), "freeze": two(41, 40), "cached": two(44, 40)},
        "speedup_total": two(1.2, 1.5),
        "break_even_epoch": two(None, 4.8),
        "stages": [
            {"stage": 0, "cut": 0, **{arm: {"seconds": two(10, 10)} for arm in ("e2e", "freeze", "cached")}},
            {"stage": 1, "cut": 3, "cached": {"seconds": two(6, 5)}, "cache_seconds": two(4.2, 4)},
        ],
    }
    assert foretold_line(found) == (
        "predicted (measured): e2e 54 (60, -10 %) s, freeze 41 (40, +2 %) s, cached 44 (40, +10 %) s, speed-up 1.20 "
        "(1.50, -20 %), break-even - (4.8); 2 of 3 parts within 10%, furthest stage 1 (cut 3), cached +20%"
    )
