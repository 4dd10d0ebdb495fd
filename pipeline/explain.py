"""`permafrost explain`: for every stage, cache and arm whether it is current, stale or missing, and why."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipeline.decide import Wanted, judge_all
from pipeline.job import Job

COLOURS = {"current": "green", "stale": "red", "missing": "yellow", "unfinished": "yellow"}


def show_explain(job: Job) -> None:
    """Print the verdicts that `stage` and `all` would act on."""
    table = Table("what", "state", "why", box=None, pad_edge=False)
    for verdict in judge_all(Wanted(job.config, job.paths)):
        table.add_row(verdict.what, f"[{COLOURS[verdict.state]}]{verdict.state}[/]", verdict.reason)
    Console(highlight=False).print(table)
