"""The one place that names a run's files, and the lock that keeps two processes from writing one run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from cache.lock import locked
from cache.place import place_of
from pipeline.config import ConfigError


class RunBusy(ValueError):
    """Another process works in this run's folder."""


@dataclass(frozen=True)
class StagePaths:
    """The files of a stage or an arm."""

    root: Path

    @property
    def json(self) -> Path:
        """What happened: status, fingerprint, times, scores."""
        return self.root / "stage.json"

    @property
    def model(self) -> Path:
        """The whole encoder after the stage, timm's parameter names."""
        return self.root / "model.safetensors"

    def epoch(self, epoch: int) -> Path:
        """The whole encoder after an epoch of the run that is asked for with train.save_epochs."""
        return self.root / f"epoch-{epoch}.safetensors"

    @property
    def speed(self) -> Path:
        """How fast a stage's steps are beside the arms', measured before its caches were removed."""
        return self.root / "speed.json"

    @property
    def ring(self) -> Path:
        """How often the stage's ring of views has turned."""
        return self.root / "ring.json"

    @property
    def last(self) -> Path:
        """Folder of what a mid-stage resume needs."""
        return self.root / "last"

    @property
    def state(self) -> Path:
        """What a resume goes on from, and, once finished, the next stage starts from."""
        return self.last / "state.safetensors"


@dataclass(frozen=True)
class RunPaths:
    """The files of a run. caches, lists: where its caches and its lists of images lie when not inside it."""

    root: Path
    caches: Path | None = None
    lists: Path | None = None

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def speedup(self) -> Path:
        return self.root / "speedup.json"

    @property
    def probe(self) -> Path:
        """What `probe` found last, encoder by encoder."""
        return self.root / "probe.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def index(self) -> Path:
        """Folder of the image lists that need not be hashed again."""
        return self.lists or self.root / "index"

    @property
    def cache_root(self) -> Path:
        return self.caches or self.root / "cache"

    def stage(self, index: int) -> StagePaths:
        return StagePaths(self.root / f"stage-{index}")

    def arm(self, name: str) -> StagePaths:
        """A baseline arm, e2e or freeze, laid out like a stage."""
        return StagePaths(self.root / "arms" / name)

    @property
    def finetune(self) -> StagePaths:
        """Supervised fine-tuning, laid out like a stage."""
        return StagePaths(self.root / "finetune")

    def encoder(self, name: str) -> StagePaths:
        """The files of `stage <N>` or `arm <name>`, whose encoder something starts from."""
        kind, _, which = name.partition(" ")
        return self.stage(int(which)) if kind == "stage" else self.arm(which)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process; the kernel lets go when the process ends, however it ends. Not re-entrant.
        On a file system without locks only a process of this host that is still there is seen.

        Raises RunBusy at once, naming the process that holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                alone = stack.enter_context(locked(self.root / ".lock", 0)) or self.holder() in (None, os.getpid())
            except Timeout:
                alone = False
            if not alone:
                process = f"process {self.holder() or 'unknown'}"
                raise RunBusy(
                    f"run {self.root} is in use by {process}; wait for it, stop it, or take another --run (RUN=)"
                )
            self._pid.write_text(str(os.getpid()))
            stack.callback(self._pid.unlink, missing_ok=True)
            yield

    def holder(self) -> int | None:
        """The process that works in this run, without disturbing it; None when there is none."""
        try:
            pid = int(self._pid.read_text())
            os.kill(pid, 0)  # a process that was killed has left its number behind
        except PermissionError:
            return pid
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return None
        return pid

    @property
    def _pid(self) -> Path:
        return self.root / ".lock.pid"


def run_paths(run: str, cache_root: str) -> RunPaths:
    """The files of the run in folder run, its caches in cache_root (empty: inside the run).

    Raises ConfigError for a run behind a URL.
    """
    if "://" in run:
        raise ConfigError(
            f"--run {run} is a URL, and a run is locked and appended to, which needs a disk; give a folder (RUN=), its "
            "caches may lie at a URL (CACHE_ROOT=)"
        )
    return RunPaths(Path(run), place_of(cache_root) if cache_root else None)
