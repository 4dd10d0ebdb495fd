"""`permafrost verify --order`: what the stages and arms of a run have read, epoch by epoch, computed again from the
settings in their records and compared with what their loaders noted. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.config import ConfigError
from pipeline.inputs import difference
from pipeline.job import Job, RunFailed
from pipeline.status import records
from stages.replay import Replay

SHOWN = 8
"""Rows that a line begins with."""


def replay(job: Job) -> None:
    """Print and check the order of every epoch, or all rows of the one that is asked for. RunFailed where one differs,
    ConfigError where there is none."""
    found = [(name, record) for name, record in records(job.paths) if record.get("read")]
    chosen = None if job.order == "all" else _epoch(job.order)
    lines, wrong = 0, 0
    for name, record in found:
        for noted in record["read"]:
            if chosen in (None, noted["epoch"]):
                lines += 1
                text, bad = line(record, noted, whole=chosen is not None)
                wrong += bad
                print(f"{name}: {text}")
    if not lines:
        what = "no finished stage or arm" if chosen is None else f"no finished stage or arm has trained epoch {chosen}"
        raise ConfigError(f"{what} in {job.paths.root} has a record of its order; train one first, `make status` lists")
    if wrong:
        raise RunFailed(
            f"{wrong} of {lines} epochs were not trained in the order that their record's settings ask for; what was "
            "trained on them is not what they say: delete those stages and run again"
        )


def line(record: dict[str, Any], noted: dict[str, Any], whole: bool = False) -> tuple[str, bool]:
    """An epoch in words, with its first rows or all, and whether it differs from what its record asks for."""
    how = Replay.of(record["inputs"])
    rows = list(rows_of(how, noted))
    some = rows if whole else rows[:SHOWN]
    ring = f"generation {noted['generation']}, " if how.refresh else ""
    what = f"epoch {noted['epoch']}: {ring}view {noted['view']}, group {noted['group']}, {noted['steps']} steps"
    listed = " ".join(map(str, some)) + (" ..." if len(some) < len(rows) else "")
    changed = difference(noted, how.epoch(noted))
    told = f"NOT as recorded ({changed})" if changed else f"order {noted['order'][:8]} as recorded"
    return f"{what}, {told}; rows {listed}", bool(changed)


def rows_of(how: Replay, noted: dict[str, Any]) -> Iterator[int]:
    """The rows of an epoch in the order of training."""
    for step in range(noted["first"], noted["first"] + noted["steps"]):
        yield from how.rows(noted["epoch"], step, noted["samples"]).tolist()


def _epoch(text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"--order {text} is neither `all` nor an epoch, counted from 0; write for example --order 3")
    return int(text)
