"""Several ranks on this machine, as torchrun would start them: processes with its environment, over gloo. They are
forked off a server that has imported torch once and computed nothing, so that a start costs no seconds."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.stages.teamwork", "pipeline.crew", "pipeline.runner", "pipeline.finetuning"])

LONGEST = 120.0
"""Seconds after which ranks that do not answer hang."""


class RankFailed(AssertionError):
    """A rank raised, or died."""


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(*args) returns on each rank, in order. RankFailed with the first traceback where one raises; where
    one dies without a word its result is None."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends, processes = [], []
    for rank in range(ranks):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_rank, args=(rank, ranks, port, theirs, function, args))
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    try:
        return [_result(end) for end in ends]
    finally:
        for process in processes:
            process.join(LONGEST if all(map(_closed, ends)) else 5)
            if process.is_alive():
                process.kill()
                process.join(30)


def _rank(rank: int, ranks: int, port: int, end: Connection, function: Callable[..., Any], args: Any) -> None:
    signal.alarm(int(4 * LONGEST))  # whoever started it may be gone
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        found = True, function(*args)
        end.send_bytes(pickle.dumps(found))  # by value: torch's own way hands over files that end with the process
    except BaseException:
        end.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise


def _result(end: Connection) -> Any:
    if not wait([end], LONGEST):
        raise RankFailed(f"a rank has not answered in {LONGEST} s")
    try:
        fine, found = pickle.loads(end.recv_bytes())
    except EOFError:
        return None
    if not fine:
        raise RankFailed(found)
    return found


def _closed(end: Connection) -> bool:
    return bool(wait([end], 0))
