"""Processes of a Dask cluster that can be killed: scheduler, workers and clients forked from a server that has imported
everything already, and tasks in which something happens to them."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cache import attempts
from cache.layout import Shard
from pipeline.config import ClusterConfig
from stages.encode import EncodeJob, build, encode_shard

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.pipeline.workers", "distributed", "pipeline.cluster"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def schedule(port: int, allowed_failures: int) -> None:
    from distributed import Scheduler

    async def serve() -> None:
        async with Scheduler(
            host="127.0.0.1", port=port, dashboard=False, allowed_failures=allowed_failures
        ) as scheduler:
            await scheduler.finished()

    asyncio.run(serve())


def work(address: str, folder: str) -> None:
    """A worker without a nanny, one task at a time, in a folder of its own."""
    from distributed import Worker

    Path(folder).mkdir(parents=True)
    os.chdir(folder)

    async def serve() -> None:
        async with Worker(address, nthreads=1, local_directory=folder, dashboard=False) as worker:
            await worker.finished()

    asyncio.run(serve())


LONGEST = 600
"""Seconds after which a process of a cluster ends, whoever has forgotten it."""


def bounded(function: Callable[..., None], *args: Any) -> None:
    signal.alarm(LONGEST)
    function(*args)


def in_environment(environment: dict[str, str], function: Callable[..., None], *args: Any) -> None:
    """The server that forks processes may be older than the environment that they are to have."""
    os.environ.update(environment)
    function(*args)


class Cluster:
    """A scheduler and its workers, each a process."""

    def __init__(self, folder: Path, allowed_failures: int = 3) -> None:
        self.folder, self.port, self.allowed_failures = folder, free_port(), allowed_failures
        self.scheduler: BaseProcess | None = None
        self.others: list[BaseProcess] = []
        self.start()

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def config(self) -> ClusterConfig:
        return ClusterConfig(address=self.address, patience=20)

    def start(self) -> None:
        self.scheduler = self.process(schedule, self.port, self.allowed_failures)

    def worker(self) -> BaseProcess:
        return self.process(work, self.address, str(self.folder / f"worker-{len(self.others)}"))

    def process(self, function: Callable[..., None], *args: Any) -> BaseProcess:
        found = CONTEXT.Process(target=bounded, args=(function, *args), daemon=True)
        found.start()
        self.others.append(found)
        return found

    def end(self) -> None:
        for process in self.others:
            with suppress(ProcessLookupError):
                process.kill()
            process.join(30)


@contextmanager
def cluster_of(folder: Path, workers: int, **options: Any) -> Iterator[Cluster]:
    found = Cluster(folder, **options)
    try:
        for _ in range(workers):
            found.worker()
        yield found
    finally:
        found.end()


# --- tasks in which something happens ---------------------------------------------------------------------------------

Task = tuple[EncodeJob, Shard, Any]


def first(folder: str, name: str) -> bool:
    """Whether this is the first call of all processes with that name."""
    try:
        os.close(os.open(Path(folder).parent / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@contextmanager
def before_names(act: Callable[[], None]) -> Iterator[None]:
    """Has something happen when a shard is written whole, under other names, and before it gets its own."""
    plain, me = attempts.hold_shard, threading.get_ident()

    @contextmanager
    def held(folder: Path, name: str) -> Iterator[None]:
        if threading.get_ident() == me:
            act()
        with plain(folder, name):
            yield

    attempts.hold_shard = held
    try:
        yield
    finally:
        attempts.hold_shard = plain


def killed_once(task: Task) -> Shard:
    """The first worker that is about to finish a shard is killed."""
    if not first(task[0].folder, "killed"):
        return encode_shard(task)
    with before_names(lambda: os.kill(os.getpid(), signal.SIGKILL)):
        return encode_shard(task)


def always_killed(task: Task) -> Shard:
    os.kill(os.getpid(), signal.SIGKILL)
    return encode_shard(task)


def slow(task: Task) -> Shard:
    time.sleep(0.3)
    return encode_shard(task)


def late_once(task: Task) -> Shard:
    """The attempt that comes first at the last shard waits with its files for a file `go`, and then leaves `gone`."""
    job, shard, _ = task
    if shard != job.layout.shards[-1] or not first(job.folder, "late"):
        return encode_shard(task)
    go = Path(job.folder).parent / "go"

    def wait() -> None:
        while not go.exists():
            time.sleep(0.02)

    try:
        with before_names(wait):
            return encode_shard(task)
    finally:
        go.with_name("gone").touch()


def instead(run: Any, function: Callable[[Task], Shard]) -> Any:
    """`run`, which does something else where shards are encoded."""
    return lambda asked, tasks: run(function if asked is encode_shard else asked, tasks)


def build_slowly(job: EncodeJob, images: Any, config: ClusterConfig) -> None:
    """A client that builds a cache, slowly."""
    from pipeline.cluster import task_runner

    with task_runner(config, "cpu") as run:
        for _ in build(job, images, instead(run, slow)):
            pass


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


