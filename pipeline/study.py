"""`permafrost study NAME`: a grid of variants and seeds as ordinary runs, which share finished stages and caches. A
call goes on where the last one stopped, ends cleanly when its hours are up, and writes one table and one figure of what
there is by then. The runs do everything that they do by themselves; this module only says which, in which order."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from cache.errors import CacheError
from cache.manifest import atomic_write
from cache.place import without_secrets
from cache.users import register
from pipeline.decide import ARMS, Wanted
from pipeline.desk import Desk, at_work
from pipeline.grid import Request, Run
from pipeline.job import Interrupted, Job, RunFailed
from pipeline.layout import RunBusy
from pipeline.needs import Need
from pipeline.pool import alone, publish, take
from pipeline.sharing import claim, remove_unused, used
from pipeline.show import console
from pipeline.study_table import compares, finished, show_results, show_runs, show_studies, tuning_of, write_results


class Deadline(threading.Event):
    """A stop that is set by somebody, or by the clock."""

    def __init__(self, stop: threading.Event, end: float, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.stop, self.end, self.now = stop, end, now

    def is_set(self) -> bool:
        return self.stop.is_set() or self.now() >= self.end


def run_study(request: Request) -> None:
    """List the studies, tell how one stands, or run it. Raises Interrupted when it was asked to stop, RunFailed when
    runs failed; tables and figure are written either way."""
    if request.study is None:
        show_studies(request.root)
    elif request.flags.list:
        show_runs(request)
    else:
        carry_out(request)


def carry_out(request: Request, now: Callable[[], float] = time.monotonic) -> None:
    """Run what is not done, then write what there is."""
    assert request.study is not None
    hours = request.flags.hours
    stop = Deadline(request.stop, now() + 3600 * hours, now) if hours else request.stop
    failed: dict[str, str] = {}
    assert Wanted(request.runs[0].config, request.runs[0].paths).data, "images that are not there are refused at once"
    left: Sequence[Run] = request.asked
    while left and not stop.is_set():
        busy = go_through(request, left, stop, failed)
        left = busy if len(busy) < len(left) else ()  # while this call worked, others may have come to an end
    rows = write_results(request)
    show_results(request, rows)
    undone = [row for row in rows if row.state != "done"]
    if request.stop.is_set():
        raise Interrupted(f"interrupted: {len(rows) - len(undone)} of {len(rows)} rows are done; {GO_ON}")
    if failed:
        first = ": ".join(next(iter(failed.items())))
        raise RunFailed(f"{len(failed)} of {len(request.asked)} runs failed, first {first}; the same command retries")
    if undone and stop.is_set():
        console().print(f"{hours:g} hours are up: {len(rows) - len(undone)} of {len(rows)} rows are done; {GO_ON}")


GO_ON = "the same command goes on from there"


def go_through(request: Request, runs: Sequence[Run], stop: threading.Event, failed: dict[str, str]) -> list[Run]:
    """Bring runs to their end, one after the other, until `stop`, noting in `failed` why some did not come to it; those
    that another process is at, or another run of which trains what they need."""
    out = console()
    busy = []
    for run in runs:
        if stop.is_set():
            break
        try:
            if finished(run):
                continue
            number = request.asked.index(run) + 1
            out.print(f"study {request.flags.name}: run {number} of {len(request.asked)}: {run.label}", markup=False)
            work(request, run, stop)
        except Interrupted as error:
            out.print(f"{run.label}: {error}", markup=False)
            break
        except RunBusy as error:
            out.print(f"{run.label}: left to another process: {error}", markup=False)
            busy.append(run)
            continue
        except Exception as error:  # whatever it was, it is this run's, and the others go on
            failed[run.label] = told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            out.print(f"{run.label}: failed: {told}", markup=False)
            if request.flags.debug:
                out.print(without_secrets(traceback.format_exc()), markup=False)
        note_failure(run, failed.get(run.label, ""))
    return busy


def work(request: Request, run: Run, stop: threading.Event) -> None:
    """Bring a run to its end: take what other runs have finished, train the rest, hand on what is new.

    Raises RunBusy when another process works in the run's folder, or trains what it would begin with in another run's.
    Afterwards its caches go, except those that runs of its seed which are still to come in this call will read.
    """
    with at_work(Job(request.flags.name, run.config, run.paths, stop=stop, yes=True)) as desk:
        take_parts(desk, request.pool)
        with alone(desk.wanted, request.pool):
            take_parts(desk, request.pool)  # another call may have come to its end just now
            try:
                ensure(desk, run)
            finally:
                publish(desk.wanted, request.pool)
    for other in request.asked:
        if other.seed == run.seed and other != run and not finished(other):
            with suppress(RunBusy), at_work(Job(request.flags.name, other.config, other.paths)) as desk:
                take_parts(desk, request.pool)
                claim(desk, tuned_behind(other, desk.wanted))
    let_go(run)


def tuned_behind(run: Run, wanted: Wanted) -> list[Need]:
    """The cache that the fine-tuning of a run reads; a run that has not been fine-tuned yet does not know of it."""
    need = tuning_of(wanted).need if "finetune" in run.measures.values() and wanted.decided else None
    return [need] if need else []


def take_parts(desk: Desk, pool: Path) -> None:
    """Take what is there, and say so."""
    for where in take(desk.wanted, pool):
        desk.note_settings()
        desk.log.message(f"{where}: taken over, an equal run has trained it")


def ensure(desk: Desk, run: Run) -> None:
    """Train what variants measure of a run. One that has all three arms also gets its comparison and its report."""
    from pipeline import runner

    asked, more = set(run.measures.values()), []
    if "finetune" in asked:
        tuning = tuning_of(desk.wanted)
        tuning.refuse_what_cannot_be()
        more = [tuning.need] if tuning.need else []
    runner.look_before(desk, desk.wanted.candidates - 1 if asked & {"cached", "finetune"} else 0, more)
    if asked & {"cached", "finetune"}:
        runner.ensure_stages(desk)
    for arm in ARMS:
        if arm in asked:
            runner.ensure_arm(desk, arm)
    if "finetune" in asked:
        runner.ensure_finetuned(desk, tuning_of(desk.wanted))
    if compares(asked):
        runner.ensure_caches_to_time(desk)
        runner.ensure_compared(desk)


def let_go(run: Run) -> None:
    """Remove the caches of a finished run that no other run uses."""
    wanted = Wanted(run.config, run.paths)
    folders = used(wanted)
    with suppress(CacheError):
        register(run.paths.cache_root, run.paths.root, [])
    for folder in folders:
        remove_unused(wanted, folder)


def note_failure(run: Run, why: str) -> None:
    """Keep beside a run why it failed, for the table; a run that has not failed forgets it."""
    file = run.paths.root / "failed.json"
    if why:
        run.paths.root.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps({"why": why}).encode())
    else:
        file.unlink(missing_ok=True)
