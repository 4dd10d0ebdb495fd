"""Finished stages and arms that runs of studies share: `<studies>/parts/<key>` holds what one has trained, by hard
links, and a run that asks for the very same takes it instead of training it again. Stands between the engine of
studies and the runner, which then finds the part current. Free of torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import Timeout

from cache.lock import locked
from cache.manifest import atomic_write
from models.spec import digest
from pipeline.decide import ARMS, Wanted, judge_arm, judge_stage
from pipeline.layout import RunBusy, StagePaths
from pipeline.live import place
from pipeline.machine import described

NOT_TAKEN = frozenset({"cache.json", "speed.json"})
"""Files of a part that stay with the run that made it: what it has spent on caches, and how fast its steps were beside
its own caches. The record says what the caches have cost."""

UNCACHED = ("stage-0", *ARMS)
"""Parts that read no cache, so that its settings decide nothing about them."""

DONE = "part.json"
"""Written last: without it a part in the pool is half there, and is put in again."""


def part_key(wanted: Wanted, inputs: dict[str, Any], cached: bool) -> str:
    """What a part would be, and how it would be scored and timed: two runs share it only where all of that is equal.

    `inputs` decide the numbers; the rest decides the seconds, the curve, and which encoders are kept on the way.
    """
    config = wanted.config
    cache = {key: value for key, value in asdict(config.cache).items() if key not in ("root", "keep")}
    return digest(
        {
            "inputs": json.loads(json.dumps(inputs)),
            "train": asdict(config.train),
            "attention": config.model.attention,
            "machine": described(config),
            "eval": asdict(config.eval),
            "val": wanted.data.val.digest,
        }
        | ({"rows": rows} if (rows := wanted.scored.get("eval.rows")) else {})
        | ({"cache": cache, "cluster": asdict(config.cluster)} if cached else {})
    )


def parts(wanted: Wanted) -> Iterator[tuple[str, StagePaths, dict[str, Any], bool]]:
    """(place as its events have it, files, inputs, whether current) of the stages in order, then of the arms, as far as
    they are known: what a part goes on from is current, or has just been taken."""
    for stage in range(wanted.candidates):
        if wanted.used_up(stage) or not wanted.asked(stage):
            break
        paths = wanted.paths.stage(stage)
        yield f"stage-{stage}", paths, wanted.stage_inputs(stage), judge_stage(wanted, stage).current
        if not judge_stage(wanted, stage).current:
            break
    if judge_stage(wanted, 0).current and wanted.decided and len(wanted.segments) > 1:
        for arm in ARMS:
            paths = wanted.paths.arm(arm)
            yield arm, paths, wanted.arm_inputs(arm), judge_arm(wanted, arm).current


def publish(wanted: Wanted, pool: Path) -> list[str]:
    """Put the finished parts of a run into the pool, if they are not there yet; their places."""
    found = []
    with hold(pool):
        for where, paths, inputs, current in parts(wanted):
            target = pool / part_key(wanted, inputs, where not in UNCACHED)
            if not current or (target / DONE).exists() or not made_so(wanted, paths):
                continue
            link_files(paths.root, target / "part")
            atomic_write(target / "events.jsonl", "".join(events_of(wanted.paths.events, where)).encode())
            atomic_write(target / DONE, json.dumps({"from": str(wanted.paths.root), "place": where}).encode())
            found.append(where)
    return found


@contextmanager
def alone(wanted: Wanted, pool: Path) -> Iterator[None]:
    """Hold the first part that a run lacks, which is where two processes would train the same in runs of their own.

    Raises RunBusy where another one holds it. Where the file system has no locks nothing is held, and both train it.
    """
    with ExitStack() as stack:
        for where, _, inputs, current in parts(wanted):
            if not current:
                held = pool / "held" / f"{part_key(wanted, inputs, where not in UNCACHED)}.lock"
                held.parent.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(locked(held, 0))
                except Timeout:
                    raise RunBusy(f"its {where} is being trained in another run") from None
                break
        yield


def made_so(wanted: Wanted, paths: StagePaths) -> bool:
    """Whether a part was made on the machine, and scored on the images, that its key would name: a run goes on with
    what it has, whatever made it. Ranks are in no key, and the comparison of arms names them and their way."""
    record = wanted.record(paths) or {}
    noted = (record.get("machine") or {}).items()
    machine = {key: value for key, value in noted if key not in ("ranks", "parallel")}
    return machine == described(wanted.config) and record.get("scored", wanted.scored) == wanted.scored


def take(wanted: Wanted, pool: Path) -> list[str]:
    """Take the parts that a run lacks and the pool has; their places. The run's lock is held."""
    found = []
    with hold(pool):
        for where, paths, inputs, current in parts(wanted):
            source = pool / part_key(wanted, inputs, where not in UNCACHED)
            if current or not (source / DONE).exists():
                continue
            link_files(source / "part", paths.root)
            with wanted.paths.events.open("a", encoding="utf-8") as events:
                events.write((source / "events.jsonl").read_text(encoding="utf-8"))
            found.append(where)
    return found


def hold(pool: Path) -> AbstractContextManager[bool]:
    """One process at a time puts parts in or takes them out."""
    pool.mkdir(parents=True, exist_ok=True)
    return locked(pool / ".lock")


def link_files(source: Path, target: Path) -> None:
    """Make `target` hold the files of `source`, the record last; without a second copy where the disk allows it.

    Every file of a part is written by a rename, so that nobody's later writing reaches through a link.
    """
    shutil.rmtree(target, ignore_errors=True)
    files = [file for file in source.rglob("*") if file.is_file() and file.name not in NOT_TAKEN]
    for file in sorted(files, key=lambda one: one.name == "stage.json"):
        into = target / file.relative_to(source)
        into.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, into)
        except OSError:
            shutil.copy2(file, into)


def events_of(log: Path, where: str) -> Iterator[str]:
    """The lines of a log that are of one stage or arm."""
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:  # half a line of a process that was killed
            continue
        if place(event) == where:
            yield line
