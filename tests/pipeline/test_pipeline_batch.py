"""Jobs that are refused, wait or end before their worker has come: what dask-jobqueue makes of commands that answer as
SLURM's and PBS's do. With a real SLURM: test_pipeline_slurm."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import batch
from pipeline.cluster import task_runner
from pipeline.config import ClusterConfig, ConfigError
from pipeline.job import RunFailed
from pipeline.jobs import job_cluster

Commands = Callable[..., None]
SETTINGS: dict[str, Any] = {"workers": 1, "threads": 1, "memory": "1GB", "queue": "nope"}
SUBMITTED = 'echo x >> count; echo "Submitted batch job $(wc -l < count)"'


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Puts shell scripts by their names where commands are looked for first; they run in one folder."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(batch, "ASK_EVERY", 0.1)
    monkeypatch.setattr("pipeline.tasks.LOOK_EVERY", 0.05)

    def put(**scripts: str) -> None:
        for name, script in ({"scancel": "exit 0", "qdel": "exit 0"} | scripts).items():
            path = tmp_path / name
            path.with_suffix(".new").write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
            path.with_suffix(".new").chmod(0o755)
            path.with_suffix(".new").replace(path)  # a script that is being run must not change

    return put


def never(task: int) -> int:
    return task


def sweep(told: list[str], act: Callable[[str], None] = lambda line: None, **settings: Any) -> None:
    """Waits for a task that no worker will do."""

    def tell(line: str) -> None:
        told.append(line)
        act(line)

    with task_runner(ClusterConfig(**(SETTINGS | settings)), "cpu", tell) as run:
        list(run(never, [1]))


@pytest.mark.parametrize(
    ("kind", "command", "adapt_to"), [("slurm", "sbatch", 0), ("slurm", "sbatch", 2), ("pbs", "qsub", 0)]
)
def test_a_batch_system_that_takes_no_job_ends_the_run_in_one_line(
    commands: Commands, kind: str, command: str, adapt_to: int, caplog: pytest.LogCaptureFixture
) -> None:
    commands(**{command: f"echo '{command}: error: no partition nope' >&2; echo '{command}: failed' >&2; exit 1"})
    told = rf"^{command} takes no job: no partition nope; failed; look at cluster\.queue, cluster\.account, [^\n]*$"
    with pytest.raises(ConfigError, match=told):
        sweep([], kind=kind, adapt_to=adapt_to)
    assert "Traceback" not in caplog.text


def test_a_batch_system_that_is_not_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sbatch takes no job: .*No such file or directory: 'sbatch'"):
        sweep([], kind="slurm")


def test_jobs_that_wait_say_why_and_those_that_end_without_a_worker_end_the_run(commands: Commands) -> None:
    commands(sbatch=SUBMITTED, squeue="for job in $(seq $(wc -l < count)); do echo '1|PENDING|PartitionDown'; done")
    told: list[str] = []

    def act(line: str) -> None:
        if "waiting in the queue" in line:
            commands(sbatch=SUBMITTED, squeue="exit 0")

    with pytest.raises(
        RunFailed, match=r"^3 jobs have ended before their worker came, the last 3; what they print, sl"
    ):
        sweep(told, act, kind="slurm")
    assert [line for line in told if "job" in line] == [
        "1 job is waiting in the queue (PartitionDown)",
        "ended before its worker came: job 1; another is asked for",
        "ended before its worker came: job 2; another is asked for",
    ]


def test_a_refusal_after_jobs_were_taken_is_tried_again_for_a_while(commands: Commands) -> None:
    commands(sbatch=f"[ -e count ] && {{ echo 'sbatch: error: away' >&2; exit 1; }}; {SUBMITTED}", squeue="exit 0")
    told: list[str] = []
    with pytest.raises(RunFailed, match=r"^sbatch takes no job: away, for cluster.patience = 2 s; what is finished st"):
        sweep(told, kind="slurm", patience=2)
    assert "sbatch takes no job: away; it is tried again" in told


def test_a_squeue_that_does_not_answer_says_nothing_of_jobs(commands: Commands) -> None:
    commands(squeue="exit 1")
    assert batch.ask_slurm() is None
    commands(squeue="echo '12|PENDING|Nodes required for job are DOWN|x'; echo '13|RUNNING|None'")
    assert batch.ask_slurm() == {"12": ("PENDING", "Nodes required for job are DOWN|x"), "13": ("RUNNING", "None")}
    assert batch.asker("pbs")() is None


def test_importing_dask_jobqueue_leaves_ctrl_c_alone_and_works_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = signal.getsignal(signal.SIGINT), []
    config = ClusterConfig(**(SETTINGS | {"kind": "slurm", "workers": 0}))

    def make() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "dask_jobqueue"]:
            monkeypatch.delitem(sys.modules, name)
        with job_cluster(config) as cluster:
            found.append(cluster.job_script())

    make()
    thread = threading.Thread(target=make)
    thread.start()
    thread.join(60)
    assert len(found) == 2 and signal.getsignal(signal.SIGINT) is before
