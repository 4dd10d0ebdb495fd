"""What a verb of the command line is given, and the two ways in which it may end early."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from pipeline.config import PipelineConfig
from pipeline.layout import RunPaths
from stages.team import SOLO, Team


class Interrupted(Exception):
    """The work was asked to stop and has saved where it stands; the one-line message says how to go on."""


class RunFailed(RuntimeError):
    """The request was right and the run failed, for instance a loss that is no number; a one-line message."""


@dataclass(frozen=True)
class Job:
    """One call of a verb."""

    name: str
    """The recipe's name, or the config file's."""
    config: PipelineConfig
    """Checked, and completed for this machine."""
    paths: RunPaths
    stop: threading.Event = field(default_factory=threading.Event)
    """Set by Ctrl-C or SIGTERM: save and raise Interrupted."""
    yes: bool = False
    """Do not ask before anything is removed."""
    team: Team = SOLO
    """Who trains: this process, or all ranks of torchrun."""
    target: str | int | None = None
    """The stage's number, the arm's name, or what else follows the verb."""
    images: int = 0
    """plan: so many training images, which need not be here; 0 takes those of the data."""
    device_profile: str = ""
    """plan: the name or file of a device profile; empty measures this machine."""
    order: str = ""
    """verify: `all`, or an epoch, whose order is computed again; empty hashes shards."""
