"""`permafrost explain`: for every stage, cache and arm whether it is current, stale or missing, and why."""

from __future__ import annotations

from pipeline.budget import budget_lines
from pipeline.decide import Wanted, judge_all
from pipeline.freezing import show_adaptive
from pipeline.job import Job
from pipeline.show import console, table

COLOURS = {"current": "green", "stale": "red", "missing": "yellow", "unfinished": "yellow"}


def show_explain(job: Job) -> None:
    """Print the verdicts that `stage` and `all` would act on."""
    wanted = Wanted(job.config, job.paths)
    rows = table("what", "state", "why")
    for verdict in judge_all(wanted):
        rows.add_row(verdict.what, f"[{COLOURS[verdict.state]}]{verdict.state}[/]", verdict.told)
    out = console()
    out.print(rows)
    for line in budget_lines(wanted):
        out.print(line)
    show_adaptive(wanted)
