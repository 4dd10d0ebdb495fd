"""A real SLURM of one node, this machine: its controller and its node's daemon, as whoever runs the tests, in a folder
and on ports of their own, without munge. From Debian's package slurm-wlm, for instance."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.pipeline.workers import free_port

ENVIRONMENT = {"PATH": os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))}
NEEDED = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
MISSING = [name for name in NEEDED if not shutil.which(name, path=ENVIRONMENT["PATH"])]

SETTINGS = """
ClusterName=permafrost
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName=here NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=64000
PartitionName=open Nodes=here Default=YES MaxTime=INFINITE State=UP
PartitionName=closed Nodes=here State=DOWN
"""


class Slurm:
    """Its daemons, and its commands as the environment has them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.settings = folder, folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """How its commands find it."""
        return ENVIRONMENT | {"SLURM_CONF": str(self.settings)}

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        host, ports = socket.gethostname().partition(".")[0], (free_port(), free_port())
        text = SETTINGS.format(host=host, ports=ports, user=getpass.getuser(), folder=self.folder)
        self.settings.write_text(text)
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "here"]):
            with (self.folder / f"{command[0]}.out").open("wb") as out:
                call = [*command, "-f", str(self.settings)]
                self._daemons.append(subprocess.Popen(call, stdout=out, stderr=out, env=os.environ | self.environment))
        self.until(lambda: self.said("sinfo", "-h", "-n", "here", "-p", "open", "-o", "%t") == "idle")

    def stop(self) -> None:
        """What still runs is killed with the daemons."""
        self.said("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
        self.said("scancel", "--user", getpass.getuser())
        try:
            self.until(lambda: not self.jobs(), 15)
        finally:
            for daemon in self._daemons:
                daemon.terminate()
            for daemon in self._daemons:
                try:
                    daemon.wait(5)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait(30)

    def said(self, *command: str) -> str:
        """What one of its commands prints; nothing where it fails."""
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=os.environ | self.environment, check=False
        )
        return asked.stdout.strip()

    def jobs(self) -> dict[str, str]:
        """The state of every job that has not ended, by its number."""
        lines = self.said("squeue", "--noheader", "--format=%i %T").splitlines()
        return dict(line.split(" ", 1) for line in lines)  # type: ignore[misc]

    def until(self, true: Callable[[], object], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            tails = [path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("*.log"))]
            assert time.monotonic() < deadline, "\n".join(("it did not come to pass", *tails))
            time.sleep(0.1)
