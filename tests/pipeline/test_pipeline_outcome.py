"""What a study's table says of its runs: means, intervals, paired differences, and what is not compared and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.claims import paired
from pipeline.outcome import Row, claims, lines, measured, table_md, with_control
from pipeline.studies import Study, Variant, row
from pipeline.study_figure import drawn
from tests.pipeline.toy import record


def done(variant: str, seed: int, knn: float, seconds: float, curve: tuple[tuple[float, float], ...] = ()) -> Row:
    """A row that has kNN only, scored on 10,000 images, and a curve of (seconds, kNN)."""
    points = tuple({"seconds": s, "epoch": s / 10, "knn_top1": k, "linear_top1": None} for s, k in curve)
    values = {"knn_top1": knn, "total_seconds": seconds, "probe_images": 10_000, "lr_schedule": "constant"}
    return Row(variant, seed, "done", values, points)


def three_seeds() -> tuple[Study, list[Row]]:
    """End to end rises from .30 at 50 s to .50 at 100 s; a cached arm ends at 75 s, where e2e stands at .40."""
    asked = Study("q", {"e2e": row("e2e"), "near": row(), "far": Variant(against="near")}, "e2e")
    rows = [done("e2e", seed, 0.50, 100.0, ((50.0, 0.30), (100.0, 0.50))) for seed in (0, 1, 2)]
    rows += [done("near", seed, knn, 75.0, ((75.0, knn),)) for seed, knn in enumerate((0.42, 0.43, 0.44))]
    rows += [done("far", seed, knn, 75.0, ((75.0, knn),)) for seed, knn in enumerate((0.40, 0.44, 0.48))]
    return asked, with_control(asked, rows)


def test_means_and_paired_differences_are_those_worked_out_by_hand() -> None:
    asked, rows = three_seeds()
    e2e, near, far = lines(asked, rows)
    # t of two degrees of freedom at 97.5 % is 4.3027; the standard error of .42, .43, .44 is .01 / sqrt 3
    half = 4.3027 * 0.01 / 3**0.5
    assert near.means["knn_top1"] == (pytest.approx(0.43), pytest.approx(half, rel=1e-4))
    assert e2e.means["knn_top1"] == (0.5, 0.0) and not e2e.control and not e2e.stopped and e2e.against == ""
    less_end, less_stopped = near.control["knn_top1"], near.stopped["knn_top1"]
    assert (less_end.mean, less_end.half) == (pytest.approx(-0.07), pytest.approx(half, rel=1e-4)) and less_end.sure
    assert (less_stopped.mean, less_stopped.half) == (pytest.approx(0.03), pytest.approx(half, rel=1e-4))
    assert less_stopped.sure and less_stopped.said == (
        "+3.0 points, 95 % interval +0.5 to +5.5 (3 seeds): higher"
    )
    # far less near, seed by seed: -.02, .01, .04; mean .01, standard error .03 / sqrt 3
    assert far.against == "near" and far.control["knn_top1"].mean == pytest.approx(0.01)
    assert far.control["knn_top1"].half == pytest.approx(4.3027 * 0.03 / 3**0.5, rel=1e-4)
    assert not far.control["knn_top1"].sure
    assert far.control["knn_top1"].said.endswith("(3 seeds): no difference within the interval")


def test_one_or_two_seeds_claim_nothing_and_say_so() -> None:
    asked, rows = three_seeds()
    one = [row for row in rows if row.seed == 0]
    text = claims(lines(asked, one))
    # the mean of .42 and .50 is .46: sqrt(.46 * .54 / 10,000) = .498 points
    assert text[0] == (
        "near against e2e: kNN -8.0 points; one seed: no difference is claimed (one standard error of a score is "
        "±0.5 points)."
    )
    assert all("one seed: no difference is claimed" in line for line in text) and len(text) == 4
    two = claims(lines(asked, [row for row in rows if row.seed < 2]))
    assert all("2 seeds: no difference is claimed" in line for line in two)
    assert "**" not in table_md(asked, "q", [], lines(asked, one), one)
    whole = table_md(asked, "q", [], lines(asked, rows), rows)
    assert "| near | 3 | 75 ± 0 | 43.0 ± 2.5 | e2e | **-7.0 ± 2.5** | **+3.0 ± 2.5** |" in whole


def test_rows_that_were_scored_differently_are_not_compared() -> None:
    study, rows = three_seeds()
    whole = {line.variant: line for line in lines(study, with_control(study, rows))}
    scored = [{"eval.val_limit": 40}], [{"eval.val_limit": 400}]
    plain = ("knn_top1", "total_seconds", "probe_images", "lr_schedule")
    rows = [
        replace(row, values={key: row.values[key] for key in plain} | {"scored": scored[row.variant == "e2e"]})
        for row in rows
    ]
    found = {line.variant: line for line in lines(study, with_control(study, rows))}
    for name, line in found.items():
        if whole[name].against == "e2e":
            assert whole[name].control and whole[name].stopped
            assert not line.control and not line.stopped and line.unlike == line.seeds
    assert "were scored differently with seed" in table_md(study, "tiny", [], list(found.values()), rows)


@pytest.mark.usefixtures("crowds")
@pytest.mark.parametrize(
    ("which", "change", "why"),
    [
        ("e2e", {"lr_schedule": "cosine"}, "its rate (train.lr_schedule = cosine) had not fallen by then"),
        ("near", {"crowded_seconds": 7.0}, "where other work had the cores for a part of one"),
        ("near", {"machines": [{"threads": 1}]}, "(threads 1 or 2), so seconds do not compare"),
        ("near", {"cache_cost_known": False}, "where what caches of one have cost is not known"),
    ],
)
def test_nothing_is_stopped_at_seconds_or_on_a_curve_that_cannot_tell(which: str, change: dict, why: str) -> None:
    asked, rows = three_seeds()
    same = {"machines": [{"threads": 2}]}
    rows = [replace(one, values=one.values | same | (change if one.variant == which else {})) for one in rows]
    rows = [replace(one, values={k: v for k, v in one.values.items() if "stopped" not in k}) for one in rows]
    rows = with_control(asked, rows)
    near, far = (next(line for line in lines(asked, rows) if line.variant == name) for name in ("near", "far"))
    assert not near.stopped and near.control["knn_top1"].mean == pytest.approx(-0.07)
    assert bool(far.stopped) is (which == "near")
    assert why in table_md(asked, "q", [], [near], rows)


def test_what_takes_longer_than_end_to_end_is_compared_with_its_end_and_said_to_be() -> None:
    asked, rows = three_seeds()
    plain = [replace(row, values={k: v for k, v in row.values.items() if "stopped" not in k}) for row in rows]
    for seconds, seeds in ((101.0, (0, 1, 2)), (99.0, ())):
        slow = [replace(r, values=r.values | {"total_seconds": seconds}) if r.variant == "near" else r for r in plain]
        slow = [replace(r, values=r.values | {"lr_schedule": "cosine"}) for r in slow] if seeds else slow
        found = with_control(asked, slow)
        near, far = (next(line for line in lines(asked, found) if line.variant == name) for name in ("near", "far"))
        assert near.longer == seeds and far.longer == ()
        told = table_md(asked, "q", [], [near], found)
        assert ("compared with its end, which took fewer seconds: near, seed 0, 1, 2." in told) is bool(seeds)
        assert ("against e2e stopped after as many seconds, or at its end where that" in told) is bool(seeds)
        if seeds:  # its rate has fallen by its end
            assert near.stopped["knn_top1"].mean == pytest.approx(0.43 - 0.50) and not far.stopped


def test_only_seeds_that_both_have_finished_are_paired() -> None:
    assert paired({0: 0.5, 1: 0.6}, {2: 0.5}, 100) is None
    found = paired({0: 0.5, 1: 0.6, 3: 0.9}, {1: 0.5, 0: 0.5, 2: 0.1}, 100)
    assert found is not None and (found.mean, found.seeds) == (pytest.approx(0.05), 2)
    asked, rows = three_seeds()
    broken = Row("near", 2, "failed", {"why": "it broke"})
    unfinished = [broken if (one.variant, one.seed) == ("near", 2) else one for one in rows]
    near = lines(asked, unfinished)[1]
    assert near.seeds == (0, 1) and near.control["knn_top1"].seeds == 2
    assert "- near, seed 2: failed: it broke" in table_md(asked, "q", [], lines(asked, unfinished), unfinished)


def test_a_figure_has_no_empty_rows_for_what_has_not_run() -> None:
    asked, rows = three_seeds()
    found = lines(asked, [row for row in rows if row.variant != "near"])
    assert [line.variant for line in drawn(found)] == ["e2e", "far"]
    assert [line.variant for line in drawn(lines(asked, []))] == ["e2e", "near", "far"]


def test_losses_stand_beside_those_of_predictors_that_see_nothing(finished: Path) -> None:
    """In a study that asks for them; every part of a run has them."""
    found, _ = measured([record(finished, name) for name in ("stage-0", "stage-1", "stage-2")])
    blind = record(finished, "stage-2")["blind_losses"]
    assert (found["place_loss"], found["mean_loss"]) == (blind["place"], blind["mean"])
    assert blind["heads"] == {"block4_pixels": {"mean": blind["mean"], "place": blind["place"]}}
    # a normalised patch of 4 x 4 x 3 values has unbiased variance 1: 47 / 48 about its own mean, 0
    assert 0.5 < blind["place"] < blind["mean"] <= 47 / 48
    assert all("blind_losses" in record(finished, name) for name in ("stage-0", "arms/e2e", "arms/freeze"))
    rows = [Row("e2e", 0, "done", found | {"final_loss": 0.25, "place_loss": 0.875, "mean_loss": 0.9})]
    asked = Study("q", {"e2e": row("e2e")}, "e2e", losses=True)
    assert "| 0.250 | 0.875 | 0.900 |" in table_md(asked, "q", [], lines(asked, rows), rows)
    assert "loss" not in table_md(replace(asked, losses=False), "q", [], lines(asked, rows), rows)
