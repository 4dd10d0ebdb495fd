"""The caches that the runner has decided to build, shard by shard on the cluster, and what they have cost so far."""

from __future__ import annotations

import json
import time
from dataclasses import replace

from cache.manifest import atomic_write
from cache.writer import ErrorLimit
from pipeline.cluster import task_runner
from pipeline.decide import Wanted
from pipeline.desk import Desk
from pipeline.job import Interrupted
from pipeline.layout import StagePaths
from pipeline.needs import Need
from stages.encode import EncodeJob, build


def build_cache(desk: Desk, need: Need, paths: StagePaths) -> None:
    """Build what is missing of a cache, shard by shard on the cluster; its seconds are kept in `paths`."""
    wanted, job = desk.wanted, encode_job(desk.wanted, need)
    spec = job.layout.spec
    spent, started = read_seconds(paths, spec.fingerprint), time.perf_counter()
    with task_runner(wanted.config.cluster) as run:
        for done, total in build(job, wanted.data.train, run, desk.log.message):
            seconds = spent + time.perf_counter() - started
            write_seconds(paths, spec.fingerprint, seconds)
            desk.log(need.tag | {"cut": spec.cut, "shard": done, "shards": total, "cache_seconds": seconds})
            if desk.job.stop.is_set() and done < total:
                raise Interrupted(
                    f"interrupted: {need.name} has {done} of {total} shards; the same command goes on from there"
                )
    seconds = spent + time.perf_counter() - started
    write_seconds(paths, spec.fingerprint, seconds)
    desk.log.message(f"{need.name}: built in {seconds:.1f} s ({job.folder})")


def encode_job(wanted: Wanted, need: Need) -> EncodeJob:
    """What workers must know to make a cache. The stage that its weights come from, and its parent, are there."""
    config, spec = wanted.config, wanted.spec(need)
    parent = wanted.spec(need.parent) if need.parent else None
    assert spec is not None, "the stage that the weights come from is trained first"
    return EncodeJob(
        folder=str(wanted.cache_folder(spec)),
        layout=replace(wanted.layout(need), spec=spec),
        weights=str(wanted.paths.encoder(need.maker).model.absolute()),
        model=config.model,
        data=config.data,
        index_folder=str(wanted.paths.index.absolute()),
        parent=str(wanted.cache_folder(parent)) if parent else None,
        parent_cut=need.start,
        batch=config.cache.encode_batch,
        device=config.train.device,
        threads=config.cluster.threads or max(1, config.train.threads // max(1, config.cluster.workers)),
        loader_threads=config.train.loader_threads,
        rand_augment=need.rand_augment,
        limit=ErrorLimit(largest=config.cache.max_error),
    )


def read_seconds(paths: StagePaths, fingerprint: str) -> float:
    """What a cache has cost to build so far, in seconds, over all interruptions."""
    return spent_seconds(paths).get(fingerprint, 0.0)


def write_seconds(paths: StagePaths, fingerprint: str, seconds: float) -> None:
    paths.root.mkdir(parents=True, exist_ok=True)
    atomic_write(paths.root / "cache.json", json.dumps(spent_seconds(paths) | {fingerprint: seconds}).encode())


def spent_seconds(paths: StagePaths) -> dict[str, float]:
    """Seconds by fingerprint of every cache that was built for a stage."""
    file = paths.root / "cache.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}
