"""A function mapped over many tasks on a Dask cluster, whatever happens to its workers and its scheduler. Tasks are
idempotent, so that anything doubtful is simply done again: few are submitted at a time, so that a hundred thousand cost
the scheduler no more than a hundred; one that takes far longer than others is given to a second worker; what a lost
scheduler knew is submitted to the one that comes after it. Stands between what builds caches and the cluster."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from distributed import Client, Future, KilledWorker, Worker, WorkerPlugin, get_worker

from cache.patience import StoreConfig, store_settings, use_store
from pipeline.config import ClusterConfig
from pipeline.job import Interrupted, RunFailed
from stages import carried
from stages.making import MADE_WITH, check_made_with

T = TypeVar("T")
U = TypeVar("U")

LOOK_EVERY = 1.0
"""Seconds between two looks at the scheduler, and at what takes too long."""
FEWEST = 3
"""Tasks that must be done before one can be told to take too long."""
SHORTEST = 1.0
"""Seconds that never are too long."""


class RunTasks(Protocol):
    """Map a function over tasks anywhere; results come as they are done."""

    def __call__(self, function: Callable[[T], U], tasks: Iterable[T]) -> Iterator[U]: ...


class Weights(WorkerPlugin):
    """Frozen weights on their way to every worker, once; those that join later get them when they do."""

    idempotent = True

    def __init__(self, digest: str, content: bytes) -> None:
        self.name, self.digest, self.content = f"permafrost-weights-{digest}", digest, content

    def setup(self, worker: Worker) -> None:
        carried.unpack(Path(worker.local_directory), self.digest, self.content)
        worker.log_event(self.name, worker.address)
        self.content = b""

    def teardown(self, worker: Worker) -> None:
        carried.forget(Path(worker.local_directory), self.digest)


def on_worker(topic: str, made_with: tuple[str, ...], store: StoreConfig, function: Callable[[T], U], task: T) -> U:
    """What runs on a worker: says that the task begins, and does it with the very code of whoever sent it, asking
    object stores as that does. CacheError where the code is other."""
    check_made_with(made_with)  # functions travel by their names: what runs is what the worker has loaded
    use_store(store)
    worker = get_worker()
    worker.log_event(topic, {"key": worker.get_current_task(), "worker": worker.address})
    return function(task)


@dataclass
class Running:
    """A task that is not done yet."""

    task: Any
    attempts: dict[str, Future[Any]] = field(default_factory=dict)
    """By key; a second one where the first takes too long."""
    started: dict[str, tuple[float, str]] = field(default_factory=dict)
    """By key: when, and on which worker."""
    missed: int = 0
    """Attempts that found no weights."""


class Crew:
    """The workers of a cluster, as `RunTasks`. `connect` gives a client of it, again after its scheduler was lost.

    stop: asked while results are waited for; then a sweep raises Interrupted.
    steady: the cluster is one worker inside this process, of which nothing is ever lost or late.
    watch: called about every second while results are waited for; what it raises ends the sweep.
    """

    def __init__(
        self,
        connect: Callable[[], Client],
        config: ClusterConfig,
        tell: Callable[[str], None] = lambda line: None,
        steady: bool = False,
        stop: Callable[[], bool] = lambda: False,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        self._stop, self._watch = stop, watch
        self._connect, self._config, self._tell, self._steady = connect, config, tell, steady
        self._weights: dict[str, Weights] = {}
        self._running: dict[int, Running] = {}
        self._took: deque[float] = deque(maxlen=100)
        self._meet()

    def close(self) -> None:
        """Leave the cluster; what weights it was sent is forgotten there."""
        with contextlib.suppress(Exception):
            for plugin in self._weights.values():
                self.client.unregister_worker_plugin(plugin.name)
        self.client.close()

    def __call__(self, function: Callable[[T], U], tasks: Iterable[T]) -> Iterator[U]:
        """Results as they come. Leaving early cancels what is left; what a thread has begun ends unheard."""
        self._function, self._owner = function, dict[str, int]()
        self._running.clear()
        self._took.clear()
        waiting, looked = enumerate(tasks), time.monotonic()
        try:
            while True:
                new = dict(islice(waiting, max(0, self._room - len(self._running))))
                self._running |= {number: Running(task) for number, task in new.items()}
                self._submit(*new)
                if not self._running:
                    return
                yield from self._results()
                self._heed()
                if not self._steady and time.monotonic() - looked >= LOOK_EVERY:
                    self.look()
                    looked = time.monotonic()
        finally:
            for one in list(self._running):
                self._drop(one)

    # --- tasks --------------------------------------------------------------------------------------------------------

    def _submit(self, *numbers: int, **where: Any) -> None:
        """An attempt at each of some tasks: together, since that costs hardly more than one."""
        if not numbers:
            return
        function = self._function
        if not self._steady:
            function = partial(on_worker, self._topic, MADE_WITH, store_settings(), function)
        keys = [f"{self._function.__name__}-{uuid4().hex}" for _ in numbers]
        tasks = [self._running[number].task for number in numbers]
        futures = self.client.map(function, tasks, key=keys, pure=False, **where)
        arrived = self._arrived
        for number, key, future in zip(numbers, keys, futures, strict=True):
            self._running[number].attempts[key], self._owner[key] = future, number
            future.add_done_callback(lambda done: arrived.put((done.key, None)))

    def _results(self) -> Iterator[Any]:
        """The results of what has come in, after a moment of waiting for it."""
        news: list[tuple[str, str | None]] = []
        with contextlib.suppress(Empty):
            news.append(self._arrived.get(timeout=LOOK_EVERY))
            while True:
                news.append(self._arrived.get_nowait())
        for key, worker in news:
            if worker is not None and key in self._owner:
                self._running[self._owner[key]].started[key] = time.monotonic(), worker
        ended = [(key, self._attempt(key)) for key, worker in news if worker is None and key in self._owner]
        done = {key: future for key, future in ended if future.status == "finished"}
        values = self._brought(done) if done else {}
        for key, future in ended:
            if key not in self._owner:  # another attempt was first, or the scheduler was lost
                continue
            number = self._owner[key]
            if key in values:
                started = self._running[number].started
                self._took.extend([time.monotonic() - started[key][0]] if key in started else [])
                self._drop(number)
                yield values[key]
            else:
                self._ended(number, key, future)

    def _brought(self, done: dict[str, Future[Any]]) -> dict[str, Any]:
        """What some attempts brought. Where a worker was lost with it Dask has it computed again and waits, maybe for a
        worker. Nothing where that fails: their tasks are done again."""
        try:
            if self._steady:
                return dict(zip(done, self.client.gather(list(done.values())), strict=True))
            gather = self.client.gather(list(done.values()), asynchronous=True)
            loop: Any = self.client.loop
            found = asyncio.run_coroutine_threadsafe(gather, loop.asyncio_loop)
        except Exception:
            return {}
        while not wait([found], LOOK_EVERY).done:
            self._watch()
            self._heed()
            if not self._scheduler_lost():
                self._count()
        try:
            return dict(zip(done, found.result(), strict=True))
        except Exception:
            return {}

    def _attempt(self, key: str) -> Future[Any]:
        return self._running[self._owner[key]].attempts[key]

    def _ended(self, number: int, key: str, future: Future[Any]) -> None:
        """An attempt has ended and brought nothing."""
        run = self._running[number]
        if future.status == "error":
            self._failed(run, future.exception())
        elif self._scheduler_lost():
            self._renew()
            return
        del run.attempts[key], self._owner[key]
        run.started.pop(key, None)
        if not run.attempts:
            self._submit(number)

    def _failed(self, run: Running, error: BaseException) -> None:
        """An attempt has ended with an error; it counts where no other attempt is under way."""
        if isinstance(error, carried.WeightsUnseen) and run.missed == 0:
            run.missed = 1
            if error.wanted not in self._weights:
                self._weights[error.wanted] = Weights(error.wanted, carried.packed(error))
                self._tell("workers do not see the weights: every one gets them once")
                self.client.register_plugin(self._weights[error.wanted])
            return
        if len(run.attempts) > 1:
            return
        if isinstance(error, KilledWorker):
            raise RunFailed(
                f"{error.allowed_failures + 1} workers died one after the other over one task; their logs say why. "
                "With too little memory, lower cache.encode_batch or cache.shard_rows, or give workers more; what is "
                "finished stays"
            ) from error
        raise error

    def _drop(self, number: int) -> None:
        """Forget a task; what attempts are left are cancelled."""
        run = self._running.pop(number)
        for key in run.attempts:
            del self._owner[key]
        left = [future for future in run.attempts.values() if not future.done()]
        if left:
            with contextlib.suppress(Exception):  # there may be no scheduler any more to tell it to
                self.client.cancel(left)

    # --- the cluster --------------------------------------------------------------------------------------------------

    @property
    def _room(self) -> int:
        """Tasks that may be submitted and not done: some more than there are threads, or will be when workers come."""
        return max(4, self._config.ahead * max(self._threads, 2 * self._config.adapt_to))

    def _meet(self) -> None:
        self.client = self._connect()
        info = self.client.scheduler_info(n_workers=0)
        self._scheduler, self._threads = info["id"], info["total_threads"]
        self._had = self._threads
        self._arrived: SimpleQueue[tuple[str, str | None]] = SimpleQueue()
        if not self._steady:
            self._topic, arrived = f"permafrost-{uuid4().hex}", self._arrived
            self.client.subscribe_topic(self._topic, lambda event: arrived.put((event[1]["key"], event[1]["worker"])))
            if not self._threads:
                self._tell("no worker yet: waiting for one")

    def _scheduler_lost(self) -> bool:
        """Whether there is none, or another that knows nothing of what this one was given."""
        try:
            info = self.client.scheduler_info(n_workers=0)
        except Exception:  # what a connection raises that breaks is of many kinds
            return True
        self._threads = info["total_threads"]
        return self.client.status != "running" or info["id"] != self._scheduler

    def _heed(self) -> None:
        if self._stop():
            raise Interrupted("interrupted: what is finished stays; the same command goes on from there")

    def _count(self) -> None:
        """Say once that there is no worker any more."""
        if self._had and not self._threads:
            self._tell("no worker is left: waiting for one")
        self._had = self._threads

    def look(self) -> None:
        """Whether the scheduler is there, how many threads its workers have, and what takes too long."""
        self._watch()
        if self._scheduler_lost():
            self._renew()
        self._count()
        free = self._threads - sum(len(run.started) for run in self._running.values())
        if not self._config.straggler or len(self._took) < FEWEST or free < 1:
            return
        usual, now = statistics.median(self._took), time.monotonic()
        for number, run in list(self._running.items()):
            if free < 1 or len(run.attempts) != 1 or not run.started:
                continue
            began, worker = next(iter(run.started.values()))
            if now - began > max(SHORTEST, self._config.straggler * usual):
                others = [one for one in self.client.nthreads() if one != worker]
                if others:
                    told = f"a task runs for {now - began:.0f} s, others take {usual:.1f} s"
                    self._tell(f"{told}: a second worker tries it, too")
                    self._submit(number, workers=others, allow_other_workers=True)
                    free -= 1

    def _renew(self) -> None:
        """Wait for a scheduler to come back, and give it all that is not done. RunFailed where none comes."""
        patience = self._config.patience
        self._tell(f"the scheduler is lost: waiting for it for {patience:.0f} s; what is finished stays")
        with contextlib.suppress(Exception):
            self.client.close(timeout=2)
        deadline = time.monotonic() + patience
        while True:
            try:
                self._meet()
                break
            except (OSError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise RunFailed(
                        f"the scheduler was lost and did not come back within cluster.patience = {patience:g} s; start "
                        "it again and run again, what is finished stays"
                    ) from error
                time.sleep(LOOK_EVERY)
        for plugin in self._weights.values():
            self.client.register_plugin(plugin)
        self._owner.clear()
        for run in self._running.values():
            run.attempts.clear()
            run.started.clear()
        self._submit(*self._running)
        self._tell(f"the scheduler is back: {len(self._running)} tasks are submitted again")
