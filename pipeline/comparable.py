"""Whether numbers compare at all: scores that were taken alike, seconds of the same machine with its cores free, a
curve that may be stopped anywhere. Pure functions of records and of speedup.json; each says why not, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

CROWDED = 0.05
"""Share of the seconds of training and of building caches that other work on the machine took, from which on they are
said to be too long."""
LATER = {"compile": "auto", "attention": "auto", "loader_threads": 2, "prefetch": 4, "ranks": 1, "parallel": "ddp"}
"""What changes seconds and is noted of a machine only by later versions, or of several ranks: its value elsewhere."""
ANYWHERE = ("constant", "schedule_free")
"""Schedules of the rate (`train.lr_schedule`) under which a curve's every point is as good an end as its last one."""


def so_far(before: Mapping[str, Any] | None, inputs: str, key: str, now: dict[str, Any]) -> dict[str, Any] | None:
    """How an arm is scored, or on what it is trained, from first to last: one that goes on may have parts that were
    made otherwise, which then stand under `before`; None where an earlier version began it, which did not note it.

    before: the record there is; inputs: the fingerprint of the arm that is now trained; key: of what is noted.
    """
    if before is None or before.get("fingerprint") != inputs:
        return now
    had = before.get(key)
    if had is None:
        return None
    latest = {name: value for name, value in had.items() if name != "before"}
    return had if latest == now else now | {"before": had}


def ways_unlike(ways: Iterable[Mapping[str, Any] | None]) -> str:
    """How things differ in how they were made, `eval.val_limit 40 or 400`; empty where they do not, and
    compare. None is a way that an earlier version has not noted: it is known to be like no other."""
    found = list(ways)
    if all(way == found[0] for way in found):
        return ""
    if None in found:
        return "in part by an earlier version, which has not noted how"
    named = [way for way in found if way is not None]
    told = []
    for key in sorted({key for way in named for key in way}):
        values = list(dict.fromkeys(str(way.get(key, "alike")) for way in named))
        if len(values) > 1:
            told.append(f"{key} {' or '.join(value[:8] if key.startswith('data') else value for value in values)}")
    return ", ".join(told)


def scored_unlike(runs: Sequence[dict[str, Any]], arms: Iterable[str] = ("e2e", "cached")) -> str:
    """That arms of comparisons were scored differently, and how; empty where their scores compare."""
    how = ways_unlike(way for one in runs for arm in arms for way in one["arms"][arm].get("scored", [None]))
    return f"arms were scored differently ({how}): their scores do not compare, no difference is claimed" if how else ""


def scores_said(scored: Iterable[tuple[str, str]]) -> str:
    """That scores of a run are not those that its settings ask for, of which parts, and what to do; else empty.

    scored: a part, and how it was scored otherwise, if it was.
    """
    parts: dict[str, list[str]] = {}
    for what, how in scored:
        if how:
            parts.setdefault(how, []).append(what)
    told = "; ".join(f"{how} ({', '.join(whats)})" for how, whats in parts.items())
    kept = ", which the report leaves out" if "data.val" in told else ""
    ways = f"`make probe` scores the encoders as they ask{kept}, a new RUN all of it"
    return f"scores are not those that the settings ask for: {told}; {ways}" if told else ""


def machines(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """On what a part was trained, as far as it changes its seconds; more than one where it went on elsewhere."""
    machine = record.get("machine")
    while machine:
        versions = {name: machine["versions"].get(name) for name in ("permafrost", "torch")}
        noted = {key: machine.get(key) for key in ("device", "threads")}
        yield noted | {key: machine.get(key, usual) for key, usual in LATER.items()} | versions
        machine = machine.get("before")


def seconds_unlike(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Why seconds of these do not compare; empty where they do. rows: by name, as `arm_summary` makes them."""
    return "; ".join(why for why in (trained_unlike(rows.values()), crowded(rows), uncosted(rows)) if why)


def trained_unlike(rows: Iterable[Mapping[str, Any]]) -> str:
    """That these were trained on different machines, threads, ranks, kernels or versions, and how; else empty."""
    how = ways_unlike(way for row in rows for way in row.get("machines", ()))
    return f"arms were not trained alike ({how}), so seconds do not compare" if how else ""


def crowded(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """That other work had the cores while some of these were made, so that their seconds mislead; else empty.

    rows: by name, what has `crowded_seconds`, missing or None where it was not measured, and `watched_seconds`, of
    which that is a part: building caches with worker processes is not watched, and would dilute the share.
    """
    told = [
        f"{100 * lost / max(lost, watched):.0f} % of the seconds of {name}"
        for name, row in rows.items()
        if (lost := row.get("crowded_seconds") or 0.0) > CROWDED * (watched := _watched(row))
    ]
    what = "so they are too long and do not compare; scores are what they would be"
    return f"other work had the cores for {', '.join(told)}, {what}" if told else ""


def _watched(row: Mapping[str, Any]) -> float:
    """Seconds in which other work was measured. Where an earlier version did not note them they are those of training,
    at least; where a cache that was found has lost its cost, though not what was lost of it, they may be too few."""
    noted = (row.get(key) for key in ("watched_seconds", "train_seconds", "total_seconds"))
    return float(next((seconds for seconds in noted if seconds is not None), 0.0))


def uncosted(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """That nobody knows what caches of some of these have cost, so that their seconds mislead; else empty.

    rows: by name, what has `cache_cost_known`, missing where there is no cache.
    """
    names = ", ".join(name for name, row in rows.items() if row.get("cache_cost_known") is False)
    what = "is not known and counts as 0, so seconds are too small and do not compare"
    return f"what caches of {names} have cost that were found, or taken rows from, {what}" if names else ""


def epochs_unlike(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """That arms have trained for different numbers of epochs (`train.early_stop`), so that their ends and total seconds
    are not those of the same work; empty where they have not. arms: of a comparison, as `arm_summary` makes them."""
    told = {arm: f"{row['epochs']:g}" for arm, row in arms.items()}
    how = ", ".join(f"{arm} {epochs}" for arm, epochs in told.items())
    return f"arms trained for different numbers of epochs ({how})" if len(set(told.values())) > 1 else ""


def frozen_for_all(stage_0: Mapping[str, Any]) -> str:
    """That arms have more in common than their start: FreezeOut may freeze blocks in place before the first cut, in
    stage 0, which the end-to-end arm has for its own; empty where it did not. stage_0: its record."""
    most = max((segment["cut"] for segment in stage_0["segments"]), default=0)
    what = f"blocks froze in stage 0, which all arms share (at its end {most} of them)"
    return f"{what}: e2e trains end to end in later stages only" if most else ""


def unfinished(arm: Mapping[str, Any], seconds: float) -> str:
    """Why an arm that is stopped after so many seconds is worse than the end of a training planned that short; empty
    where it is not, or the arm had ended by then. Stopping it can be shown to do as well, not to do worse."""
    if seconds >= arm["total_seconds"]:
        return ""
    kind = arm.get("lr_schedule")
    if kind is None:
        return "an earlier version has not noted its rate (train.lr_schedule)"
    return "" if kind in ANYWHERE else f"its rate (train.lr_schedule = {kind}) had not fallen by then"


def stopped_unfairly(runs: Sequence[Mapping[str, Any]]) -> str:
    """Why end to end, stopped after as many seconds as cached training took, is no fair control in some comparison;
    empty where it is in all."""
    pairs = ((one["arms"]["e2e"], one["arms"]["cached"]["total_seconds"]) for one in runs)
    return next((why for e2e, seconds in pairs if (why := unfinished(e2e, seconds))), "")
