"""A cluster in two processes of this computer, one with a scheduler and one with any number of workers, so that what
client, scheduler and workers take can be told apart; and its tasks, which sleep where the frozen blocks would run and
write real, tiny shards. Stands beside bench_scale, which measures it."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import dask
import numpy as np
import psutil
from distributed import Client, Scheduler, Worker

from cache.layout import Layout, Shard
from cache.writer import RowBlock, write_rows
from pipeline import cluster
from pipeline.config import ClusterConfig
from pipeline.tasks import Crew

Task = tuple[str, Layout, Shard, float]
TOKENS, WIDTH = 4, 8
THREADS = 64
"""Threads that all workers share. One each would wake a thousand times a second to look whether it has work, and the
event loop would wait for the interpreter's lock; 64 that sleep 30 ms do 2,000 tasks a second, more than Dask hands out.
"""
ELSEWHERE = {
    "distributed.worker.profile.enabled": False,  # each worker samples its own threads 100 times a second
    "distributed.admin.tick.interval": "1h",  # each worker looks 50 times a second whether its loop is late
    "distributed.admin.system-monitor.interval": "1h",  # each worker reads /proc twice a second
    "distributed.worker.use-file-locking": False,  # each tries the locks of all scratch folders: the square of workers
    "distributed.scheduler.worker-ttl": None,  # processes may be stopped for minutes, and all workers with them
}
"""What a worker does for itself, which in a cluster costs each computer its own and here one process the sum. What
the scheduler and the client do, and heartbeats, which the scheduler answers, stay."""


def encode(task: Task) -> Shard:
    """What a worker does in place of `encode_shard`: it sleeps, and writes a shard."""
    folder, layout, shard, seconds = task
    time.sleep(seconds)
    features = np.full((1, TOKENS, WIDTH), shard.first_row % 97, np.float32)
    block = RowBlock(features, np.zeros((1, 5), np.float32), (str(shard.first_row),))
    write_rows(Path(folder), layout, shard.view, shard.first_row, block)
    return shard


def nothing(task: Task) -> Shard:
    """A task that costs only what Dask costs."""
    return task[2]


class Simulated(Crew):
    """The crew of a simulated cluster."""

    processes: dict[str, psutil.Process]

    def memory(self) -> dict[str, int]:
        """Bytes that the client (this process), the scheduler and all workers together have in memory."""
        return {name: int(process.memory_info().rss) for name, process in self.processes.items()}

    def busy(self) -> dict[str, float]:
        """Seconds of a processor that each has taken since it began."""
        times = {name: process.cpu_times() for name, process in self.processes.items()}
        return {name: float(spent.user + spent.system) for name, spent in times.items()}


@contextmanager
def crew_of(workers: int) -> Iterator[Simulated]:
    """Workers driven as those of any cluster are. They have no memory limit: of this machine's memory a 300th is less
    than their process has, and all of them would pause for ever."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    processes = [context.Process(target=_schedule, args=(there,), daemon=True)]
    processes[0].start()
    try:
        address = here.recv()
        processes.append(context.Process(target=_work, args=(there, address, workers), daemon=True))
        processes[1].start()
        here.recv()  # all of them have come
        crew = Simulated(lambda: Client(address, set_as_default=False), ClusterConfig(straggler=0))
        crew.processes = {
            "client": psutil.Process(),
            "scheduler": psutil.Process(processes[0].pid),
            "workers": psutil.Process(processes[1].pid),
        }
        crew.look()
        yield crew
        crew.close()
    finally:
        for process in reversed(processes):
            process.kill()
            process.join()


def _alone() -> None:
    assert cluster.LOG_LENGTH, "this process has the settings of one that starts a cluster"
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a worker here takes 5 to 7 files and sockets
    dask.config.set(ELSEWHERE)


def _schedule(there: Connection) -> None:
    _alone()

    async def serve() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
            there.send(scheduler.address)
            await scheduler.finished()

    asyncio.run(serve())


def _work(there: Connection, address: str, workers: int) -> None:
    _alone()
    threads = ThreadPoolExecutor(THREADS)

    async def serve(folder: str) -> None:
        made = [
            Worker(
                address,
                nthreads=1,
                memory_limit=0,
                executor=threads,
                dashboard=False,
                host="127.0.0.1",
                local_directory=folder,
            )
            for _ in range(workers)
        ]
        await asyncio.gather(*made)
        there.send(len(made))
        await asyncio.gather(*(worker.finished() for worker in made))

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(serve(folder))
