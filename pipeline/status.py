"""`permafrost status`: where the run stands, read from its files alone, so that a run in progress is not disturbed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import ConfigError
from pipeline.decide import ARMS
from pipeline.events import progress_line
from pipeline.job import Job
from pipeline.layout import RunPaths, StagePaths

TAIL_BYTES = 8192


def show_status(job: Job) -> None:
    """Print a line for every stage and arm that has begun, and what is being worked on."""
    if not job.paths.root.exists():
        raise ConfigError(
            f"no run in {job.paths.root}; start one with `make all` or `make stage-0`, or name one with RUN="
        )
    console = Console(highlight=False)
    table = Table(
        "part", "status", "steps", "train s", "cache s", "images/s", "loss", "kNN", "linear", box=None, pad_edge=False
    )
    for name, paths in parts(job.paths):
        record = read_record(paths)
        if record:
            table.add_row(name, record["status"], *(_shown(record.get(key), form) for key, form in COLUMNS))
    console.print(table)
    holder = job.paths.holder()
    event = last_event(job.paths.events)
    if event and "step" in event:
        age = time.time() - event["time"]
        working = f"process {holder} is working" if holder else "no process is working here"
        console.print(f"{working}; {age:.0f} s ago: {progress_line(event)}", markup=False)


COLUMNS = (
    ("steps", "d"),
    ("train_seconds", ".1f"),
    ("cache_seconds", ".1f"),
    ("images_per_second", ".0f"),
    ("final_loss", ".4f"),
    ("knn_top1", ".3f"),
    ("linear_top1", ".3f"),
)


def parts(paths: RunPaths) -> list[tuple[str, StagePaths]]:
    """The stages and arms of a run that have a folder, by name."""
    stages = sorted(int(folder.name.removeprefix("stage-")) for folder in paths.root.glob("stage-*"))
    return [(f"stage {k}", paths.stage(k)) for k in stages] + [(f"arm {arm}", paths.arm(arm)) for arm in ARMS]


def read_record(paths: StagePaths) -> dict[str, Any] | None:
    return json.loads(paths.json.read_text()) if paths.json.exists() else None


def last_event(path: Path) -> dict[str, Any] | None:
    """The last whole line of an event log that may be growing."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
    return json.loads(lines[-1]) if lines else None


def _shown(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
