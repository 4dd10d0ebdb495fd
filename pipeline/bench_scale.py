"""What a cluster of any size would ask of Dask, of the manifest and of the computer that a build is started from:
workers that sleep where the frozen blocks would run, and write real shards, receipts and a real manifest, tiny ones.
All of them live in this process, so that what is called overhead is the processor time of scheduler, workers and client
together, without what workers do for themselves: `python -m pipeline.bench_scale --workers 1000 --shards 100000`."""

from __future__ import annotations

import json
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import dask
import numpy as np
import psutil
import tyro
from distributed import Client, LocalCluster

from cache.layout import Layout, Shard
from cache.manifest import MANIFEST, ShardEntry, read_manifest
from cache.receipts import RECEIPTS, receipt_name, sealed_receipt
from cache.writer import RowBlock, create_store, finish, missing_shards, write_rows
from models.spec import FeatureSpec
from pipeline.config import ClusterConfig
from pipeline.tasks import Crew

TOKENS, WIDTH = 4, 8
THREADS = 64
"""Threads that all workers share. One each would wake a thousand times a second to look whether it has work, and the
event loop would wait for the interpreter's lock; 64 that sleep 30 ms do 2,000 tasks a second, more than Dask hands out.
"""


@dataclass(frozen=True)
class Scale:
    """What is simulated."""

    workers: int = 50
    """Workers with one thread each."""
    shards: int = 2000
    """Shards that go through Dask, as tasks that do nothing."""
    written: int = 0
    """Of them, those of one row that workers also make, in a build that is stopped half way; 0 is all."""
    fewer: tuple[int, ...] = ()
    """Other numbers of workers whose tasks are timed as well, 2,000 each, to see what depends on it."""
    manifest_shards: int = 100_000
    """Shards whose receipts are read and whose manifest is written and read, without Dask."""
    seconds: float = 30.0
    """What a profile says that a real shard takes."""
    shrink: float = 0.001
    """The part of that for which a worker sleeps."""
    folder: str = ""
    """Where the cache is written; a temporary folder if empty."""
    json: bool = False
    """Print JSON only."""


def layout_of(shards: int) -> Layout:
    """A cache of so many shards, each of one row of 4 tokens."""
    spec = FeatureSpec(
        model="simulated",
        image_size=8,
        patch_size=4,
        width=WIDTH,
        depth=12,
        heads=2,
        weights="0" * 64,
        cut=6,
        groups=1,
        mask_ratio=0.75,
        mask_block=1,
        views=1,
        view_transform="simulated",
        data="0" * 64,
        seed=0,
        dtype="float32",
        codec="float16",
        pixels=False,
        parent="",
        version=1,
    )
    return Layout(spec, shards, shard_rows=1)


def encode(task: tuple[str, Layout, Shard, float]) -> Shard:
    """What a worker does in place of `encode_shard`: it sleeps, and writes a shard."""
    folder, layout, shard, seconds = task
    time.sleep(seconds)
    features = np.full((1, TOKENS, WIDTH), shard.first_row % 97, np.float32)
    block = RowBlock(features, np.zeros((1, 5), np.float32), (str(shard.first_row),))
    write_rows(Path(folder), layout, shard.view, shard.first_row, block)
    return shard


def nothing(task: tuple[str, Layout, Shard, float]) -> Shard:
    """A task that costs only what Dask costs."""
    return task[2]


ELSEWHERE = {
    "distributed.worker.profile.enabled": False,  # each worker samples its own threads 100 times a second
    "distributed.admin.tick.interval": "1h",  # each worker looks 50 times a second whether its loop is late
    "distributed.admin.system-monitor.interval": "1h",  # each worker reads /proc twice a second
    "distributed.worker.use-file-locking": False,  # each tries the locks of all scratch folders: the square of workers
    "distributed.scheduler.worker-ttl": None,  # this process may be stopped for minutes, and all workers with it
}
"""What a worker does for itself, which in a cluster costs each computer its own and here this process the sum. What
the scheduler and the client do, and heartbeats, which the scheduler answers, stay."""


@contextmanager
def crew_of(workers: int) -> Iterator[Crew]:
    """Workers inside this process, driven as those of any cluster are. They have no memory limit: of this machine's
    memory a 300th is less than the process has, and all workers would pause for ever."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a worker here takes 5 to 7 files and sockets
    with dask.config.set(ELSEWHERE), LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        memory_limit=None,
        executor=ThreadPoolExecutor(THREADS),
        silence_logs=logging.ERROR,
        scheduler_kwargs={"dashboard": False},
    ) as cluster:
        crew = Crew(lambda: Client(cluster, set_as_default=False), ClusterConfig(straggler=0))
        yield crew
        crew.close()


def measure(scale: Scale, folder: Path) -> dict[str, Any]:
    """Everything, in seconds and bytes. A build is stopped half way, resumed and finished."""
    shards, found = scale.written or scale.shards, dict[str, Any]()
    layout = layout_of(shards)
    with timed(found, "create_seconds"):
        keys = [f"{row:09d}" for row in range(shards)]
        create_store(folder, layout, np.arange(shards), keys, np.zeros((shards, 32), np.uint8))
    sleep = scale.seconds * scale.shrink
    tasks = [(str(folder), layout, shard, sleep) for shard in layout.shards]
    found["write_seconds_per_shard"] = written_alone(tasks[:200])
    found["overhead_by_workers"] = {count: alone(count, tasks) for count in scale.fewer}
    found["memory_before"] = memory()
    with timed(found, "start_seconds"), crew_of(scale.workers) as crew:
        until_all_are_there(crew, scale.workers)
        found["memory_with_workers"] = memory()
        with timed(found, "round_seconds"):
            found["overhead_seconds_per_shard"] = overhead(crew, tasks, scale.shards)
        found["memory_after_round"] = memory()
        found |= at_once(crew, list(islice(cycle(tasks), 5_000)))
        with timed(found, "build_seconds"):
            half = shards // 2
            found["memory_by_tenth"] = built(crew, tasks[200:half])
            with timed(found, "resume_seconds"):
                missing = missing_shards(folder, layout, crew)
            assert len(missing) == shards - half, "what is there is not made again"
            rest = [(str(folder), layout, shard, sleep) for shard in missing]
            found["memory_by_tenth"] += built(crew, rest)
        found["ideal_seconds"] = (shards - 200) * sleep / min(scale.workers, THREADS)
    with timed(found, "finish_seconds"):
        finish(folder, layout)
    return found | manifest_of(scale.manifest_shards, folder.with_name("many"))


def alone(workers: int, tasks: list[tuple[str, Layout, Shard, float]]) -> float:
    """`overhead` of 2,000 tasks on so many workers."""
    with crew_of(workers) as crew:
        until_all_are_there(crew, workers)
        return overhead(crew, tasks, 2_000)


def overhead(crew: Crew, tasks: list[tuple[str, Layout, Shard, float]], count: int) -> float:
    """Seconds of a processor for each of so many tasks that do nothing, of scheduler, workers and client together."""
    before, tenth = time.process_time(), max(1, count // 10)
    for done, _ in enumerate(crew(nothing, islice(cycle(tasks), count)), start=1):
        if done % tenth == 0:  # what is there if the rest takes too long
            spent = 1e3 * (time.process_time() - before) / done
            print(f"{done} tasks: {spent:.2f} ms each, {memory() / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return (time.process_time() - before) / count


def manifest_of(shards: int, folder: Path) -> dict[str, Any]:
    """What the receipts and the manifest of so many shards take; the shards themselves are not written."""
    layout, found = layout_of(shards), dict[str, Any]()
    keys = [f"{row:09d}" for row in range(shards)]
    create_store(folder, layout, np.arange(shards), keys, np.zeros((shards, 32), np.uint8))
    for shard in layout.shards:
        names = layout.files(shard)
        entries = [ShardEntry(name, shard.first_row, 1, 10**7, "ab" * 32, last_crc=2**31) for name in names]
        found_6 = tuple(1234.5678 / (number + shard.first_row + 1) for number in range(6))
        entries[0] = replace(entries[0], moments=found_6, batch=64)
        (folder / RECEIPTS / f"{receipt_name(shard)}.json").write_bytes(sealed_receipt(layout, entries))
    before = memory()
    with timed(found, "many_resume_seconds"):
        assert len(missing_shards(folder, layout)) == shards, "their files are not there"
    with timed(found, "many_finish_seconds"):
        finish(folder, layout)
    found["manifest_bytes"] = (folder / MANIFEST).stat().st_size
    with timed(found, "many_read_seconds"):
        manifest = read_manifest(folder)
    found["many_memory_bytes"] = memory() - before
    found["manifest_files"] = len(manifest.shards)
    return found


def written_alone(tasks: list[tuple[str, Layout, Shard, float]]) -> float:
    """Seconds of writing a shard, without Dask and without sleeping."""
    started = time.perf_counter()
    for folder, layout, shard, _ in tasks:
        encode((folder, layout, shard, 0.0))
    return (time.perf_counter() - started) / len(tasks)


def built(crew: Crew, tasks: list[tuple[str, Layout, Shard, float]]) -> list[int]:
    """Builds some shards; bytes of memory after each fifth of them."""
    found = []
    for count, _ in enumerate(crew(encode, iter(tasks)), start=1):
        if count % max(1, len(tasks) // 5) == 0:
            found.append(memory())
    return found


def at_once(crew: Crew, tasks: list[tuple[str, Layout, Shard, float]]) -> dict[str, Any]:
    """Bytes of memory for each task that is submitted and waits, which is why few are at a time."""
    before = memory()
    futures = crew.client.map(encode, [(*task[:3], 3600.0) for task in tasks], pure=False, workers=["nowhere"])
    crew.client.scheduler_info(n_workers=0)  # all of them have arrived
    found = {"waiting_bytes_per_task": (memory() - before) / len(tasks)}
    crew.client.cancel(futures)
    return found


def until_all_are_there(crew: Crew, workers: int) -> None:
    crew.client.wait_for_workers(workers)
    crew.look()


def memory() -> int:
    """Bytes that this process has in memory."""
    return int(psutil.Process().memory_info().rss)


@contextmanager
def timed(found: dict[str, Any], name: str, count: int = 1) -> Iterator[None]:
    started = time.perf_counter()
    yield
    found[name] = (time.perf_counter() - started) / count
    print(f"{name}: {found[name]:.4f}", file=sys.stderr, flush=True)  # what is there if the rest takes too long


def told(scale: Scale, found: dict[str, Any]) -> list[str]:
    """The figures in words."""
    mega = {name: value / 1e6 for name, value in found.items() if "bytes" in name or isinstance(value, int)}
    real = scale.shards * scale.seconds / scale.workers
    overhead, tenths = found["overhead_seconds_per_shard"], found["memory_by_tenth"]
    share = scale.shards * overhead / real
    memory = f"{mega['memory_before']:.0f} MB before, {mega['memory_with_workers']:.0f} MB with workers"
    waiting = found["waiting_bytes_per_task"]
    return [
        f"{scale.workers} workers in this process, {scale.shards} shards, {scale.written or scale.shards} written, "
        f"asleep {scale.seconds * scale.shrink:.3f} s",
        f"measured: scheduler, worker and client take {1e3 * overhead:.2f} ms of a processor a shard",
        *(f"measured: with {n} workers {1e3 * s:.2f} ms" for n, s in found["overhead_by_workers"].items()),
        f"measured: writing a tiny shard takes {1e3 * found['write_seconds_per_shard']:.2f} ms",
        f"measured: the build took {found['build_seconds']:.0f} s, of which asleep {found['ideal_seconds']:.0f} s",
        f"measured: memory {memory}, after each tenth {', '.join(f'{value / 1e6:.0f}' for value in tenths)} MB",
        f"measured: a task that waits in the scheduler takes {waiting / 1e3:.1f} kB",
        f"extrapolated: all at once would take {scale.shards * waiting / 1e6:.0f} MB",
        f"measured: half of it was resumed in {found['resume_seconds']:.1f} s, and it was finished in "
        f"{found['finish_seconds']:.1f} s",
        f"measured: of {scale.manifest_shards} shards, {found['manifest_files']} files, receipts are looked through in "
        f"{found['many_resume_seconds']:.1f} s, to which comes hashing what is there",
        f"measured: their manifest is written in {found['many_finish_seconds']:.1f} s, takes "
        f"{mega['manifest_bytes']:.0f} MB, is read in {found['many_read_seconds']:.1f} s, with "
        f"{mega['many_memory_bytes']:.0f} MB of memory more",
        f"extrapolated: shards of {scale.seconds:g} s keep such a cluster busy for {real:.0f} s",
        f"extrapolated: of that, Dask as a whole takes {share:.1%} of one processor",
    ]


def main(scale: Scale) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(scale.folder or temporary) / "cache"
        folder.mkdir(parents=True)
        found = measure(scale, folder)
    print(json.dumps(asdict(scale) | found) if scale.json else "\n".join(told(scale, found)))


if __name__ == "__main__":
    main(tyro.cli(Scale, description=__doc__))
