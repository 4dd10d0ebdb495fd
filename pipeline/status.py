"""`permafrost status`: where the run stands, read from its files alone, so that a run in progress is not disturbed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.course import Course
from pipeline.decide import ARMS
from pipeline.events import progress_line
from pipeline.freezing import show_adaptive
from pipeline.job import Job
from pipeline.layout import RunPaths, StagePaths
from pipeline.show import console, table

TAIL_BYTES = 8192


def show_status(job: Job) -> None:
    """Print a line for every stage and arm that has begun, and what is being worked on."""
    found = [(name, record) for name, paths in parts(job.paths) if (record := read_record(paths))]
    if not found:
        raise ConfigError(
            f"no run in {job.paths.root}; start one with `make all` or `make stage-0`, or name one with RUN="
        )
    out = console()
    rows = table("part", "status", "steps", "train s", "cache s", "images/s", "loss", "kNN", "linear", "top-1")
    for name, record in found:
        rows.add_row(name, record["status"], *(_shown(record.get(key), form) for key, form in COLUMNS))
    out.print(rows)
    show_adaptive(Course(job.config, job.paths))
    holder = job.paths.holder()
    working = f"process {holder} is working" if holder else "no process is working here"
    event = last_step(job.paths.events)
    told = f"; {time.time() - event['time']:.0f} s ago: {progress_line(event)}" if event else ""
    out.print(working + told, markup=False)


COLUMNS = (
    ("steps", "d"),
    ("train_seconds", ".1f"),
    ("cache_seconds", ".1f"),
    ("images_per_second", ".0f"),
    ("final_loss", ".4f"),
    ("knn_top1", ".3f"),
    ("linear_top1", ".3f"),
    ("top1", ".3f"),
)


def parts(paths: RunPaths) -> list[tuple[str, StagePaths]]:
    """The stages, arms and fine-tuning of a run, by name."""
    stages = sorted(int(folder.name.removeprefix("stage-")) for folder in paths.root.glob("stage-*"))
    arms = [(f"arm {arm}", paths.arm(arm)) for arm in ARMS]
    return [*((f"stage {k}", paths.stage(k)) for k in stages), *arms, ("finetune", paths.finetune)]


def read_record(paths: StagePaths) -> dict[str, Any] | None:
    return json.loads(paths.json.read_text()) if paths.json.exists() else None


def last_step(path: Path) -> dict[str, Any] | None:
    """The last training step told in an event log that may be growing."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
    return next((event for line in reversed(lines) if "step" in (event := json.loads(line))), None)


def _shown(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
