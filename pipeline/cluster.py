"""Where the tasks of a sweep over shards run: by default one Dask worker inside this process, whose two threads overlap
computing a shard and writing the one before; with several GPUs or many cores, a process for each share of them; or a
scheduler that runs already, or jobs of a batch system or Kubernetes (pipeline.jobs). What is done with a cluster, and
when parts of it fail, is in pipeline.tasks."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import dask
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster

from pipeline.batch import JobWatch, asker
from pipeline.config import ClusterConfig, ConfigError
from pipeline.jobs import job_cluster
from pipeline.machine import available_cores
from pipeline.tasks import Crew, RunTasks
from stages.config import TrainConfig

THREADS = 2
"""Tasks that a worker has at once: one computes a shard while the other writes the one before."""
MANY_CORES, CORES_EACH = 16, 8
"""From so many cores on, a worker process for every so many: what a process does between matrix multiplications,
cutting views and rounding, does not use more."""
CONNECT = "20s"
LOG_LENGTH = 100
"""Messages and transitions that Dask remembers for its developers: for each worker the scheduler keeps so many of what
it was sent, which of Dask's own 1,000 with 1,000 workers would be gigabytes in the process that has the scheduler."""
dask.config.update_defaults({"distributed": {"admin": {"low-level-log-length": LOG_LENGTH}}})  # who sets it wins


@contextmanager
def task_runner(
    config: ClusterConfig,
    device: str,
    tell: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[RunTasks]:
    """A function that maps over tasks on the cluster and yields results as they come; leaving cancels what is left, and
    so does `stop`, while results are waited for.

    Raises ConfigError where there is no such cluster.
    """
    with ExitStack() as stack:
        connect, steady, watch = _connection(config, device, stack, tell)
        try:
            crew = Crew(connect, config, tell, steady, stop, watch)
        except (OSError, TimeoutError, ValueError) as error:
            where = config.address or config.scheduler_file or "this machine"
            raise ConfigError(
                f"no Dask scheduler answers at {where} ({' '.join(str(error).split())}); start one with "
                "`dask scheduler`, or correct cluster.address"
            ) from error
        stack.callback(crew.close)
        if not steady and (config.remote or importlib.util.find_spec("bokeh")):
            tell(f"dashboard: {crew.client.dashboard_link}")
        yield crew


def local_processes(config: ClusterConfig, device: str) -> int:
    """Worker processes on this machine; 0 is one worker inside this process."""
    if config.workers or config.remote:
        return config.workers
    return chosen(available_cores(), len(gpus()) if device == "cuda" else 0)


def inside(config: ClusterConfig, device: str) -> bool:
    """Whether tasks run in one worker inside this process."""
    return not config.remote and not local_processes(config, device)


def torch_threads(config: ClusterConfig, train: TrainConfig) -> int:
    """Torch threads of a worker."""
    return config.threads or max(1, train.threads // max(1, local_processes(config, train.device)))


def chosen(cores: int, gpus: int) -> int:
    """Worker processes for a machine: one for each of several GPUs, or for every eight of many cores."""
    if gpus:
        return gpus if gpus > 1 else 0
    return cores // CORES_EACH if cores >= MANY_CORES else 0


def gpus() -> list[str]:
    """The GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name for name in named.split(",") if name] or [str(one) for one in range(torch.cuda.device_count())]


def _connection(
    config: ClusterConfig, device: str, stack: ExitStack, tell: Callable[[str], None]
) -> tuple[Callable[[], Client], bool, Callable[[], None]]:
    """A function that connects to the cluster, whether that is one worker inside this process, and a function that
    looks after its jobs."""
    if config.address or config.scheduler_file:
        where: dict[str, Any] = (
            {"address": config.address} if config.address else {"scheduler_file": config.scheduler_file}
        )
        return lambda: Client(**where, timeout=CONNECT, set_as_default=False), False, _nothing
    processes = local_processes(config, device)
    cluster: AbstractContextManager[Any]
    if config.kind != "local":
        cluster = job_cluster(config)
    elif processes and device == "cuda" and len(names := gpus()) > 1:
        cluster = on_gpus(names[:processes])
    else:
        cluster = on_cores(processes)
    entered = stack.enter_context(cluster)
    if config.adapt_to or config.batch:  # of jobs a number that stays, too: they end, and others are asked for
        entered.adapt(minimum=config.workers, maximum=max(config.workers, config.adapt_to))
    watch = JobWatch(entered, config, tell, asker(config.kind)) if config.batch else _nothing
    return lambda: Client(entered), inside(config, device), watch


def _nothing() -> None:
    """Of these clusters there is nothing to look after."""


def on_cores(processes: int) -> LocalCluster:
    """Worker processes on this machine, or one worker inside this process, which serves no dashboard: that takes a
    third of a second to start."""
    return LocalCluster(
        n_workers=max(processes, 1),
        threads_per_worker=THREADS,
        processes=processes > 0,
        dashboard_address=":0",  # any free port: two runs on a machine must not quarrel over one
        silence_logs=logging.ERROR,
        **({} if processes else {"scheduler_kwargs": {"dashboard": False}}),
    )


def on_gpus(names: Iterable[str]) -> SpecCluster:
    """A worker process for each GPU, which sees no other."""
    workers = {
        number: {"cls": Nanny, "options": {"nthreads": THREADS, "env": {"CUDA_VISIBLE_DEVICES": name}}}
        for number, name in enumerate(names)
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0"}}
    return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.ERROR)
