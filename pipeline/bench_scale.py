"""What a cluster of any size would ask of Dask, of the manifest and of the computer that a build is started from:
workers that sleep where the frozen blocks would run, and write real shards, receipts and a real manifest, tiny ones.
The client is this process, the scheduler another, all workers share a third (pipeline.simulated), so that memory and
processor time are told apart, without what workers do for themselves:
`python -m pipeline.bench_scale --workers 1000 --shards 100000`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro

from cache.checksum import Checksum
from cache.layout import Layout
from cache.manifest import MANIFEST, ShardEntry, read_manifest
from cache.receipts import RECEIPTS, receipt_name, sealed_receipt
from cache.writer import create_store, finish, missing_shards
from models.spec import FeatureSpec
from pipeline.simulated import THREADS, WIDTH, Simulated, Task, crew_of, encode, nothing

PARTS = "client", "scheduler", "workers"


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
    with timed(found, "cluster_seconds"), crew_of(scale.workers) as crew:
        with timed(found, "round_seconds"):
            found |= overhead(crew, tasks, scale.shards)
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


def alone(workers: int, tasks: list[Task]) -> dict[str, float]:
    """`overhead` of 2,000 tasks on so many workers."""
    with crew_of(workers) as crew:
        spent: dict[str, float] = overhead(crew, tasks, 2_000)["overhead_seconds_per_shard"]
        return spent


def overhead(crew: Simulated, tasks: list[Task], count: int) -> dict[str, Any]:
    """Of so many tasks that do nothing: seconds of a processor for each, and bytes of memory before and after each
    tenth of them, of client, scheduler and workers apart."""
    before, tenth, held = crew.busy(), max(1, count // 10), [crew.memory()]
    spent = dict[str, float]()
    for done, _ in enumerate(crew(nothing, islice(cycle(tasks), count)), start=1):
        if done % tenth == 0:  # what is there if the rest takes too long
            spent = {part: (now - before[part]) / done for part, now in crew.busy().items()}
            held.append(crew.memory())
            words = (f"{part} {1e3 * spent[part]:.2f} ms each, {held[-1][part] / 1e6:.0f} MB" for part in PARTS)
            print(f"{done} tasks: {', '.join(words)}", file=sys.stderr, flush=True)
    growth = {part: [(new[part] - old[part]) / tenth for old, new in pairwise(held)] for part in PARTS}
    return {"overhead_seconds_per_shard": spent, "memory_by_part": held, "growth_per_shard_by_tenth": growth}


def manifest_of(shards: int, folder: Path) -> dict[str, Any]:
    """What the receipts and the manifest of so many shards take; the shards themselves are not written."""
    layout, found = layout_of(shards), dict[str, Any]()
    keys = [f"{row:09d}" for row in range(shards)]
    create_store(folder, layout, np.arange(shards), keys, np.zeros((shards, 32), np.uint8))
    for shard in layout.shards:
        names = layout.files(shard)
        entries = [
            ShardEntry(name, shard.first_row, 1, 10**7, Checksum.NAME + "ab" * 32, last_crc=2**31) for name in names
        ]
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


def written_alone(tasks: list[Task]) -> float:
    """Seconds of writing a shard, without Dask and without sleeping."""
    started = time.perf_counter()
    for folder, layout, shard, _ in tasks:
        encode((folder, layout, shard, 0.0))
    return (time.perf_counter() - started) / len(tasks)


def built(crew: Simulated, tasks: list[Task]) -> list[dict[str, int]]:
    """Builds some shards; bytes of memory of each part after each fifth of them."""
    found = []
    for count, _ in enumerate(crew(encode, iter(tasks)), start=1):
        if count % max(1, len(tasks) // 5) == 0:
            found.append(crew.memory())
    return found


def at_once(crew: Simulated, tasks: list[Task]) -> dict[str, Any]:
    """Bytes of memory for each task that is submitted and waits, which is why few are at a time."""
    before = crew.memory()["scheduler"]
    futures = crew.client.map(encode, [(*task[:3], 3600.0) for task in tasks], pure=False, workers=["nowhere"])
    crew.client.scheduler_info(n_workers=0)  # all of them have arrived
    found = {"waiting_bytes_per_task": (crew.memory()["scheduler"] - before) / len(tasks)}
    crew.client.cancel(futures)
    return found


def memory() -> int:
    """Bytes that this process has in memory."""
    return int(psutil.Process().memory_info().rss)


@contextmanager
def timed(found: dict[str, Any], name: str, count: int = 1) -> Iterator[None]:
    """Seconds, and those of this process's processor, of which a busy machine takes less notice."""
    started, before = time.perf_counter(), time.process_time()
    yield
    found[name] = (time.perf_counter() - started) / count
    found[f"{name}_of_processor"] = (time.process_time() - before) / count
    print(
        f"{name}: {found[name]:.4f}, of a processor {found[f'{name}_of_processor']:.4f}", file=sys.stderr, flush=True
    )  # what is there if the rest takes too long


def told(scale: Scale, found: dict[str, Any]) -> list[str]:
    """The figures in words."""
    mega = {name: value / 1e6 for name, value in found.items() if "bytes" in name or isinstance(value, int)}
    real = scale.shards * scale.seconds / scale.workers
    overhead, tenths = found["overhead_seconds_per_shard"], found["memory_by_tenth"]
    share = scale.shards * overhead["scheduler"] / real
    waiting = found["waiting_bytes_per_task"]
    return [
        f"{scale.workers} workers in one process, {scale.shards} shards, {scale.written or scale.shards} written, "
        f"asleep {scale.seconds * scale.shrink:.3f} s",
        f"measured: {in_words(overhead)} of a processor a shard",
        *(f"measured: with {n} workers {in_words(spent)}" for n, spent in found["overhead_by_workers"].items()),
        *(f"measured: {part} {grown(found, part)}" for part in PARTS),
        f"measured: writing a tiny shard takes {1e3 * found['write_seconds_per_shard']:.2f} ms",
        f"measured: the build took {found['build_seconds']:.0f} s, of which asleep {found['ideal_seconds']:.0f} s",
        *(
            f"measured: {part} while it built, {', '.join(f'{one[part] / 1e6:.0f}' for one in tenths)} MB"
            for part in PARTS
        ),
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
        f"extrapolated: of that, the scheduler takes {share:.1%} of one processor",
    ]


def in_words(spent: dict[str, float]) -> str:
    """Seconds of each part."""
    return ", ".join(f"{part} {1e3 * spent[part]:.2f} ms" for part in PARTS)


def grown(found: dict[str, Any], part: str) -> str:
    """What a part has in memory, and by how much it grew with each shard."""
    held, growth = found["memory_by_part"], found["growth_per_shard_by_tenth"][part]
    kilo = ", ".join(f"{bytes_ / 1e3:.1f}" for bytes_ in growth)
    return f"has {held[0][part] / 1e6:.0f} MB before, {held[-1][part] / 1e6:.0f} after; a shard {kilo} kB by tenth"


def main(scale: Scale) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(scale.folder or temporary) / "cache"
        folder.mkdir(parents=True)
        found = measure(scale, folder)
    print(json.dumps(asdict(scale) | found) if scale.json else "\n".join(told(scale, found)))


if __name__ == "__main__":
    main(tyro.cli(Scale, description=__doc__))
