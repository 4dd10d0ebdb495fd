"""Workers as jobs of a batch system, by dask-jobqueue, or as pods of Kubernetes, by dask-kubernetes: our settings in
their words. A worker has two Dask threads, one of which computes a shard while the other writes the one before, and on
a GPU that one job asks for. It ends itself before its job's time is over, each at another moment, so that no task is
cut off and the workers do not all go at once. Free of torch and, until a cluster is wanted, of Dask."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.config import ClusterConfig, ConfigError

EXTRAS = {"slurm": "slurm", "pbs": "pbs", "kubernetes": "kubernetes"}
MARGIN = 1.0
"""Minutes between the latest end of a worker and that of its job."""


def job_cluster(config: ClusterConfig) -> Any:
    """The cluster that settings ask for, with `cluster.workers` workers on their way. Raises ConfigError where its
    package is not installed."""
    try:
        if config.kind == "kubernetes":
            from dask_kubernetes.operator import KubeCluster

            return KubeCluster(custom_cluster_spec=kubernetes_spec(config), namespace=config.namespace)
        with _signals_kept():
            from dask_jobqueue import PBSCluster, SLURMCluster
    except ImportError as error:
        raise ConfigError(
            f"cluster.kind = {config.kind} needs a package ({error}); pip install -e '.[{EXTRAS[config.kind]}]' here"
        ) from error
    from pipeline.batch import watched

    kind, options = (SLURMCluster, slurm_options) if config.kind == "slurm" else (PBSCluster, pbs_options)
    return kind(**options(config), job_cls=watched(kind.job_cls), n_workers=config.workers)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """dask-jobqueue has Ctrl-C end the process in silence, and well, from the moment it is imported, which in a thread
    fails over that."""
    plain = signal.signal
    signal.signal = lambda number, handler: signal.getsignal(number)  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = plain


def slurm_options(config: ClusterConfig) -> dict[str, Any]:
    """What dask_jobqueue.SLURMCluster is called with."""
    return _queue_options(config) | {"job_cpu": config.threads}


def pbs_options(config: ClusterConfig) -> dict[str, Any]:
    """What dask_jobqueue.PBSCluster is called with."""
    return _queue_options(config) | {"resource_spec": f"select=1:ncpus={config.threads}:mem={config.memory}"}


def _queue_options(config: ClusterConfig) -> dict[str, Any]:
    optional = {"queue": config.queue, "account": config.account, "interface": config.interface}
    return {name: value for name, value in optional.items() if value} | {
        "cores": 2,  # Dask's threads; torch's are cluster.threads
        "processes": 1,
        "memory": config.memory,
        "walltime": config.walltime,
        "python": sys.executable,
        "job_script_prologue": _lines(config.prologue),
        "job_extra_directives": _lines(config.directives),
        "worker_extra_args": _ending(config),
        "death_timeout": round(config.patience),
        "scheduler_options": {"dashboard_address": ":0"},  # two runs on a machine must not quarrel over a port
    }


def kubernetes_spec(config: ClusterConfig) -> dict[str, Any]:
    """The DaskCluster resource that the operator is given: image, resources, the volume that scheduler and workers
    share, and how workers end."""
    from dask_kubernetes.operator import make_cluster_spec

    amounts = {"cpu": str(config.threads), "memory": config.memory}
    limits = dict(amounts) | dict(line.split("=", 1) for line in _lines(config.directives))
    spec: dict[str, Any] = make_cluster_spec(
        name="permafrost",
        image=config.image,
        n_workers=config.workers,
        resources={"requests": limits, "limits": limits},
        worker_command=["dask", "worker", "--nthreads", "2", *_ending(config)],
    )
    pod = spec["spec"]["worker"]["spec"]
    if config.volume:
        name, path = config.volume.split(":", 1)
        pod["volumes"] = [{"name": "shared", "persistentVolumeClaim": {"claimName": name}}]
        pod["containers"][0]["volumeMounts"] = [{"name": "shared", "mountPath": path}]
    return spec


def _ending(config: ClusterConfig) -> list[str]:
    minutes = lifetime(config)
    return ["--lifetime", f"{minutes:g}m", "--lifetime-stagger", f"{config.stagger:g}m"] if minutes else []


def lifetime(config: ClusterConfig) -> float:
    """Minutes after which a worker ends itself, give or take the stagger; 0 is never."""
    if config.lifetime or config.kind == "kubernetes":
        return config.lifetime
    return _minutes(config.walltime) - config.stagger - MARGIN


def _minutes(walltime: str) -> float:
    """Of `[days-]hours:minutes:seconds`."""
    days, _, clock = walltime.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split(";") if line.strip()]


def cluster_problems(config: Any) -> Iterator[str]:
    """What makes no sense among the settings of the cluster."""
    cluster: ClusterConfig = config.cluster
    asked = [(name, getattr(cluster, name)) for name in ("address", "scheduler_file", "kind")]
    named = [f"cluster.{name} = {value}" for name, value in asked if value not in ("", "local")]
    if len(named) > 1:
        yield f"{' and '.join(named)} name more than one cluster; leave one"
    if 0 < cluster.straggler <= 1:
        yield f"cluster.straggler = {cluster.straggler:g} would try every second task twice; use 3, or 0 for never"
    if cluster.kind == "local":
        if cluster.adapt_to:
            yield f"cluster.adapt_to = {cluster.adapt_to} is for slurm, pbs and kubernetes; set cluster.workers instead"
        return
    if not max(cluster.workers, cluster.adapt_to):
        yield f"cluster.kind = {cluster.kind} has no workers; set cluster.workers, or cluster.adapt_to, or both"
    if 0 < cluster.adapt_to < cluster.workers:
        yield f"cluster.workers = {cluster.workers} is above cluster.adapt_to = {cluster.adapt_to}; lower it"
    if not cluster.threads:
        yield f"cluster.threads = 0 with cluster.kind = {cluster.kind}; set the cores of a worker, for example 8"
    if cluster.kind == "kubernetes":
        if not cluster.image:
            yield "cluster.image is empty; name a container image that has permafrost installed"
        if cluster.volume and ":" not in cluster.volume:
            yield f"cluster.volume = {cluster.volume} is not CLAIM:PATH; write for example data:/data"
    elif not re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", cluster.walltime):
        yield f"cluster.walltime = {cluster.walltime} is not hours:minutes:seconds; write for example 08:00:00"
    elif lifetime(cluster) <= 0 or lifetime(cluster) + cluster.stagger > _minutes(cluster.walltime):
        yield (
            f"cluster.lifetime = {cluster.lifetime:g} with cluster.stagger = {cluster.stagger:g} minutes do not fit "
            f"cluster.walltime = {cluster.walltime}; lengthen that, or lower them"
        )
