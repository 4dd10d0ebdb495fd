"""The caches that the runner has decided to build, shard by shard on the cluster, and what they have cost so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

from safetensors import SafetensorError

from cache.adopt import Donor
from cache.layout import Layout
from cache.lock import CacheBusy, hold_cache
from cache.place import is_there, place_of
from cache.users import Cost, read_cost, sum_measured, write_cost
from cache.verify import Damage
from cache.writer import ErrorLimit
from pipeline.cluster import inside, task_runner, torch_threads
from pipeline.config import PipelineConfig
from pipeline.decide import Wanted
from pipeline.desk import Desk
from pipeline.job import Interrupted
from pipeline.layout import StagePaths
from pipeline.machine import whole_machine
from pipeline.needs import Need
from pipeline.seconds import read_seconds, write_seconds
from pipeline.tasks import RunTasks
from stages.carried import WeightsUnseen, frozen_state
from stages.crowd import Crowd, others
from stages.device import best_batch
from stages.encode import EncodeJob, build
from stages.mend import mend

ENCODE_BATCH = 64
"""Samples at once at most, where `cache.encode_batch` says nothing."""


@dataclass(frozen=True)
class Beside:
    """How a cache is built while the stage that will read it trains."""

    run: RunTasks
    """A cluster that is at work already, and stays so."""
    threads: int = 0
    """Torch threads of a worker inside this process, one task of which computes at a time: those of training. 0 is as
    otherwise."""


def build_cache(desk: Desk, need: Need, paths: StagePaths, beside: Beside | None = None) -> None:
    """Build what is missing of a cache, shard by shard on the cluster; its seconds are kept in `paths`, and beside the
    cache for runs that find it. While another process builds it, wait."""
    job = encode_job(desk.wanted, need)
    if beside and beside.threads:
        job = replace(job, threads=beside.threads, together=False)
    with held(desk, job):
        _build(desk, need, paths, job, beside)


def _build(desk: Desk, need: Need, paths: StagePaths, job: EncodeJob, beside: Beside | None) -> None:
    spec, built = job.layout.spec, False
    bill = Bill(job, paths, crowd_of(desk.wanted.config, job.threads))
    pace = Pace(job.layout.num_samples * spec.views)
    tag = need.tag | ({"ahead": True} if beside else {})
    with nullcontext(beside.run) if beside else sweeping(desk) as run:
        for done, total in build(job, desk.wanted.data.train, run, desk.log.message, bill.took):
            built = True
            desk.log(tag | {"cache": need.name, "cut": spec.cut, "cache_seconds": bill.note()} | pace(done, total))
            if desk.job.stop.is_set() and done < total:
                raise Interrupted(
                    f"interrupted: {need.name} has {done} of {total} shards; the same command goes on from there"
                )
    told = f"built in {bill.note():.1f} s" if built else "found complete"
    desk.log.message(f"{need.name}: {told} ({job.folder})")


class Bill:
    """What a cache that is being built costs: in seconds of this run, and in all, with what other runs have spent on it
    and what the rows have cost that it takes over from another cache. One that was removed begins at nothing.

    crowd: measures what other work on the machine takes of those seconds; None where nobody can tell.
    """

    def __init__(self, job: EncodeJob, paths: StagePaths, crowd: Crowd | None = None) -> None:
        self.spec, self.folder, self.paths, self.crowd = job.layout.spec, place_of(job.folder), paths, crowd
        there = is_there(self.folder)
        self.spent = read_seconds(paths, self.spec.fingerprint) if there else 0.0
        self.before = (read_cost(self.folder) if there else None) or Cost(0.0)
        self.now = Cost(0.0)
        self.started = time.perf_counter()

    def note(self) -> float:
        """Write down what it has cost by now; returns this run's seconds."""
        seconds = time.perf_counter() - self.started
        lost = self.crowd.lap(seconds - self.now.seconds) if self.crowd else None
        self.now = Cost(seconds, sum_measured((self.now.crowded, lost)))
        write_seconds(self.paths, self.spec.fingerprint, self.spent + seconds)
        write_cost(self.folder, self.before + self.now)
        return self.spent + seconds

    def took(self, donor: Donor, rows: int) -> None:
        """Rows were taken over. A ring's views were paid for in the turn before, whose cost its stage counts.

        Before the first are, the cost is noted as unknown: whoever dies in between has not counted what is there.
        """
        if self.spec.first_view:
            return
        if rows:
            self.before += cost_of_rows(donor, rows)
        else:
            write_cost(self.folder, Cost(math.nan))


def crowd_of(config: PipelineConfig, threads: int) -> Crowd | None:
    """What measures other work beside a build by so many threads; None where features come from other processes or from
    a GPU, or this one has a part of the machine only."""
    device = config.train.device
    on_cores = inside(config.cluster, device) and not device.startswith("cuda")
    return Crowd(threads, others) if on_cores and whole_machine() else None


def cost_of_rows(donor: Donor, rows: int) -> Cost:
    """What rows of one view of a finished cache have cost; nan where nobody knows, as of a ring's turn, whose other
    views were paid for elsewhere."""
    manifest, cost = donor.reader.manifest, read_cost(donor.folder)
    if cost is None or manifest.spec.first_view:
        return Cost(math.nan)
    return cost.share(rows / (donor.layout.num_samples * manifest.spec.views))


class Pace:
    """How fast shards are finished, counted from the first that was told: those before it were there already."""

    def __init__(self, images: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.images, self.now = images, now
        self.first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> dict[str, float]:
        """Shards and images (views of them) done by now, and from the second shard on images/s."""
        images = round(self.images * done / total)
        found: dict[str, float] = {"shard": done, "shards": total, "images": images}
        if self.first is None:
            self.first = images, self.now()
            return found
        before, started = self.first
        return found | {"images_per_second": (images - before) / max(self.now() - started, 1e-9)}


def weights_there(wanted: Wanted, need: Need) -> bool:
    """Whether the weights that a cache was made with still lie there, whatever they would be trained with today."""
    job = encode_job(wanted, need)
    try:
        frozen_state(job.weights, job.layout.spec.cut, job.layout.spec.weights)
    except (WeightsUnseen, SafetensorError):  # gone, others, or cut short
        return False
    return True


def mend_cache(desk: Desk, need: Need, damages: Sequence[Damage]) -> None:
    """Compute the damaged shards of a finished cache again, in place."""
    job, images = encode_job(desk.wanted, need), desk.wanted.data.train
    with held(desk, job), sweeping(desk) as run:
        for done, total in mend(job, images, damages, run, desk.log.message):
            told = {"cache": need.name, "cut": job.layout.spec.cut, "repair": True}
            desk.log(need.tag | told | {"shard": done, "shards": total})
            if desk.job.stop.is_set() and done < total:
                raise Interrupted(f"interrupted: {done} of {total} shards of {need.name} are mended; repair again")


def sweeping(desk: Desk, stop: Callable[[], bool] | None = None) -> AbstractContextManager[RunTasks]:
    """The run's cluster, at work. Its sweeps raise Interrupted once they are to `stop`, whatever workers do: by default
    when the run is to, where workers are elsewhere and may be waited for; here a shard ends soon."""
    config = desk.wanted.config
    if stop is None:
        stop = desk.job.stop.is_set if config.cluster.elsewhere else lambda: False
    return task_runner(config.cluster, config.train.device, desk.log.message, stop)


@contextmanager
def held(desk: Desk, job: EncodeJob) -> Iterator[None]:
    """Hold a cache, waiting for whoever holds it now and saying who that is. Interrupted when asked to stop waiting."""
    try:
        with hold_cache(place_of(job.folder), desk.log.message, desk.job.stop.is_set):
            yield
    except CacheBusy as error:
        raise Interrupted(f"interrupted while waiting: {error}") from error


def encode_job(wanted: Wanted, need: Need) -> EncodeJob:
    """What workers must know to make a cache. The stage that its weights come from, and its parent, are there."""
    spec = wanted.spec(need)
    parent = wanted.spec(need.parent) if need.parent else None
    assert spec is not None, "the stage that the weights come from is trained first"
    folders = str(wanted.cache_folder(spec)), str(wanted.cache_folder(parent)) if parent else None
    weights = str(wanted.paths.encoder(need.maker).model.absolute())
    return job_of(wanted, need, replace(wanted.layout(need), spec=spec), weights, *folders)


def job_of(
    wanted: Wanted, need: Need, layout: Layout, weights: str, folder: str, parent: str | None
) -> EncodeJob:
    """The same of a cache of a layout in a folder, from weights in a file and a parent in its folder."""
    config = wanted.config
    threads = torch_threads(config.cluster, config.train)
    return EncodeJob(
        folder=folder,
        layout=layout,
        weights=weights,
        model=config.model,
        data=config.data,
        index_folder=str(wanted.paths.index.absolute()),
        parent=parent,
        parent_cut=need.start,
        batch=config.cache.encode_batch
        or best_batch(config.train.device, layout.spec.num_tokens, layout.spec.width, ENCODE_BATCH),
        device=config.train.device,
        threads=threads,
        together=config.train.device == "cpu" and threads > 1,
        loader_threads=config.train.loader_threads,
        rand_augment=need.rand_augment,
        limit=ErrorLimit(largest=config.cache.max_error),
        memory=config.cache.memory,
    )
