"""Several ranks of one call, under torchrun: rank 0 is the leader and runs the verb as one process would, with its
lock, records, caches, evaluations and words; the others wait, and train what it trains when it says so, after they have
seen that they would train the very same. However a rank ends, the others end too, and what went wrong is said once."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from cache.rank import Rank
from pipeline.config import ConfigError
from pipeline.decide import Wanted
from pipeline.inputs import difference
from pipeline.job import Job, RunFailed
from pipeline.ranks import local_rank, on_own_device, rank_here, refuse_what_ranks_cannot
from pipeline.tuned import Tuning
from pipeline.work import baseline_arm, parent_of, stage_arm
from stages.arm import Arm, Hooks
from stages.book import Diverged
from stages.ranks import Ranks
from stages.team import RanksDiffer
from stages.train import train_arm

STEP_PATIENCE = timedelta(minutes=30)
"""How long ranks wait for each other within a step. What takes longer, the leader's own work, waits elsewhere."""

MEETING = timedelta(seconds=60)
"""How long ranks wait for each other at their start, which all have come to once their settings are read."""

PARTING = 10.0
"""Seconds for which the keeper of the ranks' store, about to end, waits for others that have not read its last word."""

WORD = "last word"
"""Where in the ranks' store the first rank that fails says why."""

_store: list[dist.Store | Exception] = []
_team: list[Ranks] = []


class RankGone(RuntimeError):
    """A rank that this one would have met has ended, and has said why."""


def work_together(job: Job, verb: str, function: Callable[[Job], Any], rank: Rank) -> int:
    """Run a verb on all ranks. Returns the leader's exit status on every rank; its exceptions are the leader's own."""
    refuse_what_ranks_cannot(job.config, verb, rank.ranks)
    team = join(job, rank)
    if team.leads:
        function(replace(job, team=team))
        team.told({"end": 0})
        status = 0
    else:
        number, _ = local_rank()
        status = follow(replace(job, team=team, config=on_own_device(job.config, number)))
    dist.destroy_process_group()
    return status


def join(job: Job, rank: Rank) -> Ranks:
    """Meet the other ranks: over gloo on CPUs, over NCCL on GPUs, one for each rank of a machine."""
    number, local = local_rank()
    cuda = job.config.train.device.startswith("cuda")
    if cuda:
        if number >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank.rank} has no GPU: {local} ranks on a machine with {torch.cuda.device_count()}; use "
                f"--nproc-per-node {max(1, torch.cuda.device_count())}"
            )
        torch.cuda.set_device(number)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    meet(rank.ranks)
    store = dist.PrefixStore("ranks", store_of())
    dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.ranks, timeout=STEP_PATIENCE)
    _team[:] = [Ranks(rank, local)]
    return _team[0]


def meet(ranks: int) -> None:
    """Wait until all are here. Raises RankGone once one has ended instead, RunFailed when one has not come in time."""
    store, latest = store_of(), time.monotonic() + MEETING.total_seconds()
    here = store.add("here", 1)
    while here < ranks:
        if store.check([WORD]):
            raise RankGone("a rank has ended before all had met")
        if time.monotonic() > latest:
            raise RunFailed(
                f"{here} of {ranks} ranks have met within {MEETING.seconds} s; see what the others are at, then call "
                "again"
            )
        time.sleep(0.02)
        here = store.add("here", 0)


def store_of() -> dist.Store:
    """The ranks' store: that of torchrun, which outlives all of them, or one that rank 0 keeps. Where it could not be
    reached it is not waited for again."""
    if not _store:
        try:
            _store.append(next(iter(dist.rendezvous("env://", timeout=MEETING)))[0])
        except (RuntimeError, OSError) as error:
            _store.append(error)
    found = _store[0]
    if isinstance(found, Exception):
        raise found
    return found


# --- those who follow -------------------------------------------------------------------------------------------------


def follow(job: Job) -> int:
    """Train what the leader orders until it ends; returns its exit status."""
    while True:
        order: dict[str, Any] = job.team.told({})
        if "end" in order:
            return int(order["end"])
        wanted = Wanted(job.config, job.paths)  # anew: what is on disk has changed
        arm, inputs = ordered(wanted, order)
        theirs, own = (json.loads(json.dumps(found)) for found in (order["inputs"], inputs))
        if changed := difference(theirs, own):
            raise RanksDiffer(
                f"rank {job.team.rank.rank} would train another {arm.label} than rank 0 ({changed}); start all ranks "
                "with the same settings on the same files"
            )
        parent_of(wanted, arm.start)
        with job.team.assembled(order):
            try:
                train_arm(arm, Hooks(log=lambda event: None, evaluate=_never, stop=job.stop.is_set), job.team)
            except Diverged as error:
                raise RunFailed(str(error)) from error


def ordered(wanted: Wanted, order: dict[str, Any]) -> tuple[Arm, dict[str, Any]]:
    """The arm that the leader trains, as this rank sees it, and all that can change its outcome."""
    tag = order["tag"]
    if "stage" in tag:
        return stage_arm(wanted, tag["stage"], _unheard), wanted.stage_inputs(tag["stage"])
    if tag["arm"] != "finetune":
        return baseline_arm(wanted, tag["arm"], _unheard), wanted.arm_inputs(tag["arm"])
    from pipeline.finetuning import finetune_arm

    kind, _, which = str(order["from"]).partition(" ")
    tuning = Tuning(wanted, int(which) if kind == "stage" else which)
    return finetune_arm(tuning), tuning.inputs()


def _unheard(text: str) -> None:
    """The leader says it."""


def _never(model: Any) -> NoReturn:
    raise AssertionError("the leader evaluates")


# --- how ranks end ----------------------------------------------------------------------------------------------------


def ending(error: BaseException, status: int | None, text: str) -> tuple[int | None, str]:
    """How this rank ends after an error: its exit status, None for a fault of this program, and what it says, which is
    nothing where another rank has said it.

    A rank that finds a connection broken looks for the last word of the one that broke it; where there is none, that
    one was killed.
    """
    word = _read_word()
    if lost(error) and (_team or word):
        if word:
            status, text = int(word["status"]), ""
        else:
            status = 1
            text = _once(
                "a rank has died without a word, killed or out of memory; what was saved is kept, the same command "
                "goes on from there"
            )
        _leave(dead=not word)
        return status, text
    if word is None:
        _write_word(1 if status is None else status)
    text = text if status is None else _once(text)
    if _team and _team[0].leads and not _team[0].busy:
        with suppress(Exception):  # who has died already cannot be told
            _team[0].told({"end": 1 if status is None else status})
            return status, text  # the others end in `follow`
    _leave()
    return status, text


def lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    if isinstance(error, dist.DistError | RankGone):
        return True
    broken = ("gloo", "NCCL", "Connection closed by peer")
    return isinstance(error, RuntimeError) and any(name in str(error) for name in broken)


def _once(text: str) -> str:
    """The text for the first rank that comes with it, nothing for the others; for all where they cannot meet."""
    try:
        first = store_of().add("said " + hashlib.sha256(text.encode()).hexdigest(), 1) == 1
    except (RuntimeError, OSError):
        return text
    return text if first else ""


def _leave(dead: bool = False) -> None:
    """The last that a rank asks of the store. Without torchrun the store ends with rank 0, which therefore waits a
    while for the others, all or all but a dead one, to have read what it holds. Those that wait for rank 0 itself, in
    the middle of training, first have to hear that it is gone."""
    here = rank_here()
    if _team and not here.rank:
        _let_go(_team[0])
    with suppress(RuntimeError, OSError):
        store = store_of()
        left = store.add("left", 1)
        until = time.monotonic() + PARTING
        while not here.rank and not kept_by_torchrun() and left < here.ranks - dead and time.monotonic() < until:
            time.sleep(0.02)
            left = store.add("left", 0)


def _let_go(team: Ranks) -> None:
    """Close a rank's connections. Torch waits for what is under way on them, for as long as another rank keeps it
    there, so a thread does, which is waited for a while only and ends with the process."""

    def close() -> None:
        with suppress(Exception):
            team.leave()

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(PARTING)


def kept_by_torchrun() -> bool:
    """Whether the ranks' store is torchrun's own, which outlives all of them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _read_word() -> dict[str, Any] | None:
    try:
        if not store_of().check([WORD]):
            return None
        found: dict[str, Any] = json.loads(store_of().get(WORD))
    except (RuntimeError, OSError):
        return None
    return found


def _write_word(status: int) -> None:
    with suppress(RuntimeError, OSError):
        store_of().set(WORD, json.dumps({"status": status}))
