"""What the plan foretold, beside what was measured: read from plan.json, which `make all` makes before it trains,
and from the records of stages and arms. A plan of other settings, threads or another machine is said to be so and
not compared. Part of `speedup.json`, of its table and of the report. Free of torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.comparable import machines, ways_unlike
from pipeline.decide import Wanted
from pipeline.inputs import difference
from pipeline.machine import described
from pipeline.reading import flatten

ARMS = ("e2e", "freeze", "cached")
ELSEWHERE = (
    *("seed", "bench.", "finetune.", "eval.", "cluster.address", "cache.root", "cache.max_error", "data.val_"),
    *("data.cache_gb", "store."),
)
"""Settings without a say in how long stages, arms and caches take."""
NEAR = 0.10
"""Relative difference within which a prediction counts as right."""


def made_of(wanted: Wanted) -> dict[str, Any]:
    """What a plan depends on: settings, the number of images, the machine."""
    settings = dict(flatten(dataclasses.asdict(wanted.config)))
    machine = described(wanted.config)
    found = {key: value for key, value in settings.items() if not key.startswith(ELSEWHERE)}
    found |= {"images": len(wanted.data.train), "device": machine["device"]}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def read_plan(wanted: Wanted) -> dict[str, Any]:
    """plan.json; empty where there is none, or one of an older version."""
    try:
        found: dict[str, Any] = json.loads(wanted.paths.plan.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if "of" in found and "stages" in found else {}


def why_not(wanted: Wanted, plan: dict[str, Any]) -> str:
    """Why a plan says nothing of this run; empty where it does."""
    if not plan:
        return "no plan was made; `make plan` makes one"
    if changed := difference(plan["of"], made_of(wanted)):
        return f"the plan was made for something else: {changed}; `make plan` makes one of this"
    cuts = [(stage["cut"], stage["epochs"]) for stage in plan["stages"]]
    if cuts != [(part.cut, part.steps / part.steps_per_epoch) for part in wanted.segments]:
        return "the plan was made before schedule.kind=adaptive had decided on these stages"
    return ""


def foretold(wanted: Wanted, stages: Sequence[dict[str, Any]], arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Predicted beside measured, with relative differences, by stage and arm. stages: their records; arms: those of the
    arms e2e and freeze."""
    plan = read_plan(wanted)
    parts = [{"machine": described(wanted.config)}, *stages, *arms.values()]
    if how := ways_unlike(way for part in parts for way in machines(part)):
        return {"compared": False, "why": f"not all parts ran alike, and as the plan has them: {how}"}
    if why := why_not(wanted, plan):
        return {"compared": False, "why": why}
    by_stage = []
    for number, (foreseen, record) in enumerate(zip(plan["stages"], stages, strict=True)):
        row: dict[str, Any] = {"stage": number, "cut": foreseen["cut"]}
        for arm in ARMS:
            seconds, images = measured(wanted, number, record, arms.get(arm))
            if images and images == foreseen["images"]:  # one that ended early has spent other epochs
                told = foreseen[f"{arm}_seconds"]
                row[arm] = {
                    "seconds": beside(told, seconds),
                    "images_per_second": beside(images / told if told else 0.0, images / seconds if seconds else 0.0),
                }
        if foreseen["cache_seconds"] and record.get("cache_seconds_elsewhere", 0.0) is not None:
            spent = record["cache_seconds"] + (record.get("cache_seconds_elsewhere") or 0.0)
            row["cache_seconds"] = beside(foreseen["cache_seconds"], spent)
        by_stage.append(row)
    return {"compared": True, "why": "", "stages": by_stage, "plan": plan}


WHOLE = ("speedup_total", "break_even_epoch")


def with_totals(found: dict[str, Any], comparison: dict[str, Any]) -> dict[str, Any]:
    """The same with the run as a whole, as the comparison of the arms has it."""
    if not found["compared"]:
        return found
    plan = found["plan"]
    epochs = sum(stage["epochs"] for stage in plan["stages"])
    # Of an arm that ended early, or whose caches' cost is not known, something else was foretold.
    of = comparison["arms"]
    done = {arm: of[arm]["cache_cost_known"] and math.isclose(of[arm]["epochs"], epochs) for arm in ARMS}
    seconds = {arm: of[arm]["total_seconds"] if done[arm] else None for arm in ARMS}
    arms = {arm: beside(plan[f"{arm}_seconds"], seconds[arm]) for arm in ARMS}
    both = done["e2e"] and done["cached"]
    whole = {key: beside(plan[key], comparison[key] if both else None) for key in WHOLE}
    return {key: value for key, value in found.items() if key != "plan"} | {"totals": arms} | whole


def measured(
    wanted: Wanted, stage: int, record: dict[str, Any], arm: dict[str, Any] | None
) -> tuple[float, int]:
    """(seconds, images) of training a stage: its own record's, or the segments of an arm that fall into it."""
    if arm is None or not stage:
        return record["train_seconds"], record["images"]
    first = sum(len(pieces(wanted, arm, earlier)) for earlier in range(1, stage))
    own = arm["segments"][first : first + len(pieces(wanted, arm, stage))]
    return sum(part["train_seconds"] for part in own), sum(part["images"] for part in own)


def pieces(wanted: Wanted, arm: dict[str, Any], stage: int) -> Sequence[Any]:
    """The segments of an arm within a stage: one where nothing freezes."""
    return wanted.parts(stage) if arm["arm"] == "freeze" else wanted.segments[stage : stage + 1]


def beside(predicted: float | None, found: float | None) -> dict[str, float | None]:
    """Both, and the prediction's relative difference to what was measured."""
    known = predicted is not None and found
    return {
        "predicted": predicted,
        "measured": found,
        "difference": predicted / found - 1 if known and predicted is not None and found else None,
    }


class Row(NamedTuple):
    """A prediction beside what was measured."""

    name: str
    path: str
    """Where it stands in `predicted`."""
    pair: dict[str, float | None]

    @property
    def of_stage(self) -> bool:
        return self.path.startswith("stages")


def rows_of(found: dict[str, Any]) -> list[Row]:
    """Every pair: totals first, then stage by stage; none where nothing is compared."""
    if not found.get("compared"):
        return []
    rows = [Row(f"{arm}, total s", f"totals.{arm}", found["totals"][arm]) for arm in ARMS]
    rows.append(Row("speed-up in total", "speedup_total", found["speedup_total"]))
    rows.append(Row("break-even, epoch", "break_even_epoch", found["break_even_epoch"]))
    for number, row in enumerate(found["stages"]):
        where, path = f"stage {row['stage']} (cut {row['cut']})", f"stages.{number}."
        own = [arm for arm in ARMS if arm in row][: None if row["stage"] else 1]  # stage 0 is the same for all
        rows += [Row(f"{where}, {arm} s", f"{path}{arm}.seconds", row[arm]["seconds"]) for arm in own]
        if "cache_seconds" in row:
            rows.append(Row(f"{where}, cache s", f"{path}cache_seconds", row["cache_seconds"]))
    return rows


def foretold_line(found: dict[str, Any]) -> str:
    """The comparison as one sentence."""
    if not found:
        return ""
    if not found["compared"]:
        return f"predicted: not compared, {found['why']}"
    told = [f"{arm} {pair(found['totals'][arm], '.0f')} s" for arm in ARMS]
    told.append(f"speed-up {pair(found['speedup_total'], '.2f')}")
    told.append(f"break-even {pair(found['break_even_epoch'], '.1f')}")
    line = f"predicted (measured): {', '.join(told)}"
    parts = [(row.name, row.pair["difference"]) for row in rows_of(found) if row.of_stage]
    known = [(name, off) for name, off in parts if off is not None]
    if known:
        name, off = max(known, key=lambda one: abs(one[1]))
        near = sum(abs(off) <= NEAR for _, off in known)
        line += f"; {near} of {len(known)} parts within {NEAR:.0%}, furthest {name.removesuffix(' s')} {off:+.0%}"
    return line


def pair(one: dict[str, float | None], form: str) -> str:
    """`54 (55, -2 %)`."""
    texts = ["-" if value is None else format(value, form) for value in (one["predicted"], one["measured"])]
    off = "" if one["difference"] is None else f", {100 * one['difference']:+.0f} %"
    return f"{texts[0]} ({texts[1]}{off})"
