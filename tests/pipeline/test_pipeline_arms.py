"""The arms of a comparison from records by hand: what each has spent by when, and what says that seconds mislead."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.comparable import epochs_unlike, seconds_unlike, stopped_unfairly, unfinished
from pipeline.predict import StageCost, totals
from pipeline.speedup import arm_summary, break_even, stopped_at, timeline

HERE = {"device": "cpu", "threads": 2, "versions": {"permafrost": "1", "torch": "2"}}


def part(first: float, seconds: list[float], **more: Any) -> dict[str, Any]:
    """A stage that begins at epoch `first` and trains an epoch a segment, scored after each."""
    spent = [sum(seconds[: place + 1]) for place in range(len(seconds))]
    scores = {"knn_top1": 0.3, "linear_top1": 0.4, "effective_rank": 9.0, "probe_images": 100}
    return {
        "train_seconds": sum(seconds),
        "cache_seconds": 0.0,
        "loader_wait_seconds": 0.0,
        "evaluate_seconds": 1.0,
        "crowded_seconds": 0.0,
        "epochs": float(len(seconds)),
        "images": 64 * len(seconds),
        "machine": HERE,
        "knn_top1": 0.3,
        "linear_top1": 0.4,
        "inputs": {"train.lr_schedule": "cosine"},
        "curve": [{"epoch": first + 1 + place, "seconds": spent[place]} | scores for place in range(len(seconds))],
        "segments": [{"epochs": 1.0, "train_seconds": one} for one in seconds],
    } | more


def test_a_point_counts_what_was_trained_and_cached_before_it_by_whomever() -> None:
    parts = [
        part(0, [10.0, 10.0]),
        part(2, [4.0, 4.0], cache_seconds=5.0, cache_seconds_elsewhere=2.0),
        part(4, [3.0], cache_seconds=0.0, cache_seconds_elsewhere=6.0),
    ]
    found = arm_summary(parts)
    assert [(p["epoch"], p["seconds"]) for p in found["curve"]] == [(1, 10), (2, 20), (3, 31), (4, 35), (5, 44)]
    assert (found["train_seconds"], found["cache_seconds"], found["total_seconds"]) == (31.0, 13.0, 44.0)
    assert (found["cache_seconds_elsewhere"], found["cache_cost_known"], found["epochs"]) == (8.0, True, 5.0)
    assert timeline(parts) == [
        *((0.0, 0.0), (0.0, 0.0), (1.0, 10.0), (2.0, 20.0)),
        *((2.0, 27.0), (3.0, 31.0), (4.0, 35.0)),
        *((4.0, 41.0), (5.0, 44.0)),
    ]


def test_a_ring_is_paid_for_as_it_turns() -> None:
    """8 epochs of 10 s, then 8 of 5 s, the first cache 10 s, three turns of 5 s: ahead from epoch 11 on, where all
    turns at once would have it at 13."""
    turns = [{"epoch": 8.0 + after, "after": float(after), "seconds": 5.0} for after in (2, 4, 6)]
    parts = [part(0, [10.0] * 8), part(8, [5.0] * 8, cache_seconds=25.0, turns=turns)]
    slow = [part(0, [10.0] * 8), part(8, [10.0] * 8)]
    assert break_even(timeline(slow), timeline(parts)) == pytest.approx(11.0)
    assert break_even(timeline(slow), timeline([parts[0], parts[1] | {"turns": []}])) == pytest.approx(13.0)
    seconds = [point["seconds"] for point in arm_summary(parts)["curve"]][8:]
    assert seconds == [95.0, 100.0, 110.0, 115.0, 125.0, 130.0, 140.0, 145.0], "scored before the ring turns"
    assert arm_summary(parts)["total_seconds"] == 145.0 == timeline(parts)[-1][1]
    early = [parts[0], part(8, [5.0] * 3, cache_seconds=25.0, turns=turns)]
    assert timeline(early)[-1] == (11.0, 120.0), "what was made ahead was paid for"
    costs = [
        StageCost(0, 0, 8.0, "planned", 80, 80, 80, 0, 0),
        StageCost(1, 3, 8.0, "planned", 80, 80, 40, 25, 0, turns=(2.0, 4.0, 6.0), turn_seconds=5.0),
    ]
    assert totals(costs)["break_even_epoch"] == pytest.approx(11.0) and totals(costs)["cached_seconds"] == 145.0


@pytest.mark.usefixtures("crowds")
def test_what_other_work_took_is_told_though_a_part_did_not_measure_it() -> None:
    arm = arm_summary([part(0, [40.0], crowded_seconds=None), part(1, [60.0], crowded_seconds=20.0)])
    assert arm["crowded_seconds"] == 20.0 and "33 % of the seconds of e2e" in seconds_unlike({"e2e": arm})
    assert arm["watched_seconds"] == 60.0, "what was not watched would make the share smaller"
    assert arm_summary([part(0, [40.0], crowded_seconds=None)])["crowded_seconds"] is None
    built = {"cache_seconds": 20.0, "cache_seconds_elsewhere": 5.0, "cache_crowded_seconds": 15.0}
    parts = [part(0, [40.0]), part(1, [35.0], crowded_seconds=None, **built)]
    arm = arm_summary(parts)
    assert (arm["crowded_seconds"], arm["watched_seconds"]) == (15.0, 65.0), "of 100 seconds, 25 of them for a cache"
    assert "23 % of the seconds of cached" in seconds_unlike({"cached": arm})
    unknown = {"cache_seconds": 0.0, "cache_seconds_elsewhere": None, "cache_crowded_seconds": 3.0}
    arm = arm_summary([part(0, [40.0], crowded_seconds=None, **unknown)])
    assert "100 % of the seconds of cached" in seconds_unlike({"cached": arm}), "of a cache whose cost is lost"


@pytest.mark.parametrize(
    ("other", "how"),
    [
        ({"attention": "fused"}, "attention auto or fused"),
        ({"loader_threads": 4}, "loader_threads 2 or 4"),
        ({"prefetch": 1}, "prefetch 4 or 1"),
        ({"ranks": 2, "parallel": "fsdp"}, "parallel ddp or fsdp, ranks 1 or 2"),
    ],
)
def test_other_kernels_loaders_and_ranks_take_other_seconds(other: dict[str, Any], how: str) -> None:
    arms = {"e2e": arm_summary([part(0, [9.0])]), "cached": arm_summary([part(0, [9.0], machine=HERE | other)])}
    assert seconds_unlike(arms) == f"arms were not trained alike ({how}), so seconds do not compare"
    assert seconds_unlike({"e2e": arms["e2e"], "freeze": arms["e2e"]}) == ""


def test_seconds_do_not_compare_where_nobody_knows_what_a_cache_has_cost() -> None:
    arm = arm_summary([part(0, [9.0]), part(1, [2.0], cache_seconds=1.0, cache_seconds_elsewhere=None)])
    told = seconds_unlike({"e2e": arm_summary([part(0, [9.0])]), "cached": arm})
    assert told == (
        "what caches of cached have cost that were found, or taken rows from, is not known and counts as 0, so seconds "
        "are too small and do not compare"
    )


def test_arms_of_other_lengths_are_said_to_be() -> None:
    arms = {"e2e": arm_summary([part(0, [9.0] * 3)]), "cached": arm_summary([part(0, [9.0] * 5)])}
    assert epochs_unlike(arms) == "arms trained for different numbers of epochs (e2e 3, cached 5)"
    assert epochs_unlike({"e2e": arms["e2e"], "freeze": arms["e2e"]}) == ""


def test_a_rate_has_not_fallen_only_where_there_was_more_to_come() -> None:
    e2e = arm_summary([part(0, [10.0, 10.0])])
    assert unfinished(e2e, 19.0).endswith("(train.lr_schedule = cosine) had not fallen by then")
    assert unfinished(e2e, 20.0) == "" == unfinished(e2e | {"lr_schedule": "constant"}, 1.0)
    runs = [{"arms": {"e2e": e2e, "cached": {"total_seconds": seconds}}} for seconds in (25.0, 19.0)]
    assert stopped_unfairly(runs[:1]) == "" and "had not fallen" in stopped_unfairly(runs)
    points = [{"seconds": s, "epoch": s / 10, "knn_top1": s / 100, "linear_top1": 0.5} for s in (10.0, 20.0)]
    assert stopped_at(points, 25.0) == {"seconds": 20.0, "epoch": 2.0, "knn_top1": 0.2, "linear_top1": 0.5}
