"""`permafrost speedup`: the three arms side by side, from their records, as speedup.json, a table and a figure. Times
are training and cache building; evaluation counts for no arm. Stage 0 is trained once and counted in all three."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from cache.manifest import atomic_write
from cache.users import sum_measured
from pipeline.claims import PROBES
from pipeline.comparable import (
    epochs_unlike,
    frozen_for_all,
    machines,
    scored_unlike,
    scores_said,
    seconds_unlike,
    stopped_unfairly,
)
from pipeline.config import ConfigError
from pipeline.decide import ARMS, Wanted, judge_all
from pipeline.desk import Desk, at_work
from pipeline.foretold import foretold, foretold_line, with_totals
from pipeline.job import Job
from pipeline.layout import StagePaths
from pipeline.machine import described
from pipeline.show import console, table

ARM_SECONDS, ROUNDS = 1.0, 4
"""Seconds of each arm in a round, and rounds, from which the rates by stage are taken."""


def run_speedup(job: Job) -> None:
    """Compare the arms of a run that has trained them all."""
    with at_work(job) as desk:
        verdicts = [v for v in judge_all(desk.wanted) if not v.what.startswith(("cache", "finetune"))]
        missing = [verdict.what for verdict in verdicts if not verdict.current]
        if not missing and len(desk.wanted.segments) == 1:
            raise ConfigError(f"{desk.wanted.why_nothing_freezes}: there are no arms to compare")
        if missing:
            run = f" CONFIG={job.paths.config} RUN={job.paths.root}" if job.paths.config.exists() else ""
            ways = f"`make all{run}` runs them, `make explain{run}` says why"
            raise ConfigError(f"not current: {', '.join(missing)}; {ways}")
        compare(desk)


def compare(desk: Desk) -> None:
    """Write speedup.json and the figure, print the table. Everything it compares is current."""
    from pipeline.figures import accuracy_against_time
    from pipeline.sceptic import refresh

    wanted, paths = desk.wanted, desk.wanted.paths
    found = summary(wanted) | {"of": states(wanted)}
    atomic_write(paths.speedup, (json.dumps(found, indent=2) + "\n").encode())
    found = refresh(paths)
    figure = paths.figures / "accuracy-time.png"
    accuracy_against_time(found, figure)
    show(found)
    tell_scores(desk)
    desk.log.message(f"written: {paths.speedup}, {figure}")


def tell_scores(desk: Desk) -> None:
    """Say which encoders of a run are scored otherwise than its settings ask for, if any."""
    verdicts = [verdict for verdict in judge_all(desk.wanted) if verdict.what != "finetune"]
    if told := scores_said((verdict.what, verdict.scored) for verdict in verdicts):
        desk.log.message(told)


def states(wanted: Wanted) -> list[str | None]:
    """What is compared: the final states of the stages and arms; None of what is not there or has not ended."""
    paths = [*(wanted.paths.stage(k) for k in range(len(wanted.segments))), *(wanted.paths.arm(arm) for arm in ARMS)]
    return [(wanted.record(path) or {}).get("state") for path in paths]


def current_comparison(wanted: Wanted) -> dict[str, Any] | None:
    """The comparison on disk, if it is of these very stages and arms; its rates are those of the day it was written."""
    try:
        found: dict[str, Any] = json.loads(wanted.paths.speedup.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if found.get("of") == states(wanted) else None


def summary(wanted: Wanted) -> dict[str, Any]:
    """The contents of speedup.json."""
    from pipeline.rates import ratios

    stages = [record(wanted, wanted.paths.stage(k)) for k in range(len(wanted.segments))]
    e2e, freeze = (record(wanted, wanted.paths.arm(name)) for name in ARMS)
    parts = {"e2e": [stages[0], e2e], "freeze": [stages[0], freeze], "cached": stages}
    arms = {name: arm_summary(records) for name, records in parts.items()}
    speeds = [kept_speed(wanted, k) or stage_speed(wanted, k) for k in range(1, len(stages))]
    rates = [speed["rates"] for speed in speeds]
    loading = [statistics.median(ratios(one, "cached", "memory")) for one in rates]
    by_stage = [
        {"cut": stage["cut"], "live": not stage["cache"]}
        | {f"{arm}_images_per_second": statistics.median(one[arm]) for arm in parts}
        | {"ratio": statistics.median(ratios(one, "cached", "e2e")), "flop_bound": speed["flop_bound"]}
        for stage, speed, one in zip(stages[1:], speeds, rates, strict=True)
    ]
    found = {
        "arms": arms,
        "frozen_for_all": frozen_for_all(stages[0]),
        "speedup_total": arms["e2e"]["total_seconds"] / arms["cached"]["total_seconds"],
        "speedup_by_stage": by_stage,
        "loader_bound": min(loading, default=1.0),
        "loader_bound_by_stage": loading,
        "epochs_unlike": (unlike := epochs_unlike(arms)),
        "break_even_epoch": None if unlike else break_even(timeline(parts["e2e"]), timeline(parts["cached"])),
        "early_stop": stopped_at(arms["e2e"]["curve"], arms["cached"]["total_seconds"]),
    } | described(wanted.config)
    return found | {"predicted": with_totals(foretold(wanted, stages, {"e2e": e2e, "freeze": freeze}), found)}


def stage_speed(wanted: Wanted, stage: int) -> dict[str, Any]:
    """The rates of the arms' steps at a stage's cut, and what their FLOPs would allow; reads the stage's caches."""
    from pipeline.rates import flop_bound, stage_rates

    return {"rates": stage_rates(wanted, stage, ARM_SECONDS, ROUNDS), "flop_bound": flop_bound(wanted, stage)}


def keep_speed(wanted: Wanted, stage: int) -> None:
    """Measure a finished stage whose caches will not be there when the arms are compared."""
    paths = wanted.paths.stage(stage)
    found = {"of": record(wanted, paths)["state"]} | stage_speed(wanted, stage)
    atomic_write(paths.speed, (json.dumps(found, indent=2) + "\n").encode())


def kept_speed(wanted: Wanted, stage: int) -> dict[str, Any] | None:
    """What was measured of this very stage; None where its caches are still to be read, or nothing was."""
    paths = wanted.paths.stage(stage)
    try:
        found: dict[str, Any] = json.loads(paths.speed.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if found.get("of") == record(wanted, paths)["state"] else None


def record(wanted: Wanted, paths: StagePaths) -> dict[str, Any]:
    found = wanted.record(paths)
    assert found is not None, f"{paths.json} was there a moment ago"
    return found


def arm_summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm from the records of its parts, in order. A part's probe points count from its start, after its cache, and
    after what turns of its ring of views had cost by then."""
    curve, spent = [], 0.0
    for part in parts:
        points = ("epoch", "knn_top1", "linear_top1", "effective_rank", "probe_images")
        for point in part["curve"]:
            later = sum(turn["seconds"] for turn in part.get("turns", ()) if turn["epoch"] >= point["epoch"])
            seconds = spent + cache_cost(part) - later + point["seconds"]
            curve.append({"seconds": seconds} | {key: point[key] for key in points})
        spent += cache_cost(part) + part["train_seconds"]
    return {
        "train_seconds": sum(part["train_seconds"] for part in parts),
        "cache_seconds": sum(map(cache_cost, parts)),
        "cache_seconds_elsewhere": sum(part.get("cache_seconds_elsewhere") or 0.0 for part in parts),
        "cache_cost_known": all(part.get("cache_seconds_elsewhere", 0.0) is not None for part in parts),
        "total_seconds": spent,
        "loader_wait_seconds": sum(part["loader_wait_seconds"] for part in parts),
        "crowded_seconds": sum_measured(map(crowded_seconds, parts)),
        "watched_seconds": sum(map(watched_seconds, parts)),
        "evaluate_seconds": sum(part["evaluate_seconds"] for part in parts),
        "epochs": sum(part["epochs"] for part in parts),
        "images": sum(part["images"] for part in parts),
        "scored": distinct(part.get("scored") for part in parts),
        "machines": distinct(one for part in parts for one in machines(part)),
        "lr_schedule": parts[-1].get("inputs", {}).get("train.lr_schedule"),
        "knn_top1": parts[-1]["knn_top1"],
        "linear_top1": parts[-1]["linear_top1"],
        "curve": curve,
    }


def distinct(values: Iterable[Any]) -> list[Any]:
    """Every value once, in the order in which they first come."""
    found: list[Any] = []
    for value in values:
        found += [] if value in found else [value]
    return found


def cache_cost(part: dict[str, Any]) -> float:
    """What a part's caches have cost to build, whoever built them: a cache that was found must not flatter."""
    return float(part["cache_seconds"]) + (part.get("cache_seconds_elsewhere") or 0.0)


def crowded_seconds(part: dict[str, Any]) -> float | None:
    """Of a part's seconds, building its caches included, what other work on the machine took, as far as measured."""
    return sum_measured((part.get("crowded_seconds"), part.get("cache_crowded_seconds")))


def watched_seconds(part: dict[str, Any]) -> float:
    """A part's seconds in which it was measured what other work on the machine took."""
    watched = 0.0 if part.get("crowded_seconds") is None else float(part["train_seconds"])
    return watched + (0.0 if part.get("cache_crowded_seconds") is None else cache_cost(part))


def timeline(parts: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(epoch, seconds) at every corner of an arm's course; building a cache, or a ring's next view, takes seconds and
    no epoch."""
    epoch = seconds = 0.0
    corners = [(0.0, 0.0)]
    for part in parts:
        turns, begun = part.get("turns", []), epoch
        seconds += cache_cost(part) - sum(turn["seconds"] for turn in turns)
        corners.append((epoch, seconds))
        for segment in part["segments"]:
            if due := [turn for turn in turns if turn["after"] <= epoch - begun]:  # a ring turns where segments begin
                turns = turns[len(due) :]
                seconds += sum(turn["seconds"] for turn in due)
                corners.append((epoch, seconds))
            epoch, seconds = epoch + segment["epochs"], seconds + segment["train_seconds"]
            corners.append((epoch, seconds))
        if turns:  # made ahead, for epochs that the stage did not come to
            seconds += sum(turn["seconds"] for turn in turns)
            corners.append((epoch, seconds))
    return corners


def break_even(slow: list[tuple[float, float]], fast: list[tuple[float, float]]) -> float | None:
    """The epoch from which on `fast` has spent no more seconds than `slow`; None when it never gets there.

    Both are corners of piecewise linear courses over the same epochs. Between two corners of either the lead is linear,
    so it is enough to look at the last stretch that begins with `slow` ahead.
    """
    epochs = sorted({epoch for epoch, _ in (*slow, *fast)})
    found = None
    for start, end in reversed(list(pairwise(epochs))):
        before = seconds_at(fast, start, after_jump=True) - seconds_at(slow, start, after_jump=True)
        after = seconds_at(fast, end, after_jump=False) - seconds_at(slow, end, after_jump=False)
        if after > 0:
            return found
        if before > 0:
            return start + (end - start) * before / (before - after)
        found = start
    return found


def seconds_at(corners: list[tuple[float, float]], epoch: float, after_jump: bool) -> float:
    """Seconds spent at an epoch; where a cache is built at that epoch, before or after it was."""
    exact = [seconds for at, seconds in corners if at == epoch]
    if exact:
        return exact[-1] if after_jump else exact[0]
    return float(np.interp(epoch, [at for at, _ in corners], [seconds for _, seconds in corners]))


def stopped_at(curve: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    """What an arm scored when stopped after `seconds`, between two points of its curve by linear interpolation."""
    times = [point["seconds"] for point in curve]

    def reached(key: str) -> float | None:
        values = [point[key] for point in curve]
        return None if None in values else float(np.interp(seconds, times, values))

    return {"seconds": min(seconds, times[-1])} | {key: reached(key) for key in ("epoch", "knn_top1", "linear_top1")}


def show(found: dict[str, Any]) -> None:
    """Print the table of arms and, below it, the rates by stage."""
    by_stage = found["speedup_by_stage"]
    cuts = [f"cut {row['cut']}" for row in by_stage]
    heads = ("arm", "train s", "cache s", "total s", *(f"img/s {cut}" for cut in cuts), "speed-up", "kNN", "linear")
    rows = table(*heads)
    for name in ("e2e", "freeze", "cached"):
        arm = found["arms"][name]
        rows.add_row(
            name,
            *(f"{arm[key]:.1f}" for key in ("train_seconds", "cache_seconds", "total_seconds")),
            *(f"{row[f'{name}_images_per_second']:.0f}" for row in by_stage),
            f"{found['arms']['e2e']['total_seconds'] / arm['total_seconds']:.2f}",
            *(score(arm[key]) for key in ("knn_top1", "linear_top1")),
        )
    out = console()
    if unlike := scored_unlike([found], found["arms"]):
        out.print(unlike, markup=False)
    out.print(rows)
    if why := seconds_unlike(found["arms"]):
        out.print(why, markup=False)
    for kind in ("frozen_for_all", "epochs_unlike"):
        if told := found.get(kind):
            out.print(told, markup=False)
    stopped, cached = found["early_stop"], found["arms"]["cached"]
    out.print(
        f"e2e stopped at the cached arm's {cached['total_seconds']:.0f} s (epoch {stopped['epoch']:.1f}): "
        f"kNN {score(stopped['knn_top1'])}, linear {score(stopped['linear_top1'])}; "
        f"cached: {score(cached['knn_top1'])}, {score(cached['linear_top1'])}"
        + (f"; {why}" if (why := stopped_unfairly([found])) else ""),
        markup=False,
    )
    for control, told in (("stopped then", "cached_less_early_stop"), ("at its end", "cached_less_e2e")):
        for key, pair in found.get("seeds", {}).get(told, {}).items():
            out.print(f"cached less e2e {control}: {PROBES[key]} {pair['said']}")
    if shared := cached["cache_seconds_elsewhere"]:
        whose = "other runs that share the caches, or on rows taken over"
        out.print(f"of the cache seconds, {shared:.1f} were spent by {whose}")
    if live := [str(row["cut"]) for row in by_stage if row.get("live")]:
        out.print(f"cut {', '.join(live)}: no cache, frozen blocks ran live in the cached arm (cache.over_budget=live)")
    ratios = ", ".join(f"cut {row['cut']}: {row['ratio']:.2f} (FLOP bound {row['flop_bound']:.2f})" for row in by_stage)
    even = "not known" if found.get("epochs_unlike") else "not reached"
    if found["break_even_epoch"] is not None:
        even = f"at epoch {found['break_even_epoch']:.1f}"
    out.print(f"cached over e2e images/s at {ratios}" if by_stage else "one stage only: nothing is cached")
    out.print(f"cached step against features in memory: {found['loader_bound']:.2f}; break-even {even}")
    if line := foretold_line(found.get("predicted", {})):
        out.print(line, markup=False)


def score(value: float | None) -> str:
    """A probe's score; images without labels have none."""
    return "-" if value is None else f"{value:.3f}"
