"""`permafrost status`: where the run stands, read from its files alone, so that a run in progress is not disturbed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.course import Course
from pipeline.decide import ARMS
from pipeline.freezing import show_adaptive
from pipeline.job import Job
from pipeline.layout import RunPaths, StagePaths
from pipeline.live import clock, is_progress, progress_line, seconds_left
from pipeline.show import console, table

TAIL_BYTES = 8192


def show_status(job: Job) -> None:
    """Print a line for every stage and arm that has begun, and what is being worked on."""
    found = records(job.paths)
    if not found:
        raise ConfigError(
            f"no run in {job.paths.root}; start one with `make all` or `make stage-0`, or name one with RUN="
        )
    out = console()
    rows = table("part", "status", *COLUMNS)
    for name, record in found:
        if record.get("train_seconds"):
            record["waiting"] = record["loader_wait_seconds"] / record["train_seconds"]
        rows.add_row(name, record["status"], *(_shown(record.get(key), form) for key, form in COLUMNS.values()))
    out.print(rows)
    show_adaptive(Course(job.config, job.paths))
    holder = job.paths.holder()
    working = f"process {holder} is working" if holder else "no process is working here"
    event = last_progress(job.paths.events)
    told = f"; {time.time() - event['time']:.0f} s ago: {progress_line(event)}" if event else ""
    out.print(working + told, markup=False)
    if holder and event and (line := ahead(job.paths, event)):
        out.print(line, markup=False)


def ahead(paths: RunPaths, event: dict[str, Any]) -> str:
    """What follows the part that an event is of, with the seconds that plan.json predicts; empty where nothing does, or
    where there is no plan of these very stages."""
    try:
        plan = json.loads(paths.plan.read_text())["stages"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return ""
    known = {int(name.removeprefix("stage ")): record for name, record in records(paths) if name.startswith("stage ")}
    cuts = [(stage, record["cut"]) for stage, record in known.items()]
    cuts += [(event["stage"], event["cut"])] if "shard" in event and "stage" in event else []
    if any(stage >= len(plan) or plan[stage]["cut"] != cut for stage, cut in cuts):
        return ""
    found: dict[str, float] = {}
    if "stage" in event:
        if "shard" in event:
            found[f"stage {event['stage']}"] = plan[event["stage"]]["cached_seconds"]
        found |= {f"stage {s['stage']}": s["cache_seconds"] + s["cached_seconds"] for s in plan[event["stage"] + 1 :]}
    done = {name for name, record in records(paths) if record["status"] == "done"}
    if event.get("arm") in ARMS:  # `make e2e` needs stage 0 alone
        later = (s for s in plan[1:] if f"stage {s['stage']}" not in done)
        found |= {f"stage {s['stage']}": s["cache_seconds"] + s["cached_seconds"] for s in later}
    for arm in ARMS[ARMS.index(event["arm"]) + 1 :] if event.get("arm") in ARMS else ARMS:
        if f"arm {arm}" not in done and len(plan) > 1:
            found[f"arm {arm}"] = sum(stage[f"{arm}_seconds"] for stage in plan[1:])
    if not found or event.get("arm") == "finetune":
        return ""
    total = sum(found.values()) + (seconds_left(event) or 0.0)
    told = ", ".join(f"{name} {clock(seconds)}" for name, seconds in found.items())
    return f"`make all` goes on with {told}, as `make plan` predicts: {clock(total)} left in all, without evaluation"


COLUMNS = {
    "steps": ("steps", "d"),
    "train s": ("train_seconds", ".1f"),
    "cache s": ("cache_seconds", ".1f"),
    "images/s": ("images_per_second", ".0f"),
    "waiting": ("waiting", ".1%"),
    "loss": ("final_loss", ".4f"),
    "kNN": ("knn_top1", ".3f"),
    "linear": ("linear_top1", ".3f"),
    "top-1": ("top1", ".3f"),
}


def parts(paths: RunPaths) -> list[tuple[str, StagePaths]]:
    """The stages, arms and fine-tuning of a run, by name."""
    numbers = (folder.name.removeprefix("stage-") for folder in paths.root.glob("stage-*"))
    stages = sorted(int(number) for number in numbers if number.isdecimal())  # somebody may keep a copy beside them
    arms = [(f"arm {arm}", paths.arm(arm)) for arm in ARMS]
    return [*((f"stage {k}", paths.stage(k)) for k in stages), *arms, ("finetune", paths.finetune)]


def records(paths: RunPaths) -> list[tuple[str, dict[str, Any]]]:
    """The records that there are, by the name of their part."""
    return [(name, record) for name, part in parts(paths) if (record := read_record(part))]


def read_record(paths: StagePaths) -> dict[str, Any] | None:
    return json.loads(paths.json.read_text()) if paths.json.exists() else None


def last_progress(path: Path) -> dict[str, Any] | None:
    """The last training step or shard told in an event log that may be growing."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
    return next((event for line in reversed(lines) if is_progress(event := json.loads(line))), None)


def _shown(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
