"""Clusters of batch systems and Kubernetes: what is asked of them, without one of them being there."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from pipeline.checks import check
from pipeline.cluster import task_runner
from pipeline.config import ClusterConfig, ConfigError
from pipeline.jobs import job_cluster, kubernetes_spec, lifetime, slurm_options
from pipeline.reading import parse
from pipeline.recipes import recipe

SLURM: dict[str, Any] = {"kind": "slurm", "workers": 0, "threads": 8, "adapt_to": 4, "memory": "30GB", "queue": "gpu"}
MORE: dict[str, Any] = {"account": "abc", "walltime": "02:00:00", "directives": "--gres=gpu:1; --constraint=a100"}


def test_a_slurm_job_is_asked_for_as_documented() -> None:
    config = ClusterConfig(**SLURM, **MORE, prologue="module load cuda; source env/bin/activate")
    with job_cluster(config) as cluster:
        script = cluster.job_script().splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in script if line.startswith("#SBATCH ")}
    assert asked >= {"-p gpu", "-A abc", "--cpus-per-task=8", "--mem=28G", "-t 02:00:00", "--gres=gpu:1"}
    assert "--constraint=a100" in asked and {"module load cuda", "source env/bin/activate"} <= set(script)
    call = script[-1]
    assert call.startswith(f"{sys.executable} -m distributed.cli.dask_worker tcp://")
    assert "--nthreads 2" in call and "--lifetime 115m --lifetime-stagger 4m" in call and "--death-timeout 300" in call
    assert "--nworkers" not in call or "--nworkers 1" in call


def test_a_pbs_job_is_asked_for_as_documented() -> None:
    config = ClusterConfig(**(SLURM | {"kind": "pbs"}), **(MORE | {"directives": "-l ngpus=1", "lifetime": 60}))
    with job_cluster(config) as cluster:
        script = cluster.job_script().splitlines()
    asked = {line.removeprefix("#PBS ") for line in script if line.startswith("#PBS ")}
    assert asked >= {"-q gpu", "-A abc", "-l select=1:ncpus=8:mem=30GB", "-l walltime=02:00:00", "-l ngpus=1"}
    assert "--lifetime 60m --lifetime-stagger 4m" in script[-1]


def test_the_number_of_jobs_follows_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted: list[dict[str, int]] = []
    from dask_jobqueue import SLURMCluster

    monkeypatch.setattr(SLURMCluster, "adapt", lambda self, **bounds: adapted.append(bounds))
    with task_runner(ClusterConfig(**SLURM, **MORE), "cpu") as run:
        assert run._room == 24  # type: ignore[attr-defined]  # enough for four workers to be asked for
    assert adapted == [{"minimum": 0, "maximum": 4}]


def test_pods_are_asked_for_as_documented() -> None:
    config = ClusterConfig(
        kind="kubernetes",
        workers=3,
        threads=4,
        memory="16G",
        image="registry/permafrost:1",
        directives="nvidia.com/gpu=1",
        volume="data:/data",
        lifetime=50,
    )
    spec = kubernetes_spec(config)
    worker = spec["spec"]["worker"]
    (container,) = worker["spec"]["containers"]
    wanted = {"cpu": "4", "memory": "16G", "nvidia.com/gpu": "1"}
    assert spec["kind"] == "DaskCluster" and worker["replicas"] == 3
    assert container["image"] == "registry/permafrost:1"
    assert container["resources"] == {"requests": wanted, "limits": wanted}
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/data"}]
    assert worker["spec"]["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "data"}}]
    command = " ".join(container["args"])
    assert command.startswith("dask worker --nthreads 2 --lifetime 50m --lifetime-stagger 4m")


def test_workers_end_before_their_job_does() -> None:
    assert lifetime(ClusterConfig(kind="slurm", walltime="01:00:00")) == 55
    assert lifetime(ClusterConfig(kind="slurm", walltime="1-00:30:00", stagger=9)) == 1460
    assert lifetime(ClusterConfig(kind="slurm", lifetime=7)) == 7 and lifetime(ClusterConfig(kind="kubernetes")) == 0
    assert "worker_extra_args" in slurm_options(ClusterConfig(**SLURM))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"address": "tcp://a:1", "scheduler_file": "s.json"}, "address = tcp://a:1 and .*s.json name more than one"),
        ({"address": "tcp://a:1", "kind": "slurm"}, "cluster.kind = slurm name more than one cluster; leave one"),
        ({"adapt_to": 4}, "cluster.adapt_to = 4 is for slurm, pbs and kubernetes; set cluster.workers instead"),
        ({"straggler": 0.5}, "cluster.straggler = 0.5 would try every second task twice; use 3, or 0"),
        ({"kind": "slurm", "threads": 8}, "cluster.kind = slurm has no workers; set cluster.workers"),
        ({"kind": "pbs", "workers": 2}, "cluster.threads = 0 with cluster.kind = pbs; set the cores"),
        ({"kind": "slurm", "threads": 1, "workers": 4, "adapt_to": 2}, "workers = 4 is above cluster.adapt_to = 2"),
        ({"kind": "slurm", "threads": 1, "workers": 1, "walltime": "2h"}, "walltime = 2h is not hours:minutes:seconds"),
        ({"kind": "slurm", "threads": 1, "workers": 1, "walltime": "00:05:00"}, "fit cluster.walltime = 00:05:00"),
        ({"kind": "slurm", "threads": 1, "workers": 1, "lifetime": 58}, "lifetime = 58 with .* do not fit"),
        ({"kind": "kubernetes", "threads": 1, "workers": 1}, "cluster.image is empty; name a container image"),
        (
            {"kind": "kubernetes", "threads": 1, "workers": 1, "image": "i", "volume": "data"},
            "cluster.volume = data is not CLAIM:PATH",
        ),
        ({"ahead": 0}, r"cluster.ahead = 0 is outside \[1, inf\)"),
        ({"patience": 0}, r"cluster.patience = 0\.0 is outside \(0, inf\)"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(parse({f"cluster.{name}": value for name, value in settings.items()}, recipe("sample")))
    assert check(recipe("sample")) is None


@pytest.mark.parametrize(("kind", "module"), [("slurm", "dask_jobqueue"), ("kubernetes", "dask_kubernetes.operator")])
def test_a_package_that_is_not_there_is_named(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"kind = {kind} needs a package .*pip install -e '.\[{kind}\]'"):
        job_cluster(ClusterConfig(kind=kind, threads=1, workers=1, image="i"))  # type: ignore[arg-type]
