"""What becomes of the jobs of a batch system, which Dask does not ask: one that is refused when it is submitted, one
that waits in the queue, one that ends before its worker has come. Stands beside the tasks (pipeline.tasks), which are
done by whichever workers are there; free of torch and of dask-jobqueue."""

from __future__ import annotations

import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from distributed import Status

from pipeline.config import ClusterConfig, ConfigError
from pipeline.job import RunFailed

ASK_EVERY = 10.0
"""Seconds between two questions about jobs whose workers are not there, and before a refused job is tried again."""
LOST = 3
"""Jobs that end one after the other before their worker has come; then something is wrong with all of them."""
ANSWER = 30.0
"""Seconds that the batch system has for an answer."""


Ask = Callable[[], dict[str, tuple[str, str]] | None]
"""State and reason of this user's jobs that have not ended, by their numbers; None where that is not known."""


def watched(job_class: Any) -> Any:
    """A class of jobs that keeps why one was refused. As an error that would end in Dask's own thread, unheard, and so
    would the submission of all others."""

    class Watched(job_class):
        refused = ""

        async def start(self) -> None:
            try:
                await super().start()
            except (RuntimeError, OSError, ValueError) as error:
                self.refused = f"{self.submit_command.split()[0]} takes no job: {words(error)}"
                self.status = Status.running  # as Dask wants it of what it has started

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

    return Watched


def words(error: Exception) -> str:
    """What the command that submits jobs said, without what dask-jobqueue puts around it."""
    said = str(error).partition("stderr:\n")[2] or str(error)
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in said.splitlines() if line.strip()]
    return "; ".join(lines)


def ask_slurm() -> dict[str, tuple[str, str]] | None:
    """See Ask."""
    command = ["squeue", "--me", "--noheader", "--format=%i|%T|%r"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = (line.strip().split("|", 2) for line in asked.stdout.splitlines())
    return {number: (state, reason) for number, state, reason in lines}


def asker(kind: str) -> Ask:
    """How a kind of batch system is asked. PBS is not: its `qstat` was not at hand."""
    return ask_slurm if kind == "slurm" else lambda: None


class JobWatch:
    """Looks after the jobs of a cluster of dask-jobqueue while their workers' results are waited for."""

    def __init__(
        self,
        cluster: Any,
        config: ClusterConfig,
        tell: Callable[[str], None],
        ask: Ask,
    ) -> None:
        self._cluster, self._config, self._tell, self._ask = cluster, config, tell, ask
        self._came: set[str] = set()
        self._accepted = False
        self._lost = 0
        self._said = ""
        self._asked = self._served = time.monotonic()

    def __call__(self) -> None:
        """Raises ConfigError where no job was ever accepted, RunFailed where there is no hope for others."""
        jobs, now = dict(self._cluster.workers), time.monotonic()
        here = {worker["name"] for worker in list(self._cluster.scheduler_info["workers"].values())}
        came = {job.job_id for name, job in jobs.items() if name in here}
        refused = {name: job.refused for name, job in jobs.items() if job.refused}
        taken = any(job.job_id for job in jobs.values())
        self._accepted |= taken
        if came - self._came:
            self._lost = 0
        self._came |= came
        if here or taken:
            self._served = now
        self._refuse(refused, now - self._served)
        if now - self._asked < ASK_EVERY:
            return
        self._asked = now
        absent = {name: job.job_id for name, job in jobs.items() if job.job_id and job.job_id not in self._came}
        states = self._ask() if absent else {}
        gone = {name: number for name, number in absent.items() if states is not None and number not in states}
        self._say(refused.values(), [(states or {})[number] for number in absent.values() if number in (states or {})])
        self._replace(refused, gone, bool(here))

    def _refuse(self, refused: dict[str, str], seconds: float) -> None:
        """End where no job can be had: at once if none ever could, after a while if some could before."""
        for why in refused.values():
            if not self._accepted:
                settings = "cluster.queue, cluster.account, cluster.walltime, cluster.memory and cluster.directives"
                raise ConfigError(f"{why}; look at {settings}")
            if seconds > self._config.patience:
                raise RunFailed(f"{why}, for cluster.patience = {self._config.patience:g} s; what is finished stays")

    def _say(self, refused: Iterable[str], states: Iterable[tuple[str, str]]) -> None:
        """Say how it stands with jobs whose workers are not there, when that has changed."""
        found = Counter(
            f"waiting in the queue ({reason})" if state == "PENDING" else f"{state.lower()}, without its worker yet"
            for state, reason in states
        )
        told = [f"{count} {'job is' if count == 1 else 'jobs are'} {what}" for what, count in sorted(found.items())]
        text = "; ".join([*told, *(f"{why}; it is tried again" for why in sorted(set(refused)))])
        if text and text != self._said:
            self._tell(text)
        self._said = text

    def _replace(self, refused: Iterable[str], gone: dict[str, str], here: bool) -> None:
        """Have others asked for in place of jobs that are refused or gone."""
        numbers = ", ".join(gone.values())
        if gone and not here:
            self._lost += len(gone)
            if self._lost >= LOST:
                raise RunFailed(
                    f"{self._lost} jobs have ended before their worker came, the last {numbers}; what they print, "
                    "slurm-<job>.out where this was started unless cluster.directives name another file, says why"
                )
        if gone:
            self._tell(f"ended before its worker came: job {numbers}; another is asked for")
        for name in (*refused, *gone):
            self._cluster.sync(self._drop, name)

    async def _drop(self, name: str) -> None:
        """Dask asks again for a job that it wants and has not (`adapt`)."""
        if job := self._cluster.workers.pop(name, None):
            await job.close()
