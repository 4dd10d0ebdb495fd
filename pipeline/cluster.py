"""Where a sweep over shards runs: by default on one Dask worker inside this process, which shares its torch and starts
at once; with `cluster.workers` on local worker processes; with `cluster.address` on a running cluster, whose workers
overlap computing and writing where they have two threads each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from distributed import Client, LocalCluster, as_completed

from pipeline.config import ClusterConfig

T = TypeVar("T")
U = TypeVar("U")


class RunTasks(Protocol):
    """Map a function over tasks anywhere; results come as they are done."""

    def __call__(self, function: Callable[[T], U], tasks: Sequence[T]) -> Iterator[U]: ...


@contextmanager
def task_runner(config: ClusterConfig) -> Iterator[RunTasks]:
    """A function that maps over tasks on the cluster and yields results as they come; leaving cancels what is left."""
    with _client(config) as client:

        def run(function: Callable[[T], U], tasks: Sequence[T]) -> Iterator[U]:
            futures = client.map(function, tasks, pure=False)
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                client.cancel(futures)

        yield run


@contextmanager
def _client(config: ClusterConfig) -> Iterator[Client]:
    if config.address:
        with Client(config.address, timeout="20s") as client:
            yield client
        return
    local = LocalCluster(
        n_workers=max(config.workers, 1),
        threads_per_worker=2,  # one computes a shard while the other writes the one before
        processes=config.workers > 0,
        dashboard_address=":0",  # any free port: two runs on a machine must not quarrel over one
        silence_logs=logging.ERROR,
    )
    with local, Client(local) as client:
        yield client
