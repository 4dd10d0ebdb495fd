"""`python -m pipeline.bench_workers --run RUN`: how building a cache scales over worker processes of this machine, each
on one core. The same shards of stage 1's cache, by one worker and by several, in turn within each round."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from cache.layout import Shard
from cache.writer import create_store, drop_receipts
from pipeline.building import encode_job
from pipeline.cluster import task_runner
from pipeline.config import ClusterConfig, ConfigError
from pipeline.decide import Wanted
from pipeline.layout import RunPaths
from pipeline.machine import available_cores, resolve
from pipeline.reading import load_config
from pipeline.show import console, spread, table
from pipeline.tasks import Crew, RunTasks
from stages.encode import EncodeJob, encode_shard

Rounds = dict[int, list[float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 2 where it cannot be measured."""
    parser = argparse.ArgumentParser("python -m pipeline.bench_workers", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="a run whose stage 0 is trained")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings")
    parser.add_argument("--workers", type=int, default=2, help="how many workers are compared with one")
    parser.add_argument("--shards", type=int, default=16, help="shards that are made in a round")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        _, config = load_config(str(asked.run / "config.toml"), asked.set)
        wanted = Wanted(resolve(config), RunPaths(asked.run))
        show(measure(wanted, asked.workers, asked.shards, asked.rounds), asked.workers)
    except ConfigError as error:
        print(f"permafrost: {error}", file=sys.stderr)
        return 2
    return 0


def measure(wanted: Wanted, workers: int, shards: int, rounds: int) -> Rounds:
    """Rows/s by number of workers, a number a round; a round before them warms. ConfigError."""
    if not 2 <= workers <= available_cores():
        raise ConfigError(f"--workers {workers} of {available_cores()} cores; give 2 or more, and a core to each")
    if len(wanted.segments) < 2 or not wanted.paths.encoder(wanted.features(1).maker).model.exists():
        raise ConfigError(f"{wanted.paths.root} has no trained stage before a cache; run `make stage-0` first")
    found: Rounds = {1: [], workers: []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        job = replace(encode_job(wanted, wanted.features(1)), folder=folder, threads=1, together=False)
        made = [shard for shard in job.layout.shards if not shard.view][:shards]
        images = wanted.data.train
        create_store(Path(folder), job.layout, images.labels, images.keys, images.digests)
        crews = {count: stack.enter_context(pinned(count)) for count in found}
        for number in range(rounds + 1):
            for count in found if number % 2 else reversed(found):
                rate = encoded(crews[count], job, made)
                found[count] += [rate] if number else []
    return found


@contextmanager
def pinned(workers: int) -> Iterator[RunTasks]:
    """Worker processes of this machine, each bound to a core of its own."""
    with task_runner(ClusterConfig(workers=workers), "cpu") as run:
        assert isinstance(run, Crew)
        for core, worker in zip(sorted(os.sched_getaffinity(0)), run.client.nthreads(), strict=False):
            run.client.run(bind, core, workers=[worker])
        yield run


def bind(core: int) -> None:
    """Let all threads of this process run on one core only."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def encoded(run: RunTasks, job: EncodeJob, shards: Sequence[Shard]) -> float:
    """Rows/s of encoding and writing some shards anew."""
    drop_receipts(Path(job.folder))  # a shard that is there would be thrown away
    started = time.perf_counter()
    for _ in run(encode_shard, [(job, shard, None) for shard in shards]):
        pass
    return sum(shard.rows for shard in shards) / (time.perf_counter() - started)


def show(found: Rounds, workers: int) -> None:
    """Print rates and, by round, the efficiency."""
    efficiency = [many / (workers * one) for many, one in zip(found[workers], found[1], strict=True)]
    rows = table("workers, a core each", "rows/s, median", "efficiency")
    rows.add_row("1", f"{statistics.median(found[1]):.1f}", "1.00")
    rows.add_row(str(workers), f"{statistics.median(found[workers]):.1f}", spread(efficiency))
    console().print(rows)


if __name__ == "__main__":
    sys.exit(main())
