"""Where a job is worked on: the run's lock is held, its log is open, and config.toml says with which settings what is
there was made. Free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cache.manifest import atomic_write
from cache.patience import repeated, use_store
from pipeline.decide import Verdict, Wanted
from pipeline.events import EventLog
from pipeline.job import Job
from pipeline.reading import to_toml


@dataclass(frozen=True)
class Desk:
    """A job at work: what it wants, and where it tells what it does."""

    job: Job
    wanted: Wanted
    log: EventLog
    told: set[str] = field(default_factory=set)
    """What is said once in a call."""

    def say_once(self, text: str) -> None:
        """Tell something that may be found again and again."""
        if text not in self.told:
            self.told.add(text)
            self.log.message(text)

    def say(self, verdict: Verdict) -> None:
        """Tell a verdict before acting on it: what is not current is trained or built next."""
        if not verdict.current:
            self.note_settings()
        self.log.message(f"{verdict.what}: {verdict.state} ({verdict.told})")

    def note_settings(self) -> None:
        """Write the resolved settings to config.toml. A call that is refused, or only looks, leaves there those with
        which the stages, arms and caches of the run were made: later calls take them for the run's own."""
        file, text = self.job.paths.config, to_toml(self.job.config)
        if not file.exists() or file.read_text() != text:
            atomic_write(file, text.encode())


@contextmanager
def at_work(job: Job) -> Iterator[Desk]:
    """Hold the run's lock, open its log, tell at the end how often this process had to ask an object store again."""
    with job.paths.lock(), EventLog(job.paths.events, job.paths.tensorboard, show=True) as log:
        use_store(job.config.store)  # of a study, every run's own
        before = Counter(repeated())
        try:
            yield Desk(job, Wanted(job.config, job.paths), log)
        finally:
            if again := Counter(repeated()) - before:
                why = ", ".join(f"{count} {kind}" for kind, count in again.most_common())
                log({"store_requests_repeated": again.total(), "why": why})
                log.message(f"object store: {again.total()} requests were made again ({why})")
