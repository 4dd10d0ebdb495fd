"""What the report's first line may claim: speed-up, stopping early, errors and intervals, each worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.claims import PROBES, contrasts, headline, interval, standard_error
from pipeline.comparable import LATER, machines, scored_unlike, seconds_unlike, so_far
from pipeline.sceptic import differences, mean_points, over_seeds

Pair = tuple[float | None, float | None]
"""kNN and linear probe."""


def comparison(stopped: Pair, cached: Pair, ratio: float = 1.25) -> dict[str, Any]:
    """A comparison on 10,000 images: one standard error of one half is half a point, of a difference 0.71."""
    end = dict(zip(PROBES, cached, strict=True))
    return {
        "speedup_total": ratio,
        "arms": {
            "e2e": {"total_seconds": 50.0, "epochs": 20.0, "lr_schedule": "constant"}
            | {"knn_top1": 0.55, "linear_top1": 0.65},
            "cached": {"total_seconds": 40.0, "epochs": 20.0, "curve": [{"probe_images": 10_000}]} | end,
        },
        "early_stop": dict(zip(PROBES, stopped, strict=True)),
    }


AT = "end to end stopped after the same 40.0 s"


@pytest.mark.parametrize(
    ("stopped", "cached", "ends"),
    [
        ((0.50, 0.60), (0.49, 0.58), f" – but {AT} scores as well or better"),
        ((0.50, 0.60), (0.50, 0.60), f" – but {AT} scores as well or better"),
        ((0.50, 0.60), (0.51, 0.60), f" – but {AT} scores as well, within error"),
        ((0.50, 0.60), (0.48, 0.65), f" – but {AT} scores better in kNN"),
        ((0.50, 0.60), (0.53, 0.60), f", and ahead of {AT} in kNN"),
        ((0.50, 0.60), (0.53, 0.63), f", and ahead of {AT} in kNN and linear probe"),
        ((None, None), (None, None), "; the images have no labels, so nobody knows which arm learned more"),
    ],
)
def test_the_first_line_tells_what_stopping_early_would_have_done(stopped: Pair, cached: Pair, ends: str) -> None:
    # three seeds whose differences spread by ±.005: half an interval is 4.303 * .005 / sqrt 3 = .0124
    shifts = (0.0, 0.005, -0.005)
    seeds = [
        comparison(stopped, (None, None) if None in cached else (cached[0] + one, cached[1] + one))  # type: ignore[operator]
        for one in shifts
    ]
    line = headline(seeds[0], seeds)
    assert line == "1.25× the speed of end to end, caches included (mean of 3 seeds, 95 % interval 1.25 to 1.25)" + ends


@pytest.mark.parametrize(
    ("stopped", "cached", "ends"),
    [
        ((0.50, 0.60), (0.49, 0.58), f" – but {AT} scores as well or better, one seed"),
        ((0.50, 0.60), (0.60, 0.70), f" – but beside {AT}, one seed: no difference is claimed"),
        ((0.50, 0.60), (0.40, 0.70), f" – but beside {AT}, one seed: no difference is claimed"),
    ],
)
def test_one_seed_claims_no_difference_however_large(stopped: Pair, cached: Pair, ends: str) -> None:
    line = "1.25× the speed of end to end, caches included" + ends
    assert headline(comparison(stopped, cached)) == line
    two = [comparison(stopped, cached)] * 2
    assert headline(two[0], two) == line.replace("one seed", "2 seeds")


def test_a_loss_of_time_is_called_one() -> None:
    found = comparison((0.5, 0.5), (0.5, 0.5), ratio=0.8)
    found["arms"]["e2e"]["total_seconds"] = 32.0
    assert headline(found) == (
        "Slower: 0.80× the speed of end to end, caches included – but end to end, which was done before, scores as "
        "well or better, one seed"
    )


def test_slower_is_said_only_of_what_surely_is() -> None:
    assert headline(comparison((0.5, 0.5), (0.5, 0.5), 0.98)).startswith("Slower: 0.98×")
    # mean .95; half an interval is 4.303 * .05 / sqrt 3 = .124 or a tenth of it
    for spread, starts in ((0.05, "0.95× the speed"), (0.005, "Slower: 0.95× the speed")):
        seeds = [comparison((0.5, 0.5), (0.5, 0.5), 0.95 + by) for by in (-spread, 0.0, spread)]
        assert headline(seeds[0], seeds).startswith(starts)


def test_one_seed_has_the_standard_error_of_a_score() -> None:
    assert standard_error(0.5, 10_000) == 0.005
    (knn, _) = contrasts(comparison((0.5, 0.5), (0.52, 0.5)))
    assert knn.paired.error == pytest.approx((0.51 * 0.49) ** 0.5 / 100) and knn.paired.half is None and not knn.sure
    assert str(knn) == (
        "kNN 50.0\N{NO-BREAK SPACE}% against 52.0\N{NO-BREAK SPACE}%: +2.0 points; one seed: no difference is claimed "
        "(one standard error of a score is ±0.5 points)"
    )


def test_with_seeds_the_interval_is_theirs() -> None:
    # three values: t of 2 degrees of freedom at 97.5 % is 4.303
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4))
    seeds = [comparison((0.50, 0.60), (0.50 + gain, 0.60), 1.2 + gain) for gain in (0.006, 0.007, 0.008)]
    assert headline(seeds[0], seeds) == (
        "1.21× the speed of end to end, caches included (mean of 3 seeds, 95 % interval 1.20 to 1.21), and ahead of "
        "end to end stopped after the same 40.0 s in kNN"
    ), "0.7 points are within the error of one run and beyond that of three"
    (knn, linear) = contrasts(seeds[0], seeds)
    assert knn.paired.mean == pytest.approx(0.007) and knn.paired.half == pytest.approx(4.3027e-3 / 3**0.5, rel=1e-4)
    assert (linear.paired.mean, linear.sure) == (0.0, False)
    (knn, _) = contrasts(seeds[0], seeds, "e2e")
    assert knn.paired.mean == pytest.approx(0.507 - 0.55) and knn.sure


SCORED = {"eval.val_limit": 400, "eval.knn_k": 20, "data.val": 64 * "a"}


@pytest.mark.parametrize(
    ("other", "how"),
    [
        (SCORED | {"eval.val_limit": 40}, "eval.val_limit 400 or 40"),
        (SCORED | {"data.val": 64 * "b"}, "data.val aaaaaaaa or bbbbbbbb"),
        (SCORED | {"before": SCORED | {"eval.knn_k": 5}}, "before alike or {'eval.val_limit': 400, 'eval.knn_k': 5"),
        (None, "in part by an earlier version"),
    ],
)
def test_arms_that_were_scored_differently_are_not_compared(other: Any, how: str) -> None:
    seeds = [comparison((0.50, 0.60), (0.60, 0.70)) for _ in range(3)]
    assert headline(seeds[0], seeds).endswith("in kNN and linear probe") and not scored_unlike(seeds)
    for one in seeds:
        one["arms"]["e2e"]["scored"], one["arms"]["cached"]["scored"] = [SCORED], [SCORED]
    assert headline(seeds[0], seeds).endswith("in kNN and linear probe")
    seeds[1]["arms"]["cached"]["scored"] = [SCORED, other]
    assert contrasts(seeds[0], seeds) == [] == contrasts(seeds[1])
    line = headline(seeds[0], seeds)
    assert f"; arms were scored differently ({how}" in line and line.endswith("no difference is claimed")
    assert differences(dict(enumerate(seeds)), "e2e") == {}


@pytest.mark.usefixtures("crowds")
def test_seconds_that_do_not_compare_and_rates_that_have_not_fallen_carry_no_claim_of_stopping_early() -> None:
    def three() -> list[dict[str, Any]]:
        return [comparison((0.50, 0.60), (0.53 + shift, 0.63 + shift)) for shift in (0.0, 0.001, -0.001)]

    fair, unfair = three(), three()
    assert ", and ahead of end to end stopped" in headline(fair[0], fair)
    for one in unfair:
        one["arms"]["e2e"]["lr_schedule"] = "cosine"
    line = headline(unfair[0], unfair)
    assert f"; above {AT} in kNN and linear probe, but its rate (train.lr_schedule = cosine) had not fallen" in line
    for runs, claimed in ((fair, True), (unfair, False)):
        told = differences(dict(enumerate(runs)), "early_stop")["knn_top1"]
        assert (told["claimed"], round(told["mean"], 4)) == (claimed, 0.03)
        assert ("not claimed" in told["said"]) is not claimed
        shown = [str(one) for one in contrasts(runs[0], runs)]
        assert ["not claimed" in one for one in shown] == [not claimed] * 2, "the report says the same"
        assert [one.paired.claimed(one.unfair)[0] for one in contrasts(runs[0], runs)] == [claimed] * 2
    for one in unfair:
        del one["arms"]["e2e"]["lr_schedule"]
    assert "but an earlier version has not noted its rate" in headline(unfair[0], unfair)
    below = [comparison((0.56, 0.66), (0.53, 0.63)) for _ in range(3)]
    for one in below:
        one["arms"]["e2e"]["lr_schedule"] = "cosine"
    assert differences(dict(enumerate(below)), "early_stop")["knn_top1"]["claimed"], "it can only be better"
    fair[1]["arms"]["cached"] |= {"crowded_seconds": 0.3 * fair[1]["arms"]["cached"]["total_seconds"]}
    assert headline(fair[0], fair).endswith("; other work had the cores, so seconds do not compare")
    assert differences(dict(enumerate(fair)), "early_stop") == {} != differences(dict(enumerate(fair)), "e2e")


def test_a_training_that_ended_early_is_not_said_to_be_faster_at_the_same_work() -> None:
    found = comparison((0.50, 0.60), (0.53, 0.63), 2.0)
    found["arms"]["cached"]["epochs"] = 8.0
    line = headline(found, [found] * 3)
    assert line.startswith("2.00× the speed") and "ahead" not in line
    assert line.endswith("; arms trained for different numbers of epochs (e2e 20, cached 8)")


def test_what_goes_on_elsewhere_names_both_machines() -> None:
    here = {"device": "cpu", "threads": 1, "precision": "float32", "versions": {"permafrost": "1", "torch": "2"}}
    first = list(machines({"machine": here}))
    assert first == [{"device": "cpu", "threads": 1, **LATER, "permafrost": "1", "torch": "2"}]
    went_on = so_far({"fingerprint": "a", "machine": here}, "a", "machine", here | {"threads": 2})
    assert [one["threads"] for one in machines({"machine": went_on})] == [2, 1]
    fewer = so_far({"fingerprint": "a", "machine": here | {"ranks": 2}}, "a", "machine", here)
    assert [one["ranks"] for one in machines({"machine": fewer})] == [1, 2], "one rank is not written down"
    rows = {"e2e": {"machines": list(machines({"machine": went_on}))}, "cached": {"machines": first}}
    assert seconds_unlike(rows) == "arms were not trained alike (threads 2 or 1), so seconds do not compare"
    assert seconds_unlike({"e2e": {"machines": first}, "cached": {"machines": first}}) == ""


def test_what_goes_on_with_other_settings_is_scored_in_two_ways() -> None:
    now, record = SCORED | {"eval.knn_k": 5}, {"fingerprint": "a", "scored": SCORED}
    assert so_far(None, "a", "scored", now) == now == so_far(record, "b", "scored", now)
    assert so_far(record, "a", "scored", SCORED) == SCORED
    both = so_far(record, "a", "scored", now)
    assert both == now | {"before": SCORED}
    assert so_far(record | {"scored": both}, "a", "scored", now) == both, "and stays so"
    assert so_far({"fingerprint": "a"}, "a", "scored", now) is None


def test_the_controls_over_seeds_are_in_the_comparison_with_their_intervals() -> None:
    found = {seed: comparison((0.50, 0.60), (0.50 + 0.01 * seed, 0.60)) for seed in (3, 1, 2)}
    for seed, one in found.items():
        point = {"seconds": 10.0 + seed, "epoch": 1, "knn_top1": 0.2, "linear_top1": 0.1 * seed}
        curve = [point | {"probe_images": 10_000}]
        one["arms"] = {arm: one["arms"][arm] | {"curve": curve} for arm in ("e2e", "cached")}
    told = over_seeds(found)
    assert told["seeds"] == [1, 2, 3] and told["early_stop"]["knn_top1"] == [0.5, 0.5, 0.5]
    assert told["arms"]["cached"]["knn_top1"] == [0.51, 0.52, 0.53] and told["speedup_total"] == [1.25] * 3
    assert "Student's t" in told["interval"]
    knn, linear = (told["cached_less_early_stop"][key] for key in PROBES)
    assert knn["differences"] == pytest.approx([0.01, 0.02, 0.03]) and knn["mean"] == pytest.approx(0.02)
    # 4.303 * .01 / sqrt 3 = .0248 > .02
    assert knn["half"] == pytest.approx(4.3027e-2 / 3**0.5, rel=1e-4) and not knn["claimed"] and knn["seeds"] == 3
    assert linear["mean"] == 0 and not linear["claimed"]
    assert told["cached_less_e2e"]["knn_top1"]["mean"] == pytest.approx(0.52 - 0.55)
    assert told["cached_less_e2e"]["knn_top1"]["claimed"]
    (point,) = told["arms"]["e2e"]["curve"]
    assert point["seconds"] == 12.0 and point["knn_top1"] == pytest.approx(0.2) and point["knn_top1_half"] < 1e-12
    assert point["linear_top1"] == pytest.approx(0.2)
    assert point["linear_top1_half"] == pytest.approx(4.3027e-1 / 3**0.5, rel=1e-4)
    one = over_seeds({7: found[3]})
    assert one["cached_less_e2e"]["knn_top1"]["half"] is None
    assert "one seed: no difference is claimed" in one["cached_less_e2e"]["knn_top1"]["said"]
    assert one["arms"]["e2e"]["curve"][0]["knn_top1_half"] is None


def test_curves_of_seeds_meet_where_their_epochs_do() -> None:
    """Adaptive stages end at other epochs with another seed: points are paired by epoch, not by number."""

    def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
        return [{"epoch": epoch, "seconds": 10 * epoch, "knn_top1": top, "linear_top1": top} for epoch, top in points]

    found = mean_points([curve((5, 0.1), (10, 0.4)), curve((6, 0.3), (10, 0.6), (12, 0.9))])
    assert [(point["epoch"], point["seconds"], point["knn_top1"]) for point in found] == [(10, 100, 0.5)]
